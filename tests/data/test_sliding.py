"""A clip begins at regular times, with the frame that is shown then: worked examples."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from vmoco.data.clips import ClipPlan, resample
from vmoco.data.sliding import windows
from vmoco.data.timeline import Timeline, plan_clips, plan_windows

MILLISECOND = Fraction(1, 1000)


def test_a_clip_begins_with_the_frame_that_is_shown() -> None:
    """Every frame is taken, 40 ms apart: at 100 ms frame 2 is shown, which came at 80 ms. The last clip is complete."""
    found = windows(np.arange(10, dtype=np.int64) * 40, MILLISECOND, ClipPlan(3, every_seconds=0.1))
    assert found.frames.tolist() == [[0, 1, 2], [2, 3, 4], [5, 6, 7], [7, 8, 9]]
    assert found.seconds.tolist() == [0.0, 0.1, 0.2, 0.3]
    late = windows(np.arange(10, dtype=np.int64) * 40 + 1400, MILLISECOND, ClipPlan(3, every_seconds=0.1))
    assert late.frames.tolist() == found.frames.tolist()
    assert late.seconds.tolist() == [1.4, 1.5, 1.6, 1.7]


@pytest.mark.parametrize("step", [20, 33, 40, 100])
def test_frames_are_those_of_ingest(step: int) -> None:
    """At a rate of 25, a clip is a slice of what ingest takes, also where frames are repeated because there are few."""
    times = np.arange(60, dtype=np.int64) * step
    taken = resample(times, MILLISECOND, Fraction(25))
    found = windows(times, MILLISECOND, ClipPlan(4, fps=25.0, every_seconds=0.06))
    starts = [number * 6 * 25 // 100 for number in range(len(taken)) if number * 6 * 25 // 100 + 4 <= len(taken)]
    assert found.frames.tolist() == [taken[start : start + 4].tolist() for start in starts]
    np.testing.assert_allclose(found.seconds, np.arange(len(starts)) * 0.06)


def test_a_still_picture_keeps_the_times_regular() -> None:
    """Where a frame stands still for a second, the clips that begin meanwhile show it and what comes after it."""
    times = np.array([0, 40, 80, 1080, 1120, 1160, 1200], np.int64)
    found = windows(times, MILLISECOND, ClipPlan(2, every_seconds=0.5))
    assert found.frames.tolist() == [[0, 1], [2, 3], [2, 3]]
    assert found.seconds.tolist() == [0.0, 0.5, 1.0]


def test_no_clip_crosses_a_seam() -> None:
    """The times go on over both recordings; clips that would hold frames of two, or doubtful ones, are left out."""
    times = np.arange(20, dtype=np.int64) * 40
    found = windows(times, MILLISECOND, ClipPlan(4, every_seconds=0.08), seams=(9,))
    assert found.frames[:, 0].tolist() == [0, 2, 4, 10, 12, 14, 16]
    assert found.seconds.tolist() == [0.0, 0.08, 0.16, 0.4, 0.48, 0.56, 0.64]
    at_rate = windows(times, MILLISECOND, ClipPlan(4, fps=25.0, every_seconds=0.08), seams=(9,))
    assert at_rate.frames.tolist() == found.frames.tolist()
    line = Timeline(times, np.empty(0, np.int64), MILLISECOND, 25.0, seams=(9,), doubtful=(7, 8))
    doubtful = plan_clips(line, ClipPlan(4, every_seconds=0.08))
    assert doubtful[:, 0].tolist() == [0, 2, 10, 12, 14, 16]
    assert plan_windows(line, ClipPlan(4, every_seconds=0.08)).frames.tolist() == doubtful.tolist()


def test_a_short_video() -> None:
    """No clip, or one that repeats its frames; the same for a video without frames."""
    times = np.arange(3, dtype=np.int64) * 40 + 80
    plan = ClipPlan(5, every_seconds=0.1)
    assert windows(times, MILLISECOND, plan).frames.shape == (0, 5)
    looped = windows(times, MILLISECOND, ClipPlan(5, every_seconds=0.1, short="loop"))
    assert looped.frames.tolist() == [[0, 1, 2, 0, 1]]
    assert looped.seconds.tolist() == [0.08]
    assert windows(times[:0], MILLISECOND, plan).frames.shape == (0, 5)


def test_a_range_of_the_video() -> None:
    """The window slides over the frames from 0.2 s to 0.48 s, and begins with the first of these."""
    plan = ClipPlan(2, every_seconds=0.1, start_seconds=0.2, end_seconds=0.48)
    found = windows(np.arange(20, dtype=np.int64) * 40, MILLISECOND, plan)
    assert found.frames.tolist() == [[5, 6], [7, 8], [10, 11]]
    np.testing.assert_allclose(found.seconds, [0.2, 0.3, 0.4])
