"""The ring of keys behaves like a plain list of which only the last K entries count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vmoco.model.queue import KeyQueue


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
