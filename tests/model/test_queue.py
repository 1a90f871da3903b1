"""The ring of keys against a plain list, decay weights against powers, and t over training against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vmoco.config import MocoSettings
from vmoco.model.queue import KeyQueue, decay_at, key_weights, oldest_key_weight


@given(length=st.integers(4, 20), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=15))
def test_queue_keeps_the_last_keys(length: int, sizes: list[int]) -> None:
    """For any length and any batches, wrapping or not: same keys, videos and ages as a list cut to its last K."""
    queue = KeyQueue(length, 2)
    plain: list[tuple[float, int, int]] = []  # value, video, step at which it came in
    for step, size in enumerate(sizes):
        values = [float(len(plain) + i) for i in range(size)]
        videos = [int(v) % 5 for v in values]
        queue.enqueue(torch.tensor(values)[:, None].expand(-1, 2), torch.tensor(videos), step=step)
        plain += [(value, video, step) for value, video in zip(values, videos, strict=True)]
    now = len(sizes)
    kept = plain[-length:]
    in_keys, in_steps = queue.ages(now, unit="key"), queue.ages(now, unit="step")
    found = {int(in_keys[i]): i for i in range(length) if queue.born[i] >= 0}
    assert sorted(found) == list(range(1, len(kept) + 1))
    for age, (value, video, step) in enumerate(reversed(kept), start=1):
        slot = found[age]
        assert queue.keys[slot].tolist() == [value, value]
        assert (int(queue.video_ids[slot]), int(in_steps[slot])) == (video, now - step)
    assert queue.num_filled == len(kept)


def test_negatives_are_filled_and_of_other_videos() -> None:
    """Neither an empty slot nor a key of the query's own video is a negative."""
    queue = KeyQueue(4, 2)
    queue.enqueue(torch.ones(3, 2), torch.tensor([7, 8, 7]), step=0)
    assert queue.negatives_of(torch.tensor([7, 9])).tolist() == [[False, True, False, False], [True, True, True, False]]


def test_newest_keys_have_age_one() -> None:
    """In both units, a key that came in with the last step has the smallest age, 1 (in keys: the last of the batch)."""
    queue = KeyQueue(4, 2)
    queue.enqueue(torch.ones(2, 2), torch.tensor([1, 2]), step=5)
    assert queue.ages(6, unit="step")[:2].tolist() == [1, 1]
    assert queue.ages(6, unit="key")[:2].tolist() == [2, 1]


def test_state_of_another_length_is_refused() -> None:
    """Loading a queue of another length names both shapes."""
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(6, 2\)"):
        KeyQueue(6, 2).load_state_dict(KeyQueue(4, 2).state_dict())


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
    return [
        decay_at(step, settings, total_steps=total_steps, difference=torch.tensor(0.0)) for step in range(total_steps)
    ]


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
    found = [decay_at(3, settings, total_steps=10, difference=torch.tensor(each)) for each in (0.0, 0.02, 2.0)]
    assert found == pytest.approx([1.0, 0.9802, math.exp(-2)], rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step", "adversarial"])
@pytest.mark.parametrize("total_steps", [1, 2])
def test_shortest_runs_have_a_decay(schedule: str, total_steps: int) -> None:
    """Runs of one and two steps divide by nothing, and t stays in (0, 1]."""
    assert all(0 < t <= 1 for t in course(schedule, total_steps=total_steps))
