"""Cuts the clips of a video: decodes the frames of the clips, and hands them to a sink.

A video is read twice: once without decoding, which finds time stamps and truncated files (`probing.py`), and once
decoding, which keeps only the frames of the chosen clips. So memory holds one decoded frame and one clip, however long
the video is. Where the container can seek, only the runs of frames around the clips are decoded (`parts.py`). If one of
them does not hold exactly the frames that the file lists, the video is decoded from its start instead.

The cuts between shots are found by decoding. So a plan that splits at them decodes all of its range, and a video with
cuts twice: clips that were planned without them are cut again.

What a decoder conceals is not footage: where it reports damage, `damage.py` finds the clips that have none.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from vmoco.data import damage, ledger, reports
from vmoco.data.clips import ClipPlan, Int64Array, clip_span
from vmoco.data.collector import Collector, Sink
from vmoco.data.container import CutOffError, stamps_restart
from vmoco.data.cuts import Watcher
from vmoco.data.ledger import NOT_SEEKABLE, Damage, VideoError
from vmoco.data.opening import Source, decoded, errors, open_video, video_stream
from vmoco.data.parts import Part, Run, contradicted, decoded_whole, plan_parts
from vmoco.data.pixels import is_interlaced
from vmoco.data.probing import probe
from vmoco.data.timeline import (
    Timeline,
    filled,
    find_seams,
    joined_note,
    lay_out,
    new_shots,
    plan_clips,
    plan_windows,
    shots_note,
    with_cuts,
)


@dataclasses.dataclass(frozen=True)
class Cut:
    """The clips of a video or part, without their pixels, which went to the sink."""

    start_times: list[int]
    """Time stamp of the first frame of each clip, in the video's own unit."""
    start_seconds: list[float]
    """The same in seconds; of a sliding window, when each clip begins."""
    fps: float
    """Frames per second of the video."""
    notes: tuple[str, ...] = ()
    """What was done to the frames beyond scaling, and whether any are lost, as in `Timeline.notes`."""
    damage: Damage | None = None
    """What of the video is lost."""
    new_shots: tuple[int, ...] = ()
    """Numbers of the clips before which another shot is known to begin, as `timeline.new_shots`."""


def cut_clips(source: Source, plan: ClipPlan, *, height: int, width: int, sink: Sink) -> Cut:
    """Decodes the clips of a video, scaled to cover height x width and cropped in the middle.

    Raises:
        VideoError: the video is too short, or too damaged for the plan.
    """
    line = probe(source, damaged=plan.damaged)
    indices = plan_clips(line, plan)
    parts = plan_parts(line, plan, indices=indices, seconds=math.inf)
    if not parts:
        cut = _cut_from_start(source, plan, line, height=height, width=width, sink=sink)
        return dataclasses.replace(cut, notes=(*contradicted(line, plan, indices=indices), *cut.notes))
    try:
        cut = cut_part(source, parts[0], plan, height=height, width=width, sink=sink)
    except VideoError as error:
        if error.reason != NOT_SEEKABLE:
            raise
        cut = _cut_from_start(source, plan, line, height=height, width=width, sink=sink)
        return dataclasses.replace(cut, notes=(decoded_whole(error.message), *cut.notes))
    return cut if plan.split_at_cuts else _cut_at(indices, line, plan, cut.notes)


def cut_whole(source: Source, plan: ClipPlan, *, height: int, width: int, sink: Sink) -> Cut:
    """The clips that `cut_clips` gives, by decoding every frame.

    Raises:
        VideoError: the video is too short, or too damaged for the plan.
    """
    line = probe(source, damaged=plan.damaged)
    return _cut_from_start(source, plan, line, height=height, width=width, sink=sink)


def _cut_from_start(source: Source, plan: ClipPlan, line: Timeline, *, height: int, width: int, sink: Sink) -> Cut:
    broken = line.broken
    if not broken:
        try:
            return _cut_undamaged(source, plan, line, height=height, width=width, sink=sink)
        except VideoError as error:
            if plan.damaged == "reject" or error.reason not in ledger.DAMAGE:
                raise
            broken = error
    return _cut_sound(source, plan, line, broken, height=height, width=width, sink=sink)


def _cut_undamaged(source: Source, plan: ClipPlan, line: Timeline, *, height: int, width: int, sink: Sink) -> Cut:
    """The clips of a video without damage."""
    indices = plan_clips(line, plan)
    # A codec may hold back or hide frames, so the estimate can be wrong; the second round uses the decoder's own times
    # and the cuts that the first one saw. If they differ again, decoding is not repeatable.
    watcher = Watcher() if plan.split_at_cuts else None
    for number in range(3):
        sink.restart()
        watching = None if number else watcher
        collector = Collector(indices, sink, plan, height=height, width=width, watcher=watching)
        with errors("decode", "decode-error") as log, open_video(source) as container:
            found = _decode(container, collector, line, log)
        if watcher:
            found = with_cuts(found, plan, watcher.changes(range(len(found.times))))
        indices, before = plan_clips(found, plan), indices
        if np.array_equal(indices, before):
            break
    else:
        raise VideoError("decode", "decode-error", f"the frames change between two readings: {len(found.times)}")
    if not len(indices):
        raise too_short(found, plan)
    notes = () if line.seams else joined_note(found.seams)
    return _cut_at(indices, found, plan, (*notes, *shots_note(found), *collector.notes))


