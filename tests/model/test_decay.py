"""Decay weights against plain powers, and t over training against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vmoco.config import MocoSettings
from vmoco.model.queue import decay_at, key_weights, oldest_key_weight


def test_weights_are_powers_of_t() -> None:
    """t ** age, also where float32 powers lose digits."""
    ages = torch.tensor([1, 2, 65536])
    assert key_weights(ages, 0.99999).tolist() == pytest.approx([0.99999**a for a in (1, 2, 65536)], rel=1e-6)


@pytest.mark.parametrize(("unit", "expected"), [("key", 0.52), ("step", 0.997)])
def test_oldest_key_of_the_paper(unit: str, expected: float) -> None:
    """The two readings of the paper differ: 0.52 by key, 0.997 by step, at K = 65536, t = 0.99999, batch 256."""
    found = oldest_key_weight(0.99999, queue_size=65536, global_batch=256, age_unit=unit)
    assert found == pytest.approx(expected, abs=0.005)


def course(schedule: str, *, total_steps: int = 101, start: float = 0.9, end: float = 0.5) -> list[float]:
    """t at every step of a run."""
    settings = MocoSettings.model_validate({"decay": start, "decay_schedule": schedule, "decay_end": end})
    return [decay_at(step, settings, total_steps=total_steps, difference=0.0) for step in range(total_steps)]


def test_constant_is_the_very_number_and_ignores_the_end() -> None:
    """Bit for bit what was set, at every step."""
    assert set(course("constant")) == {0.9}


def test_linear_is_a_straight_line_from_first_to_last_step() -> None:
    """Against numpy's evenly spaced numbers, downwards and upwards."""
    assert course("linear") == pytest.approx(np.linspace(0.9, 0.5, 101))
    assert course("linear", start=0.5, end=1.0) == pytest.approx(np.linspace(0.5, 1.0, 101))


def test_cosine_is_half_a_cosine_from_first_to_last_step() -> None:
    """Flat at both ends, half way in the middle."""
    assert course("cosine") == pytest.approx(0.7 + 0.2 * np.cos(np.linspace(0, np.pi, 101)))


def test_step_goes_half_way_at_60_percent_and_all_the_way_at_80() -> None:
    """In 100 steps: 60 at the start value, 20 half way, 20 at the end value."""
    assert course("step", total_steps=100) == pytest.approx([0.9] * 60 + [0.7] * 20 + [0.5] * 20)


def test_adversarial_is_e_to_the_unscaled_loss() -> None:
    """1 while the generator does nothing, 0.98 at a difference of 0.02, whatever decay and decay-end are."""
    settings = MocoSettings(decay=0.9, decay_schedule="adversarial", decay_end=0.5)
    found = [decay_at(3, settings, total_steps=10, difference=difference) for difference in (0.0, 0.02, 2.0)]
    assert found == pytest.approx([1.0, 0.9802, math.exp(-2)], rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step", "adversarial"])
@pytest.mark.parametrize("total_steps", [1, 2])
def test_shortest_runs_have_a_decay(schedule: str, total_steps: int) -> None:
    """Runs of one and two steps divide by nothing, and t stays in (0, 1]."""
    assert all(0 < t <= 1 for t in course(schedule, total_steps=total_steps))
