"""Parts of a long video: stretches from one key frame to another that different tasks decode. Pure: no pixels.

Which clips are cut is decided for the whole video before it is split, so they do not depend on the parts. A clip
belongs to the part in which it starts; its last frames may lie in the next one, and are then decoded by both.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np

from vmoco.data.clips import ClipPlan, Int64Array


@dataclasses.dataclass(frozen=True)
class Part:
    """What one task decodes of a long video. Times are time stamps in the unit of the video stream."""

    start: int
    """Time of a key frame, the first frame of the part."""
    end: int | None
    """Time of the first frame of the next part; None at the end of the video."""
    num_frames: int
    """Frames from `start` to `end`."""
    clips: list[list[int]]
    """Times of the frames of each clip, T each."""
    fps: float
    """Frames per second of the whole video, the mean."""


def split(
    times: Int64Array,
    keyframes: Int64Array,
    time_base: Fraction,
    *,
    indices: Int64Array,
    plan: ClipPlan,
    seconds: float,
    fps: float,
) -> list[Part]:
    """Splits a video into parts of about `seconds`; one part, or none, where it cannot or need not be split.

    Args:
        times: int64 (F,), time stamps of the frames, increasing.
        keyframes: int64, time stamps of those at which decoding can begin.
        time_base: Seconds of one unit.
        indices: int64 (N, T), frames of the clips.
        plan: Parts outside its range are left out.
        seconds: Length of a part.
        fps: Frames per second of the video.
    """
    if len(keyframes) < 2 or keyframes[0] != times[0]:
        return []
    total = float((times[-1] - times[0]) * time_base)
    if total < 1.5 * seconds:
        return []
    marks = times[0] + np.arange(0, total, seconds) / float(time_base)
    at = np.unique(np.searchsorted(keyframes, np.ceil(marks).astype(np.int64)))
    starts = [int(keyframes[place]) for place in at if place < len(keyframes)]
    if len(starts) < 2:
        return []
    parts = []
    firsts = times[indices[:, 0]] if len(indices) else np.empty(0, np.int64)
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        below = np.inf if end is None else end
        own = indices[(firsts >= start) & (firsts < below)]
        count = int(((times >= start) & (times < below)).sum())
        if _overlaps(start, end, int(times[0]), time_base, plan):
            parts.append(Part(start, end, count, times[own].tolist(), fps))
    return parts


def _overlaps(start: int, end: int | None, first: int, time_base: Fraction, plan: ClipPlan) -> bool:
    after = plan.end_seconds is not None and (start - first) * time_base >= plan.end_seconds
    before = plan.start_seconds is not None and end is not None and (end - first) * time_base <= plan.start_seconds
    return not (after or before)
