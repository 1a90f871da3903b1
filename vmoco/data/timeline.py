"""The time stamps of a video as one line of time, as a player shows it.

Seconds count on the clock of the container, which starts with its earliest stream: where sound begins a second before
the pictures, the first picture is shown at second 1, and MPEG-TS that starts at 1.4 s counts from there.

Recordings that were joined byte by byte start their stamps again. As in FFmpeg's players, each goes on where the one
before it ends. The frames around such a seam do not follow each other in time, so no clip may hold both.

    stamps       0 40 80 120   0 40 80          two recordings
    laid out     0 40 80 120 160 200 240        seam at frame 4
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from vmoco.data.clips import ClipPlan, Int64Array, clip_indices, in_range
from vmoco.data.cuts import cuts
from vmoco.data.ledger import VideoError
from vmoco.data.sliding import Windows, windows

_MAX_REORDER = 17
"""Frames: a decoder reorders 16 at most. Where the container has no stamps for showing, they come in decoding order."""
_GAP_SECONDS = 10
"""A longer gap is another recording, in formats whose stamps may start again; the value of FFmpeg's programs."""

_WRAPPED = 2**32
"""Units: where stamps of 33 bits begin again at zero, they fall by more."""


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The frames of a video, found without decoding it: a good estimate, which decoding may correct."""

    times: Int64Array
    """int64 (F,): time stamps of the frames in display order, in units of `time_base`, laid out on one line."""
    keyframes: Int64Array
    """Time stamps of frames at which decoding can begin; empty if the format does not tell."""
    time_base: Fraction
    """Seconds."""
    fps: float
    """Frames per second, the mean over the video."""
    stream: int = 0
    """Index of the video stream in the container."""
    is_exact: bool = False
    """Whether each packet gives exactly one frame, as far as packets tell: then `times` are those of the decoder."""
    origin: Fraction = Fraction(0)
    """Second of the stamps at which the container's clock is zero."""
    seams: tuple[int, ...] = ()
    """Numbers of the frames at which another recording begins."""
    doubtful: tuple[int, ...] = ()
    """Numbers of frames at the end of a recording that may be incomplete, so no clip may hold them."""
    cut_in: tuple[int, ...] = ()
    """Numbers of the packets at which a recording begins whose first frames refer to frames that are not there."""
    cuts: tuple[int, ...] = ()
    """Numbers of the frames at which another shot begins; only decoding finds them."""
    notes: tuple[str, ...] = ()
    """What is unusual, one sentence each, which begins with its kind: `kind: sentence`."""
    expected: tuple[Int64Array, ...] = ()
    """For each recording, int64: time stamps in the file, of the packets of which a frame must come."""
    broken: VideoError | None = None
    """What is wrong with the file, where it is damaged or cut off."""
    contradiction: str = ""
    """Why the file is not taken at its word, where its index would tell each frame: then `is_exact` is False."""


def plan_clips(line: Timeline, plan: ClipPlan) -> Int64Array:
    """The frames of each clip, as `clip_indices`; the plan's seconds count on the container's clock."""
    if plan.every_seconds is not None:
        return plan_windows(line, plan).frames
    return clip_indices(line.times, line.time_base, on_clock(plan, line), seams=_borders(line))


def plan_windows(line: Timeline, plan: ClipPlan) -> Windows:
    """The clips of a sliding window, as `sliding.windows`; the plan's range counts on the container's clock."""
    return windows(line.times, line.time_base, on_clock(plan, line), seams=_borders(line))


def _borders(line: Timeline) -> tuple[int, ...]:
    """Numbers of the frames between which no clip may lie: at seams and cuts, and around doubtful frames."""
    doubtful = {*line.doubtful, *(number + 1 for number in line.doubtful)}
    return tuple(sorted({*line.seams, *line.cuts, *doubtful} - {len(line.times)}))


def with_cuts(line: Timeline, plan: ClipPlan, changes: Sequence[float]) -> Timeline:
    """The line with the cuts in the plan's range; frames outside it have no say.

    Args:
        line: Frames of the video.
        plan: How clips are cut.
        changes: (F,), how much each frame differs from the one before.
    """
    inside = in_range(line.times, line.time_base, on_clock(plan, line))
    found = cuts([changes[number] for number in inside[1:].tolist()])
    return dataclasses.replace(line, cuts=tuple(inside[found].tolist()))


def new_shots(line: Timeline, firsts: Int64Array, *, unseen: Int64Array | None = None) -> tuple[int, ...]:
    """Numbers of the clips before which another shot, or another recording, is known to begin.

    Example: cuts before frames 9 and 30, and clips that begin with frames 10, 18, 26 give 0 and 3: the first cut lies
    before clip 0, the second after the last clip, so it concerns the clip that would follow.

    Args:
        line: Frames of the video, with the cuts that are known.
        firsts: int64 (N,), first frame of each clip, increasing.
        unseen: int64, frames that are lost where all others were looked at: a cut may lie there, so they count as one.
    """
    lost = [] if unseen is None else unseen.tolist()
    borders = np.array(sorted({*line.cuts, *line.seams, *lost}), np.int64)
    return tuple(np.unique(np.searchsorted(firsts, borders)).tolist())


