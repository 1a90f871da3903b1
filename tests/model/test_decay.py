"""Decay weights against plain powers."""

from __future__ import annotations

import pytest
import torch

from vmoco.model.decay import key_weights, oldest_key_weight


def test_weights_are_powers_of_t() -> None:
    """t ** age, also where float32 powers lose digits."""
    ages = torch.tensor([1, 2, 65536])
    assert key_weights(ages, 0.99999).tolist() == pytest.approx([0.99999**a for a in (1, 2, 65536)], rel=1e-6)


@pytest.mark.parametrize(("unit", "expected"), [("key", 0.52), ("step", 0.997)])
def test_oldest_key_of_the_paper(unit: str, expected: float) -> None:
    """The two readings of the paper differ: 0.52 by key, 0.997 by step, at K = 65536, t = 0.99999, batch 256."""
    found = oldest_key_weight(0.99999, queue_size=65536, global_batch=256, age_unit=unit)
    assert found == pytest.approx(expected, abs=0.005)
