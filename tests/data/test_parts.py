"""Parts of a long video, as numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vmoco.data.clips import ClipPlan, Part, clip_indices, split

MILLISECONDS = Fraction(1, 1000)


def parts_of(times: Any, keyframes: Any, plan: ClipPlan, seconds: float) -> list[Part]:
    indices = clip_indices(times, MILLISECONDS, plan)
    return split(times, keyframes, MILLISECONDS, indices=indices, plan=plan, seconds=seconds, fps=25.0)


@given(
    total=st.integers(2, 400),
    every=st.integers(1, 90),
    seconds=st.floats(0.5, 8),
    num_frames=st.integers(2, 16),
    first=st.integers(-1000, 1000),
)
def test_parts_are_a_partition(total: int, every: int, seconds: float, num_frames: int, first: int) -> None:
    """Every frame is in one part, every clip in that where it starts; parts begin with key frames."""
    times = first + np.arange(total) * 40
    keyframes = times[::every]
    plan = ClipPlan(num_frames)
    parts = parts_of(times, keyframes, plan, seconds)
    if not parts:
        assert len(keyframes) < 2 or total * 0.04 < 1.5 * seconds + every * 0.04
        return
    assert len(parts) >= 2
    assert sum(part.num_frames for part in parts) == total
    assert {part.start for part in parts} <= set(keyframes.tolist())
    assert [part.end for part in parts] == [*[part.start for part in parts[1:]], None]
    clips = [clip for part in parts for clip in part.clips]
    assert clips == times[clip_indices(times, MILLISECONDS, plan)].tolist()
    for part in parts:
        assert all(part.start <= clip[0] < (part.end or np.inf) for clip in part.clips)


def test_parts_outside_the_range_are_left_out() -> None:
    """Of a range only the parts are decoded that have a share in it."""
    times = np.arange(0, 100_000, 40)
    keyframes = times[::25]
    parts = parts_of(times, keyframes, ClipPlan(16, start_seconds=25, end_seconds=41), 10)
    assert [(part.start, part.end) for part in parts] == [(20_000, 30_000), (30_000, 40_000), (40_000, 50_000)]
    assert sum(len(part.clips) for part in parts) == 25


def test_what_cannot_be_split_is_not() -> None:
    """Without key frames, with frames before the first one, or not much longer than a part."""
    times = np.arange(0, 100_000, 40)
    assert parts_of(times[:0], times[:0], ClipPlan(16), 10) == []
    assert parts_of(times, times[:0], ClipPlan(16), 10) == []
    assert parts_of(times, times[:1], ClipPlan(16), 10) == []
    assert parts_of(times, times[25::25], ClipPlan(16), 10) == []
    assert parts_of(times, times[::25], ClipPlan(16), 70) == []
