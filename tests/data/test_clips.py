"""Which frames become clips."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vmoco.data.clips import clip_span, start_indices

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