def too_short(line: Timeline, plan: ClipPlan) -> VideoError:
    """The error of a video in which no clip has room."""
    ranged = "" if plan.start_seconds is None and plan.end_seconds is None else " in the range that was asked for"
    span = clip_span(num_frames=plan.num_frames, stride=plan.stride)
    rate = f" at {plan.fps:g} frames per second" if plan.fps else ""
    if not line.cuts:
        message = f"{len(line.times)} frames{ranged}, and a clip spans {span}{rate}"
        return VideoError("clip", "too-few-frames", message)
    message = f"each of its {len(line.cuts) + 1} shots{ranged} is shorter than a clip, which spans {span} frames{rate}"
    return VideoError("clip", "cuts", f"{message}: --at-cuts keep takes clips across cuts, and shorter clips may fit")


def _cut_sound(
    source: Source, plan: ClipPlan, line: Timeline, broken: VideoError, *, height: int, width: int, sink: Sink
) -> Cut:
    """The clips of a damaged video that hold no damaged frame."""
    with errors("decode", "decode-error") as log, open_video(source) as container:
        found = damage.survey(container, video_stream(container, line.stream), log, line)
    promised = broken.promised if isinstance(broken, CutOffError) else None
    lost = damage.assess(found, plan, promised=promised, message=broken.message)
    if lost.percent > plan.max_damaged_percent:
        raise VideoError(broken.stage, broken.reason, f"more than {plan.max_damaged_percent:g} %: {lost}")
    if not found.ordered:
        raise VideoError("clip", "bad-timestamps", f"time stamps do not increase, and {lost}")
    if plan.split_at_cuts:
        watcher = Watcher()
        nothing = np.empty((0, plan.num_frames), np.int64)
        _take_sound(source, plan, found, nothing, height=height, width=width, sink=sink, watcher=watcher)
        shots = with_cuts(found.line, plan, watcher.changes(found.frames.tolist()))
        found = dataclasses.replace(found, line=shots)
    planned = plan_clips(found.line, plan)
    sound = found.is_sound(planned)
    indices = planned[sound]
    if not len(planned) and found.line.cuts:
        raise too_short(found.line, plan)
    if not len(indices):
        raise VideoError(broken.stage, broken.reason, f"no clip is without damage: {lost}")
    collector = _take_sound(source, plan, found, indices, height=height, width=width, sink=sink)
    notes = (*shots_note(found.line), *collector.notes)
    unseen = np.flatnonzero(found.frames < 0) if plan.split_at_cuts else None
    if found.damaged and not lost.lost:  # not in the range that was asked for
        return _cut_at(indices, found.line, plan, notes, kept=sound, unseen=unseen)
    kind = "cut-off" if promised is not None else "damaged"
    note = f"{kind}: {lost.percent:.1f} % of it is lost"
    cut = _cut_at(indices, found.line, plan, (note, *notes), kept=sound, unseen=unseen)
    return dataclasses.replace(cut, damage=lost)


def _take_sound(
    source: Source,
    plan: ClipPlan,
    found: damage.Survey,
    indices: Int64Array,
    *,
    height: int,
    width: int,
    sink: Sink,
    watcher: Watcher | None = None,
) -> Collector:
    """Decodes the sound frames of a damaged video once more, and hands the chosen clips to the sink."""
    sink.restart()
    collector = Collector(found.frames[indices], sink, plan, height=height, width=width, watcher=watcher)
    with errors("decode", "decode-error") as log, open_video(source) as container:
        stream = video_stream(container, found.line.stream)
        collector.scaler.pixel_aspect = stream.sample_aspect_ratio
        damage.take_again(container, stream, log, collector=collector, found=found)
    assert collector.complete, found
    return collector


def _cut_at(
    indices: Int64Array,
    line: Timeline,
    plan: ClipPlan,
    notes: tuple[str, ...],
    *,
    kept: npt.NDArray[np.bool_] | slice = slice(None),
    unseen: Int64Array | None = None,
) -> Cut:
    """`kept` tells which of the planned clips `indices` are; `unseen` is as in `timeline.new_shots`."""
    firsts, starts = indices[:, 0], line.times[indices[:, 0]]
    if ((np.diff(starts) < 0) | ((np.diff(starts) == 0) & (np.diff(firsts) > 0))).any():
        raise VideoError("clip", "bad-timestamps", "time stamps do not increase from clip to clip")
    seconds = [float(at * line.time_base) for at in starts.tolist()]
    if plan.every_seconds is not None:
        seconds = plan_windows(line, plan).seconds[kept].tolist()
    return Cut(starts.tolist(), seconds, line.fps, notes, new_shots=new_shots(line, firsts, unseen=unseen))


