"""Which frames become clips."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vmoco.data.clips import ClipPlan, clip_indices, clip_span, resample, start_indices

videos = st.fixed_dictionaries(
    {
        "total": st.integers(0, 5000),
        "num_frames": st.integers(2, 40),
        "stride": st.integers(1, 8),
        "max_clips": st.integers(1, 40),
    }
)


@given(videos)
def test_clips_fit_side_by_side(video: dict[str, int]) -> None:
    """No clip leaves the video or overlaps another, and as many are cut as fit, up to the limit."""
    starts = start_indices(**video)
    span = clip_span(num_frames=video["num_frames"], stride=video["stride"])
    assert len(starts) == min(video["max_clips"], video["total"] // span)
    assert all(later - earlier >= span for earlier, later in pairwise(starts))
    assert all(0 <= start <= video["total"] - span for start in starts)


@given(videos)
def test_clips_are_spread_evenly(video: dict[str, int]) -> None:
    """Each clip lies in the middle of its equal share of the video, to the frame."""
    starts = start_indices(**video)
    span = clip_span(num_frames=video["num_frames"], stride=video["stride"])
    for number, start in enumerate(starts):
        share = Fraction(video["total"], len(starts))
        middle = share * number + share / 2
        assert abs(start + Fraction(span, 2) - middle) < 1


def test_the_worked_example() -> None:
    """The docstring's picture is true."""
    assert start_indices(23, num_frames=4, stride=2, max_clips=9) == [0, 8, 15]


def test_a_video_of_exactly_one_clip_gives_it() -> None:
    """A video as long as a clip gives one, and one frame less gives none."""
    assert start_indices(16, num_frames=16, stride=1, max_clips=9) == [0]
    assert start_indices(15, num_frames=16, stride=1, max_clips=9) == []
    assert start_indices(31, num_frames=16, stride=2, max_clips=9) == [0]
    assert start_indices(30, num_frames=16, stride=2, max_clips=9) == []


def plain_resample(times: list[int], time_base: Fraction, fps: Fraction) -> list[int]:
    """Second by second, as the docstring says."""
    shown = [(time - times[0]) * time_base for time in times]
    mean = shown[-1] / (len(times) - 1) if len(times) > 1 else 1 / fps
    end, at, found = shown[-1] + mean, Fraction(0), []
    while at < end:
        found.append(max(place for place, time in enumerate(shown) if time <= at))
        at += 1 / fps
    return found


@given(
    gaps=st.lists(st.integers(1, 400), max_size=30),
    start=st.integers(-500, 500),
    time_base=st.sampled_from([Fraction(1, 1000), Fraction(1, 90_000), Fraction(1001, 30_000)]),
    fps=st.sampled_from([Fraction(1), Fraction(25), Fraction("29.97"), Fraction("12.5"), Fraction("0.3")]),
)
def test_resampling_is_the_plain_one(gaps: list[int], start: int, time_base: Fraction, fps: Fraction) -> None:
    """At each tick the frame that is then shown, whatever the rate, the gaps and the unit."""
    times = start + np.cumsum([0, *gaps])
    if (times[-1] - times[0]) * time_base * fps > 2000:
        fps = Fraction("0.3")
    assert resample(times, time_base, fps).tolist() == plain_resample(times.tolist(), time_base, fps)


def test_resampling_in_its_docstring() -> None:
    """A frame that stands still is taken more often."""
    times = np.array([0, 40, 80, 200, 240])
    assert resample(times, Fraction(1, 1000), Fraction(20)).tolist() == [0, 1, 2, 2, 3, 4]
    steady = np.arange(0, 2400, 40)
    assert resample(steady, Fraction(1, 1000), Fraction(25)).tolist() == list(range(60))
    assert resample(steady, Fraction(1, 1000), Fraction("12.5")).tolist() == list(range(0, 60, 2))


def test_a_range_takes_only_what_is_shown_in_it() -> None:
    """Frames from the start on and before the end, counted from the first frame, whatever its time stamp."""
    times = 5000 + np.arange(0, 4000, 40)
    plan = ClipPlan(5, start_seconds=1.0, end_seconds=1.4)
    assert clip_indices(times, Fraction(1, 1000), plan).tolist() == [list(range(25, 30)), list(range(30, 35))]
    plan = ClipPlan(5, max_clips=1, fps=12.5, end_seconds=0.4)
    assert clip_indices(times, Fraction(1, 1000), plan).tolist() == [[0, 2, 4, 6, 8]]
    for start, end in ((4.0, None), (-2.0, -1.0), (3.9, 3.95)):
        plan = ClipPlan(5, start_seconds=start, end_seconds=end)
        assert clip_indices(times, Fraction(1, 1000), plan).shape == (0, 5)


def test_short_videos_are_repeated_where_asked() -> None:
    """Frames follow each other over and over, with the stride; no frame at all gives no clip."""
    times = np.arange(3) * 40
    assert clip_indices(times, Fraction(1, 1000), ClipPlan(8)).shape == (0, 8)
    looped = clip_indices(times, Fraction(1, 1000), ClipPlan(8, short="loop"))
    assert looped.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    looped = clip_indices(times, Fraction(1, 1000), ClipPlan(4, stride=2, short="loop"))
    assert looped.tolist() == [[0, 2, 1, 0]]
    assert clip_indices(times[:0], Fraction(1, 1000), ClipPlan(8, short="loop")).shape == (0, 8)


@given(
    total=st.integers(0, 80),
    num_frames=st.integers(2, 20),
    stride=st.integers(1, 4),
    fps=st.sampled_from([None, 7.0, 50.0]),
)
def test_clips_are_those_of_the_start_indices(total: int, num_frames: int, stride: int, fps: float | None) -> None:
    """The frames of all clips lie where `start_indices` puts them on the frames, or on the ticks of the rate."""
    times = np.arange(total) * 40
    plan = ClipPlan(num_frames, stride=stride, max_clips=5, fps=fps)
    frames = list(range(total))
    if fps and total:
        frames = plain_resample(times.tolist(), Fraction(1, 1000), Fraction(str(fps)))
    starts = start_indices(len(frames), num_frames=num_frames, stride=stride, max_clips=5)
    expected = [[frames[start + place * stride] for place in range(num_frames)] for start in starts]
    assert clip_indices(times, Fraction(1, 1000), plan).tolist() == expected


def test_no_clip_crosses_a_seam() -> None:
    """Each recording of a joined video is cut on its own; of too many clips those spread evenly are kept."""
    times, seams = np.arange(50, dtype=np.int64), (20, 27)
    for plan in (ClipPlan(6), ClipPlan(3, stride=2), ClipPlan(6, start_seconds=0.1), ClipPlan(6, fps=25)):
        found = clip_indices(times, Fraction(1, 25), plan, seams=seams)
        assert len(found) == 3 + 1 + 3 if plan.start_seconds is None and plan.stride == 1 else len(found) > 3
        recording = np.searchsorted(seams, found, side="right")
        assert (recording == recording[:, :1]).all()
        first = clip_indices(times[:20], Fraction(1, 25), plan)
        assert np.array_equal(found[: len(first)], first)
    few = clip_indices(times, Fraction(1, 25), ClipPlan(6, max_clips=2), seams=seams)
    assert few[:, 0].tolist() == [
        clip_indices(times, Fraction(1, 25), ClipPlan(6), seams=seams)[at, 0] for at in (1, 5)
    ]
    looped = clip_indices(times, Fraction(1, 25), ClipPlan(30, short="loop"), seams=seams)
    assert looped.tolist() == [[*range(27, 50), *range(27, 34)]]
