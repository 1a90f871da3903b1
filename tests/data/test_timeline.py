"""Seams between joined recordings, one line of time, and the container's clock: worked examples."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from vmoco.data.clips import ClipPlan, Int64Array
from vmoco.data.timeline import Timeline, filled, find_cut_in, find_seams, lay_out, on_clock, when_shown

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


def test_missing_stamps_are_filled() -> None:
    """In the middle, and before the first and after the last; not where most are missing."""
    assert filled([]) is not None
    for given, full in (
        ([0, None, 80], [0, 40, 80]),
        ([None, None, 80, 120, 160], [0, 40, 80, 120, 160]),
        ([5, 15, 25, None], [5, 15, 25, 35]),
    ):
        found = filled(given)
        assert found is not None
        assert found.tolist() == full
    assert filled([None, None]) is None
    assert filled([7, None]) is None


def test_a_missing_display_stamp_follows_the_decoding_stamp() -> None:
    """By as much as most others do."""
    decoding = stamps(0, 40, 80, 120, 160)
    assert when_shown([40, 160, None, 160, 200], decoding).tolist() == [40, 160, 120, 160, 200]
    assert when_shown([], stamps()).tolist() == []


def test_seconds_count_on_the_clock_of_the_container() -> None:
    """Pictures that begin a second after the sound: second 2 is one second after the first picture."""
    plan = ClipPlan(8, start_seconds=2.0, end_seconds=3.5)
    film = Timeline(stamps(1000, 1040), stamps(), MILLISECOND, 25.0)
    late = on_clock(plan, film)
    assert (late.start_seconds, late.end_seconds) == (1.0, 2.5)
    # MPEG-TS: pictures and clock begin at 1.4 s.
    equal = on_clock(plan, Timeline(stamps(1400, 1440), stamps(), MILLISECOND, 25.0, origin=Fraction(7, 5)))
    assert (equal.start_seconds, equal.end_seconds) == (2.0, 3.5)
    assert on_clock(ClipPlan(8), film) == ClipPlan(8)
    assert on_clock(plan, Timeline(stamps(), stamps(), MILLISECOND, 25.0)) == plan


@pytest.mark.parametrize(
    ("begins", "keys", "early", "found"),
    [
        (0, (0, 4), 0, []),  # with a key frame
        (0, (2,), 0, [8]),  # without one
        (0, (0, 4), 1, [8]),  # with one, and a frame is shown before it
        (0, (), 0, [8]),  # no key frame at all
        (20_000, (2,), 0, []),  # a gap: the frames before it are there
        (80 - 2**33, (2,), 0, []),  # the clock has reached its largest value
    ],
)
def test_recordings_that_lack_their_first_references(
    begins: int, keys: tuple[int, ...], early: int, found: list[int]
) -> None:
    """Only where another recording begins, and its first frames refer to others; not where one recording goes on."""
    shown = np.array([*range(1000, 1080, 10), *range(begins, begins + 80, 10)], np.int64)
    if early:  # the second packet after the seam is shown before the first one
        shown[9] = shown[8] - 1
    decoding = np.array([*range(990, 1070, 10), *range(begins - 10, begins + 70, 10)], np.int64)
    is_key = [number in (0, 4) for number in range(8)] + [number in keys for number in range(8)]
    assert find_cut_in(shown, decoding, is_key, (8,)) == found
