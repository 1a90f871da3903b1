"""Which frames the clips of a sliding window take, and when each clip begins.

A clip begins every `ClipPlan.every_seconds`, counted from the first frame of the video, with the frame that is shown
then. Its frames are those that ingest takes at the same frame rate. Clips may overlap, and only complete ones count.

    seconds   0         0.5         1.0         1.5         2.0 end of the video
    clips     |-- 0.8 s --|                                      every_seconds 0.5
                        |-- 0.8 s --|
                                    |-- 0.8 s --|                the fourth one would end after the video

Of joined recordings no clip holds frames of two. The times stay those of one raster over the complete video, so the
features of two encoders, or of a video and its damaged copy, belong to the same times.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from vmoco.data.clips import ClipPlan, Int64Array, clip_indices, clip_span, in_range, resample


@dataclasses.dataclass(frozen=True)
class Windows:
    """The clips of a sliding window, in order."""

    frames: Int64Array
    """int64 (N, T): numbers of the frames of each clip."""
    seconds: npt.NDArray[np.float64]
    """float64 (N,): when each clip begins, as the time stamps of the video count."""


def windows(times: Int64Array, time_base: Fraction, plan: ClipPlan, *, seams: tuple[int, ...] = ()) -> Windows:
    """The clips that begin every `plan.every_seconds`; `plan.max_clips` does not count.

    Args:
        times: int64 (F,), time stamp of each frame in units of `time_base`, in display order.
        time_base: Seconds of one unit.
        plan: How to cut.
        seams: Numbers of the frames at which another recording begins.
    """
    assert plan.every_seconds is not None
    inside = in_range(times, time_base, plan)
    if not len(inside):
        return Windows(np.empty((0, plan.num_frames), np.int64), np.empty(0))
    first, step = int(times[inside[0]]), Fraction(str(plan.every_seconds)) / time_base
    span = clip_span(num_frames=plan.num_frames, stride=plan.stride)
    steps = np.arange(plan.num_frames, dtype=np.int64) * plan.stride
    found, numbers = [], []
    borders = np.searchsorted(inside, (0, *seams, len(times))).tolist()
    for low, high in itertools.pairwise(borders):
        own = inside[low:high]
        if not len(own):
            continue
        taken, places, asked = _begins(times[own], first, step, time_base, plan)
        whole = places + span <= len(taken)
        found.append(own[taken][places[whole][:, None] + steps])
        numbers.append(asked[whole])
    frames, number = np.concatenate(found), np.concatenate(numbers)
    if not len(frames) and plan.short == "loop":
        frames = clip_indices(times, time_base, dataclasses.replace(plan, every_seconds=None, max_clips=1), seams=seams)
        return Windows(frames, (times[frames[:, 0]] * float(time_base)).astype(np.float64))
    return Windows(frames, np.array([float((first + step * at) * time_base) for at in number.tolist()]))


def _begins(
    times: Int64Array, first: int, step: Fraction, time_base: Fraction, plan: ClipPlan
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The frames of one recording at the plan's rate, and the place among them and the number of each clip.

    Computed in integers, as `resample` is, so every machine gets the same frames.
    """
    begin = int(times[0])
    if plan.fps is None:
        taken, end = np.arange(len(times), dtype=np.int64), Fraction(int(times[-1]))
    else:
        rate = Fraction(str(plan.fps)) * time_base
        taken = resample(times, time_base, Fraction(str(plan.fps)))
        end = begin + (len(taken) - 1) / rate
    asked = range(math.ceil((begin - first) / step), math.floor((end - first) / step) + 1)
    at = [first + step * number for number in asked]
    if plan.fps is None:
        places = np.searchsorted(times, np.array([math.floor(time) for time in at], np.int64), side="right") - 1
    else:
        places = np.array([math.floor((time - begin) * rate) for time in at], np.int64)
    return taken, places, np.array(asked, np.int64)