def on_clock(plan: ClipPlan, line: Timeline) -> ClipPlan:
    """The plan with its seconds counted from the first frame, where they count on the container's clock."""
    if not len(line.times):
        return plan
    late = float(int(line.times[0]) * line.time_base - line.origin)
    start, end = plan.start_seconds, plan.end_seconds
    return dataclasses.replace(
        plan,
        start_seconds=None if start is None else start - late,
        end_seconds=None if end is None else end - late,
    )


def filled(stamps: Sequence[int | None]) -> Int64Array | None:
    """Stamps with the missing ones in the middle between their neighbours; None if most are missing.

    Args:
        stamps: of frames in display order, or of packets in decoding order.
    """
    numbers = np.array([number for number, stamp in enumerate(stamps) if stamp is not None], np.int64)
    known = np.array([stamp for stamp in stamps if stamp is not None], np.int64)
    if len(known) == len(stamps):
        return known
    if 2 * len(known) <= len(stamps):
        return None
    line = np.interp(np.arange(len(stamps)), numbers, known).round().astype(np.int64)
    line[numbers] = known
    step, last = _step(np.diff(known)), int(numbers[-1])
    line[: numbers[0]] -= step * np.arange(numbers[0], 0, -1)
    line[last + 1 :] += step * np.arange(1, len(stamps) - last)
    return line


def when_shown(stamps: Sequence[int | None], decoding: Int64Array) -> Int64Array:
    """When each packet is shown; where its stamp is missing, it is as much later than decoding as others are.

    Args:
        stamps: in decoding order.
        decoding: int64 (F,), when each packet is decoded.
    """
    later = [at - each for at, each in zip(stamps, decoding.tolist(), strict=True) if at is not None]
    guess = decoding + int(np.median(later or 0))
    return np.array([each if at is None else at for at, each in zip(stamps, guess.tolist(), strict=True)], np.int64)


def joined_note(seams: tuple[int, ...]) -> tuple[str, ...]:
    """The note of a video that consists of several recordings."""
    return (f"joined: {len(seams) + 1} recordings, one after the other",) if seams else ()


def shots_note(line: Timeline) -> tuple[str, ...]:
    """The note of a video that consists of several shots."""
    return (f"cuts: {len(line.cuts) + 1} shots, and no clip holds frames of two",) if line.cuts else ()


def find_seams(stamps: Int64Array, time_base: Fraction, *, restarts: bool) -> tuple[int, ...]:
    """Numbers of the frames at which another recording begins.

    Args:
        stamps: int64 (F,), in display order or in decoding order.
        time_base: Seconds of one unit.
        restarts: Whether the format allows that stamps start again (MPEG-TS, MPEG-PS). In other formats a frame that
            is a little early is only out of order.
    """
    steps = np.diff(stamps)
    if not len(steps) or (steps.min() >= 0 and not restarts):
        return ()
    seams = steps < (0 if restarts else -_MAX_REORDER * _step(steps))
    if restarts:
        seams |= steps * float(time_base) > _GAP_SECONDS
    return tuple((np.flatnonzero(seams) + 1).tolist())


def find_cut_in(stamps: Int64Array, decoding: Int64Array, keys: Sequence[bool], seams: tuple[int, ...]) -> list[int]:
    """Seams after which frames refer to frames that are not there: a decoder takes those of the recording before.

    Such a recording begins without a key frame, or frames are shown before it. Where time goes on after a gap, or the
    stamps have reached their largest value and begin again at zero, the frames before the seam are the right ones.

    Args:
        stamps: int64 (F,), when each packet is shown, in decoding order.
        decoding: int64 (F,), when each packet is decoded.
        keys: Whether decoding can begin at each packet.
        seams: Numbers of the packets at which another recording begins.
    """
    found = []
    for seam, end in itertools.pairwise((*seams, len(stamps))):
        if not 0 < decoding[seam - 1] - decoding[seam] < _WRAPPED:
            continue
        later = itertools.takewhile(lambda number: not keys[number], range(seam + 1, end))
        if not keys[seam] or any(stamps[number] < stamps[seam] for number in later):
            found.append(seam)
    return found


def in_display_order(stamps: Int64Array, seams: tuple[int, ...]) -> tuple[Int64Array, Int64Array]:
    """The times of packets in display order on one line, and the place of each packet there.

    Args:
        stamps: int64 (F,), when each packet is shown, in decoding order.
        seams: Numbers of the packets at which another recording begins.
    """
    recording = np.searchsorted(seams, np.arange(len(stamps)), side="right")
    order = np.lexsort((stamps, recording))
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return lay_out(stamps[order], seams), places


def lay_out(stamps: Int64Array, seams: tuple[int, ...]) -> Int64Array:
    """The stamps as one increasing line of time, without the gaps at the seams.

    Args:
        stamps: int64 (F,), one for each frame in display order.
        seams: Numbers of the frames at which another recording begins.
    """
    if not seams and (np.diff(stamps) >= 0).all():
        return stamps
    line = stamps.copy()
    for start, end in zip((0, *seams), (*seams, len(stamps)), strict=True):
        line[start:end] = np.sort(stamps[start:end])
        if start:
            line[start:end] += line[start - 1] + _step(np.diff(line[:start])) - line[start]
    return line


def _step(steps: Int64Array) -> int:
    """The usual distance of two frames."""
    ahead = steps[steps > 0]
    return int(np.median(ahead)) if len(ahead) else 1
