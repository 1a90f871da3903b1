"""Seams between joined recordings, one line of time, and the container's clock: worked examples."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from vmoco.data.clips import ClipPlan, Int64Array
from vmoco.data.timeline import find_seams, lay_out, on_clock

MILLISECOND = Fraction(1, 1000)


def stamps(*values: int) -> Int64Array:
    return np.array(values, np.int64)


def test_a_clean_video_keeps_its_stamps() -> None:
    """Increasing stamps, also with a long pause or two equal ones, are one recording and are not changed."""
    for values in ((), (7,), (0, 40, 80), (0, 40, 40, 9000)):
        for restarts in (False, True):
            clean = stamps(*values)
            assert find_seams(clean, MILLISECOND, restarts=restarts) == ()
            assert lay_out(clean, ()) is clean


def test_recordings_follow_each_other() -> None:
    """Stamps that start again, or jump by more than 10 s, begin a recording one frame after the one before."""
    joined = stamps(0, 40, 80, 120, 0, 40, 80, 60_000, 60_040)
    assert find_seams(joined, MILLISECOND, restarts=True) == (4, 7)
    assert lay_out(joined, (4, 7)).tolist() == [0, 40, 80, 120, 160, 200, 240, 280, 320]


def test_formats_that_do_not_restart_have_frames_out_of_order() -> None:
    """There, a frame that is early by a few frames is put in order; one that is early by more begins a recording."""
    early = stamps(1, 3, 4, 2, 7, 8, 6)
    assert find_seams(early, MILLISECOND, restarts=False) == ()
    assert lay_out(early, ()).tolist() == [1, 2, 3, 4, 6, 7, 8]
    again = stamps(*range(0, 4000, 40), *range(0, 400, 40), 60_000)
    assert find_seams(again, MILLISECOND, restarts=False) == (100,)


def test_seconds_count_on_the_clock_of_the_container() -> None:
    """Pictures that begin a second after the sound: second 2 is one second after the first picture."""
    plan = ClipPlan(8, start_seconds=2.0, end_seconds=3.5)
    late = on_clock(plan, first=1000, time_base=MILLISECOND, origin=Fraction(0))
    assert (late.start_seconds, late.end_seconds) == (1.0, 2.5)
    # MPEG-TS: pictures and clock begin at 1.4 s.
    equal = on_clock(plan, first=1400, time_base=MILLISECOND, origin=Fraction(7, 5))
    assert (equal.start_seconds, equal.end_seconds) == (2.0, 3.5)
    assert on_clock(ClipPlan(8), first=1000, time_base=MILLISECOND, origin=Fraction(0)) == ClipPlan(8)