def cut_part(source: Source, part: Part, plan: ClipPlan, *, height: int, width: int, sink: Sink) -> Cut:
    """Decodes the runs of a part of a video: its clips have the pixels that `cut_whole` gives.

    Raises:
        VideoError: NOT_SEEKABLE, if a run does not hold exactly the planned frames; another reason, if the file cannot
            be read for now.
    """
    if part.shots_from is None:
        return _cut_runs(source, part, plan, height=height, width=width, sink=sink)[0]
    watcher = Watcher()
    cut, time_base = _cut_runs(source, part, plan, height=height, width=width, sink=sink, watcher=watcher)
    times = np.array([name for name in watcher.names if name >= part.shots_from], np.int64)
    line = Timeline(times, times[:0], time_base, part.fps)
    unranged = dataclasses.replace(plan, start_seconds=None, end_seconds=None)  # the run ends with the range
    line = with_cuts(line, unranged, watcher.changes(times.tolist()))
    indices = plan_clips(line, unranged)
    clips = times[indices].tolist()
    if not clips:
        raise too_short(line, plan)
    if clips != part.clips:
        part = dataclasses.replace(part, clips=clips)
        cut, _ = _cut_runs(source, part, plan, height=height, width=width, sink=sink)
    return dataclasses.replace(cut, notes=(*shots_note(line), *cut.notes), new_shots=new_shots(line, indices[:, 0]))


def _cut_runs(
    source: Source,
    part: Part,
    plan: ClipPlan,
    *,
    height: int,
    width: int,
    sink: Sink,
    watcher: Watcher | None = None,
) -> tuple[Cut, Fraction]:
    """The clips that a part names, and the seconds of one unit of its times."""
    try:
        with errors("decode", NOT_SEEKABLE) as log, open_video(source) as container:
            wanted = np.array(part.clips or np.empty((0, 0)), np.int64)
            collector = Collector(wanted, sink, plan, height=height, width=width, watcher=watcher)
            sink.restart()
            stream = video_stream(container, part.stream)
            collector.scaler.pixel_aspect = stream.sample_aspect_ratio
            for run in part.runs:
                _decode_run(container, stream, run, collector, log, whole=plan.deinterlace == "auto")
    except VideoError as error:
        # A store that fails for a while says nothing about the video: the whole would be noted for good.
        if error.transient or error.reason == "hdr":
            raise
        raise VideoError("decode", NOT_SEEKABLE, error.message) from None
    if not collector.complete:
        raise VideoError("decode", NOT_SEEKABLE, "frames of clips are not among those that were decoded")
    starts = [clip[0] for clip in part.clips]
    seconds = [float(start * stream.time_base) for start in starts]
    return Cut(starts, seconds, part.fps, collector.notes), stream.time_base


def _decode(container: Any, collector: Collector, line: Timeline, log: list[Any]) -> Timeline:
    """Decodes a complete video; returns the line with the times that its frames really have."""
    stream = video_stream(container, line.stream)
    collector.scaler.pixel_aspect = stream.sample_aspect_ratio
    times: list[int | None] = []
    for frame in decoded(container, stream, log, seams=line.seams):
        if frame.is_corrupt:
            raise VideoError("decode", "decode-error", f"frame {len(times)} is damaged")
        if len(times) in line.seams:
            collector.flush()
        collector.take(len(times), frame)
        times.append(frame.pts)
    collector.flush()
    stamps, time_base = filled(times), stream.time_base
    if stamps is None:  # frames are counted
        stamps, time_base = np.arange(len(times)), line.time_base
    seams = find_seams(stamps, time_base, restarts=stamps_restart(container))
    if len(line.expected) == len(seams) + 1:
        for expected, shown in zip(line.expected, np.split(stamps, seams), strict=True):
            if len(shown) < len(expected) and len(lost := reports.never_shown(expected, shown)):
                at = float(lost[0] * time_base)
                raise VideoError(
                    "decode", "decode-error", f"{len(lost)} frames never came, the first one at {at:.2f} s"
                )
    return dataclasses.replace(line, times=lay_out(stamps, seams), time_base=time_base, seams=seams)


def _decode_run(container: Any, stream: Any, run: Run, collector: Collector, log: list[Any], *, whole: bool) -> None:
    """`whole` refuses interlaced frames: deinterlacing the first one needs the frame before the run."""
    container.seek(run.start, stream=stream, backward=True)
    count = 0
    for frame in decoded(container, stream, log, begin=run.start):
        if frame.pts is None:
            raise VideoError("decode", NOT_SEEKABLE, "a frame has no time stamp")
        if whole and is_interlaced(frame):
            raise VideoError("decode", NOT_SEEKABLE, "interlaced frames are deinterlaced from the start")
        if frame.pts < run.start:  # displayed before the run, or the seek went back further
            continue
        if frame.is_corrupt or (not count and not (frame.pts == run.start and frame.key_frame)):
            raise VideoError("decode", NOT_SEEKABLE, f"decoding does not begin at {run.start}")
        if frame.pts > run.last:
            break
        count += 1
        collector.take(frame.pts, frame)
        if frame.pts == run.last:
            break
    if count != run.num_frames:
        message = f"{count} frames from {run.start} to {run.last}, and should be {run.num_frames}"
        raise VideoError("decode", NOT_SEEKABLE, message)
