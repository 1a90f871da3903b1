"""Decides what of a video is decoded: the runs of frames that hold its clips, and which task decodes which of them.

Decoding can begin only at key frames. So a run goes from the last key frame before a clip to the last frame of the
clip, and clips that need the same frames share a run. What lies between two runs is not decoded; of a file in a
store it is not fetched a second time, after probing:

    frames    K . . . . K . . . . K . . . . K . . . . K . . . .
    clips         AAAA              BBBB  CC
    runs      --------            ------------

The runs of a video are one part, and of a long video with many clips several, for several tasks. The clips are chosen
for the complete video before it is split, so they do not depend on the parts. A clip belongs to the part in which it
starts.

Pure functions of time stamps, no pixels. A video whose frames cannot be known before they are decoded has no parts. It
is decoded from its start, and so is one of which little would be left out: then every damaged frame is found. Where
clips are planned shot by shot, they follow from all cuts of the range that is asked for. Then one run holds that range,
or the video is decoded from its start.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from vmoco.data.clips import ClipPlan, Int64Array, in_range
from vmoco.data.timeline import Timeline, on_clock

_LEAST_SPARED = 0.25
"""Share of a video that must be left out. With less, decoding all of it costs little more, and finds all damage."""
_NEAR = 8
"""Frames between two runs that are decoded rather than left out: a decoder has begun with some of them already."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Frames that are decoded one after the other. Times are time stamps in the unit of the video stream."""

    start: int
    """Time of a key frame, the first frame."""
    last: int
    """Time of the last frame."""
    num_frames: int
    """Frames from `start` to `last`, both included."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What one task decodes of a video."""

    runs: list[Run]
    """In order; where a clip reaches from one into the next, both hold its last frames."""
    clips: list[list[int]]
    """Times of the frames of each clip, T each."""
    fps: float
    """Frames per second of the whole video, the mean."""
    stream: int = 0
    """Index of the video stream in the container."""
    shots_from: int | None = None
    """Time of the first frame of the range, where decoding finds the cuts in it, and plans other clips than `clips`."""


def plan_parts(line: Timeline, plan: ClipPlan, *, indices: Int64Array, seconds: float) -> list[Part]:
    """The parts of a video; none where it is decoded from its start to its end.

    Args:
        line: Frames and key frames of the video, as probing found them.
        plan: How clips are cut. Where damaged videos are rejected, every frame of its range is decoded.
        indices: int64 (N, T), frames of the clips.
        seconds: Length of a part: how much of the video it decodes.
    """
    times, begins = line.times, _begins(line)
    if not len(begins) or not len(indices) or len(np.unique(times)) < len(times):
        return []
    firsts, lasts = indices.min(axis=1), indices.max(axis=1)
    inside = in_range(times, line.time_base, on_clock(plan, line))
    stretches = _worthwhile(line, plan, indices) if line.is_exact else []
    sparse = bool(stretches)
    if not sparse:
        stretches = _stretches(inside[:1], inside[-1:], begins)
    parts: list[Part] = []
    lengths: list[float] = []
    for first, end in (piece for stretch in stretches for piece in _pieces(*stretch, line, begins, seconds)):
        own = np.flatnonzero((firsts >= first) & (firsts < end))
        if sparse and not len(own):  # the end of a clip, which belongs to the piece before
            continue
        last = max(end - 1, *lasts[own].tolist()) if len(own) else end - 1
        run = Run(int(times[first]), int(times[last]), last + 1 - first)
        length = float(int(times[last] - times[first]) * line.time_base)
        if not parts or lengths[-1] + length > seconds:
            parts.append(Part([], [], line.fps, line.stream))
            lengths.append(0.0)
        parts[-1].runs.append(run)
        parts[-1].clips.extend(times[indices[own]].tolist())
        lengths[-1] += length
    if plan.split_at_cuts:
        one = sparse and len(parts) == 1
        return [dataclasses.replace(parts[0], shots_from=int(times[inside[0]]))] if one else []
    return parts if sparse or len(parts) > 1 else []


def contradicted(line: Timeline, plan: ClipPlan, *, indices: Int64Array) -> tuple[str, ...]:
    """The note of a video of which frames would be left out, if its index did not contradict its packets."""
    return (decoded_whole(line.contradiction),) if line.contradiction and _worthwhile(line, plan, indices) else ()


def _begins(line: Timeline) -> Int64Array:
    """Numbers of the frames at which decoding can begin, increasing; empty if the first one is not among them."""
    keys = np.unique(line.keyframes)
    known = len(keys) and len(line.times) and keys[0] == line.times[0]
    return np.searchsorted(line.times, keys if known else keys[:0])


def _worthwhile(line: Timeline, plan: ClipPlan, indices: Int64Array) -> list[tuple[int, int]]:
    """The stretches that clips need, as `_stretches`; none where little, or nothing, would be left out."""
    begins = _begins(line)
    if not len(begins) or not len(indices) or plan.damaged == "reject":
        return []
    firsts, lasts = indices.min(axis=1), indices.max(axis=1)
    if plan.split_at_cuts:  # the cuts of the whole range decide
        inside = in_range(line.times, line.time_base, on_clock(plan, line))
        firsts, lasts = inside[:1], inside[-1:]
    found = _stretches(firsts, lasts, begins)
    decoded = sum(last + 1 - first for first, last in found)
    return found if decoded <= (1 - _LEAST_SPARED) * len(line.times) else []


def _stretches(firsts: Int64Array, lasts: Int64Array, begins: Int64Array) -> list[tuple[int, int]]:
    """First and last frame of each stretch that holds clips; each begins with a key frame.

    Args:
        firsts: int64 (N,), first frame of each clip, increasing.
        lasts: int64 (N,), last frame of each clip.
        begins: int64 (K,), the key frames, increasing; the first one is frame 0.
    """
    keys = begins[np.searchsorted(begins, firsts, side="right") - 1]
    found: list[tuple[int, int]] = []
    for key, last in zip(keys.tolist(), lasts.tolist(), strict=True):
        if found and key <= found[-1][1] + _NEAR:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((key, last))
    return found


def _pieces(first: int, last: int, line: Timeline, begins: Int64Array, seconds: float) -> list[tuple[int, int]]:
    """Pieces of a stretch, of about `seconds`, that begin with key frames: the first frame, and that after the last."""
    unit = float(line.time_base)
    total = float(line.times[last] - line.times[first]) * unit
    if total < 1.5 * seconds:
        return [(first, last + 1)]
    own = begins[(begins >= first) & (begins <= last)]
    marks = line.times[first] + np.ceil(np.arange(0, total, seconds) / unit).astype(np.int64)
    at = np.unique(np.searchsorted(line.times[own], marks))
    starts = own[at[at < len(own)]].tolist()
    return list(zip(starts, [*starts[1:], last + 1], strict=True))


def decoded_whole(message: str) -> str:
    """The note of a video that is decoded from its start to its end, because its index does not fit its pictures."""
    return f"decoded-whole: {message.replace('; ', ', ')}"
