"""Decides which frames of a video become clips. Pure functions of time stamps, no pixels."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from vmoco.job_settings import Deinterlace, Hdr

Int64Array = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class ClipPlan:
    """How clips are cut from a video."""

    num_frames: int
    """T, frames of a clip."""
    stride: int = 1
    """Distance between two frames of a clip: in frames of the video, or of `fps` where that is given."""
    max_clips: int = 10**9
    """Largest number of clips, spread evenly."""
    fps: float | None = None
    """Take frames at this rate, by their time stamps; None takes every frame."""
    short: Literal["reject", "loop"] = "reject"
    """A video that is shorter than a clip gives no clip, or one clip that repeats its frames."""
    hdr: Hdr = "tonemap"
    """What to do with HDR frames, as in `IngestSettings`."""
    deinterlace: Deinterlace = "auto"
    """What to do with interlaced frames, as in `IngestSettings`."""
    damaged: Literal["drop-clips", "reject"] = "drop-clips"
    """A damaged video gives the clips without damage, or none."""
    max_damaged_percent: float = 50.0
    """A video of which more is lost gives no clip."""
    split_at_cuts: bool = False
    """Whether the clips of each shot are planned by themselves, so none crosses a cut. Then every frame of the range is
    decoded."""
    start_seconds: float | None = None
    """Take only frames from this time on; None starts with the first frame. `clip_indices` counts from the first frame,
    `timeline.plan_clips` on the container's clock."""
    end_seconds: float | None = None
    """Take only frames before this time; None ends with the last frame."""
    every_seconds: float | None = None
    """Begin a clip after each of these seconds, also where clips overlap, as `sliding.windows` does; None cuts clips
    side by side. `clip_indices` does not read it."""

    def sliding(self, every_seconds: float) -> ClipPlan:
        """The same clips, but for one that begins every so many seconds."""
        return dataclasses.replace(self, every_seconds=every_seconds)


def clip_indices(times: Int64Array, time_base: Fraction, plan: ClipPlan, *, seams: tuple[int, ...] = ()) -> Int64Array:
    """The frames of each clip: int64 (N, T), numbers of frames in the video; N is 0 if there is no clip.

    Args:
        times: int64 (F,), time stamp of each frame in units of `time_base`, in display order.
        time_base: Seconds of one unit.
        plan: How to cut.
        seams: Numbers of the frames at which another recording begins; no clip holds frames of two.
    """
    if seams:
        return _clips_between(times, time_base, plan, seams)
    frames = in_range(times, time_base, plan)
    if plan.fps is not None and len(frames):
        frames = frames[resample(times[frames], time_base, Fraction(str(plan.fps)))]
    starts = start_indices(len(frames), num_frames=plan.num_frames, stride=plan.stride, max_clips=plan.max_clips)
    steps = np.arange(plan.num_frames, dtype=np.int64) * plan.stride
    if not starts and plan.short == "loop" and len(frames):
        return frames[steps % len(frames)][None]
    return frames[np.array(starts, np.int64).reshape(-1, 1) + steps]


def _clips_between(times: Int64Array, time_base: Fraction, plan: ClipPlan, seams: tuple[int, ...]) -> Int64Array:
    """The clips of each recording of a joined video; of too many those that are spread evenly."""
    inside = in_range(times, time_base, plan)
    borders = np.searchsorted(inside, (0, *seams, len(times))).tolist()
    recordings = [inside[low:high] for low, high in itertools.pairwise(borders)]
    unlimited = dataclasses.replace(plan, max_clips=10**9, short="reject", start_seconds=None, end_seconds=None)
    clips = [each[clip_indices(times[each], time_base, unlimited)] for each in recordings]
    found = np.concatenate(clips)
    if not len(found) and plan.short == "loop":
        longest = max(recordings, key=len)
        return longest[clip_indices(times[longest], time_base, dataclasses.replace(unlimited, short="loop"))]
    count = min(plan.max_clips, len(found))
    return found[[(2 * at + 1) * len(found) // (2 * count) for at in range(count)]]


def resample(times: Int64Array, time_base: Fraction, fps: Fraction) -> Int64Array:
    """The frame that is shown at 0, 1/fps, 2/fps ... seconds after the first one, to the end of the last.

    Example: frames at 0, 40, 80, 200 and 240 ms (one frame stands still for 120 ms), fps 20:

        at      0   50  100  150  200  250  ms      the last frame is shown for the mean time of the others
        frame   0    1    2    2    3    4

    Computed in integers, so every machine gets the same frames.
    """
    times = np.maximum.accumulate(times) - times[0]
    mean = Fraction(int(times[-1]), len(times) - 1) if len(times) > 1 else 1 / (fps * time_base)
    seconds = (int(times[-1]) + mean) * time_base
    count = max(1, math.ceil(seconds * fps))
    # The last frame with time * time_base <= k / fps.
    ticks = (np.arange(count, dtype=object) * (1 / (fps * time_base)).numerator) // (1 / (fps * time_base)).denominator
    return (np.searchsorted(times, ticks.astype(np.int64), side="right") - 1).astype(np.int64)


def in_range(times: Int64Array, time_base: Fraction, plan: ClipPlan) -> Int64Array:
    """Numbers of the frames in the plan's range of seconds."""
    if not len(times) or (plan.start_seconds is None and plan.end_seconds is None):
        return np.arange(len(times), dtype=np.int64)
    seconds = (times - times[0]) * float(time_base)
    start = -math.inf if plan.start_seconds is None else plan.start_seconds
    end = math.inf if plan.end_seconds is None else plan.end_seconds
    # A microsecond of tolerance: a list says 1.4, and a frame lies at 1.3999999.
    return np.flatnonzero((seconds >= start - 1e-6) & (seconds < end - 1e-6)).astype(np.int64)


def start_indices(total: int, *, num_frames: int, stride: int, max_clips: int) -> list[int]:
    """First frames of the clips that are cut from a video of `total` frames.

    As many clips as fit side by side, at most `max_clips`. Each lies in the middle of its equal share of the video, so
    clips never overlap, and those of a long video are spread from end to end.

    Example: total=23, num_frames=4, stride=2. A clip of frames 0 2 4 6 spans 7 frames, so three fit (21 of 23):

        frame  0    5    10   15   20
               |....|....|....|....|..
               AAAAAAA.BBBBBBBCCCCCCC.      starts 0, 8, 15

    Args:
        total: Frames of the video.
        num_frames: T, frames of a clip.
        stride: Distance between two frames of a clip, in frames of the video.
        max_clips: Largest number of clips.

    Returns:
        Increasing indices; empty if the video is shorter than one clip.
    """
    span = clip_span(num_frames=num_frames, stride=stride)
    count = min(max_clips, total // span)
    # Clip i lies in the middle of [i * total / count, (i + 1) * total / count); in integers, so it is exact everywhere.
    return [((2 * i + 1) * total - count * span) // (2 * count) for i in range(count)]


def clip_span(*, num_frames: int, stride: int) -> int:
    """Number of frames of the video from the first to the last frame of a clip, including both."""
    return (num_frames - 1) * stride + 1
