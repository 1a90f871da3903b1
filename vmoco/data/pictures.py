"""Cuts clips from a folder of numbered pictures, as from a video without loss that has these frames at that rate.

Each picture is decoded alone, so only those of the chosen clips are read. A picture that cannot be decoded, or that is
missing, is a damaged frame: no clip holds it. Where one of the chosen ones is damaged, all are decoded, so that the
ledger names every second that is lost, as for a video. Where clips are planned shot by shot, all are decoded before, to
find the cuts.
"""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt

from vmoco.data import damage
from vmoco.data.clips import ClipPlan, Int64Array, clip_span, in_range
from vmoco.data.collector import Collector, Sink
from vmoco.data.cuts import Watcher
from vmoco.data.frame_folder import Frames, contents, frames_of
from vmoco.data.ledger import NOT_SEEKABLE, VideoError
from vmoco.data.opening import errors
from vmoco.data.parts import Part
from vmoco.data.pixels import MAX_PIXELS
from vmoco.data.reports import report_in
from vmoco.data.source import PictureFolder
from vmoco.data.timeline import Timeline, new_shots, plan_clips, shots_note, with_cuts
from vmoco.data.video import Cut, too_short

_CODECS = {"jpeg": "mjpeg", "png": "png"}
# FFmpeg shows a JPEG file without its last bytes with a warning, which in a recording may mean nothing.
_CUT_OFF = re.compile("EOI missing")


def probe(folder: PictureFolder, *, damaged: Literal["drop-clips", "reject"] = "drop-clips") -> Timeline:
    """Lists the pictures of a folder, without reading them.

    Raises:
        VideoError: it cannot be read or has changed; or pictures are missing, and damaged videos are rejected.
    """
    line = _line(folder, frames_of(folder))
    if line.broken and damaged == "reject":
        raise line.broken
    return line


def cut(folder: PictureFolder, plan: ClipPlan, *, part: Part | None, height: int, width: int, sink: Sink) -> Cut:
    """Decodes the clips of a folder of pictures, or of a part of a long one.

    Raises:
        VideoError: there are too few pictures, or too many damaged ones; NOT_SEEKABLE if the part has a damaged one.
    """
    # A picture has no second field, whatever its coder marked.
    plan = dataclasses.replace(plan, deinterlace="off")
    frames = frames_of(folder)
    line = _line(folder, frames)
    indices = np.array(part.clips or np.empty((0, 0)), np.int64) if part else plan_clips(line, plan)
    if not part and not len(indices):
        span = clip_span(num_frames=plan.num_frames, stride=plan.stride)
        ranged = "" if plan.start_seconds is None and plan.end_seconds is None else " in the range that was asked for"
        raise VideoError("clip", "too-few-frames", f"{len(line.times)} frames{ranged}, and a clip spans {span}")
    try:
        if line.broken:
            raise line.broken
        if plan.split_at_cuts:
            line, indices = _between_cuts(folder, frames, line, plan, height=height, width=width, sink=sink)
        return _at(indices, line, _collect(folder, frames, indices, plan, height=height, width=width, sink=sink))
    except VideoError as error:
        if part and not error.transient:
            raise VideoError("decode", NOT_SEEKABLE, error.message) from None
        if plan.damaged == "reject" or error.reason not in ("decode-error", "missing-pictures"):
            raise
        broken = error
    found = _survey(folder, frames, line, broken)
    lost = damage.assess(found, plan, promised=None, message=broken.message)
    if lost.percent > plan.max_damaged_percent:
        raise VideoError(broken.stage, broken.reason, f"more than {plan.max_damaged_percent:g} %: {lost}")
    if plan.split_at_cuts:
        sound = found.frames >= 0
        line, indices = _between_cuts(folder, frames, line, plan, sound, height=height, width=width, sink=sink)
    indices = indices[found.is_sound(indices)]
    if not len(indices):
        raise VideoError(broken.stage, broken.reason, f"no clip is without damage: {lost}")
    notes = _collect(folder, frames, indices, plan, height=height, width=width, sink=sink)
    unseen = np.flatnonzero(found.frames < 0) if plan.split_at_cuts else None
    if not lost.lost:  # not in the range that was asked for
        return _at(indices, line, notes, unseen=unseen)
    notes = (f"damaged: {lost.percent:.1f} % of it is lost", *notes)
    return dataclasses.replace(_at(indices, line, notes, unseen=unseen), damage=lost)


def _line(folder: PictureFolder, frames: Frames) -> Timeline:
    times = np.arange(len(frames.names), dtype=np.int64)
    fps = Fraction(str(folder.pictures.fps))
    notes: tuple[str, ...] = ()
    if frames.step > 1:
        notes = (f"numbers-step: the numbers of its pictures go up by {frames.step}",)
    broken = VideoError("probe", "missing-pictures", frames.missing) if frames.missing else None
    keyframes = times[:0] if broken else times
    return Timeline(times, keyframes, 1 / fps, float(fps), notes=notes, broken=broken)


def _at(indices: Int64Array, line: Timeline, notes: tuple[str, ...], *, unseen: Int64Array | None = None) -> Cut:
    """The clips; `unseen` is as in `timeline.new_shots`."""
    starts = indices[:, 0] if len(indices) else np.empty(0, np.int64)
    seconds = [float(start * line.time_base) for start in starts.tolist()]
    own = (*shots_note(line), *notes)
    return Cut(starts.tolist(), seconds, line.fps, own, new_shots=new_shots(line, starts, unseen=unseen))


def _between_cuts(
    folder: PictureFolder,
    frames: Frames,
    line: Timeline,
    plan: ClipPlan,
    sound: npt.NDArray[np.bool_] | None = None,
    *,
    height: int,
    width: int,
    sink: Sink,
) -> tuple[Timeline, Int64Array]:
    """The line with its cuts, and the frames of the clips between them, by decoding all sound pictures of the range.

    Raises:
        VideoError: a picture is damaged, or each shot is shorter than a clip.
    """
    watcher = Watcher()
    seen = in_range(line.times, line.time_base, plan)
    seen = seen if sound is None else seen[sound[seen]]
    nothing = np.empty((0, plan.num_frames), np.int64)
    _collect(folder, frames, nothing, plan, height=height, width=width, sink=sink, watcher=watcher, seen=seen)
    line = with_cuts(line, plan, watcher.changes(range(len(line.times))))
    indices = plan_clips(line, plan)
    if not len(indices) and line.cuts:
        raise too_short(line, plan)
    return line, indices


def _collect(
    folder: PictureFolder,
    frames: Frames,
    indices: Int64Array,
    plan: ClipPlan,
    *,
    height: int,
    width: int,
    sink: Sink,
    watcher: Watcher | None = None,
    seen: Int64Array | None = None,
) -> tuple[str, ...]:
    """Decodes the frames of clips into the sink, and those that the watcher has to see; returns the notes.

    Raises:
        VideoError: one is damaged.
    """
    sink.restart()
    collector = Collector(indices, sink, plan, height=height, width=width, watcher=watcher)
    wanted = np.unique(indices if seen is None else seen).tolist()
    names = [frames.names[place] for place in wanted]
    assert None not in names, names
    decoder = _Decoder(folder)
    sizes: dict[tuple[int, int], None] = {}
    before = None
    for place, name, content in zip(wanted, names, contents(folder, names), strict=True):
        frame = decoder.decode(name or "", content)
        sizes.setdefault((frame.width, frame.height))
        collector.scaler.next_picture()
        if place - 1 != before:
            collector.flush()
        before = place
        collector.take(place, frame)
    assert collector.complete, indices
    notes = collector.notes
    if len(sizes) > 1:
        shown = ", ".join(f"{wide}x{tall}" for wide, tall in list(sizes)[:3])
        notes = (f"sizes-differ: its pictures have {len(sizes)} sizes, such as {shown}", *notes)
    return notes


def _survey(folder: PictureFolder, frames: Frames, line: Timeline, broken: VideoError) -> damage.Survey:
    """Decodes all pictures, and finds which are sound."""
    names = [(place, name) for place, name in enumerate(frames.names) if name is not None]
    numbers = np.full(len(frames.names), -1, np.int64)
    decoder = _Decoder(folder)
    for (place, name), content in zip(names, contents(folder, [name for _, name in names]), strict=True):
        try:
            decoder.decode(name, content)
        except VideoError as error:
            if error.reason != "decode-error":
                raise
        else:
            numbers[place] = place
    return damage.Survey(line, numbers, broken.message)


class _Decoder:
    """Decodes pictures, each without regard to the one before."""

    def __init__(self, folder: PictureFolder) -> None:
        self._codec = _CODECS[folder.pictures.kind]
        self._context: Any = None

    def decode(self, name: str, content: bytes) -> Any:
        """The frame of a picture.

        Raises:
            VideoError: it is damaged, or too large.
        """
        try:
            with errors("decode", "decode-error") as log:
                context = self._context = self._context or self._open()
                packet = av.Packet(content)
                packet.is_keyframe = True  # FFmpeg adds other PNG pictures to the one before
                found = context.decode(packet) if content else []
                lines: list[Any] = list(log)
                report = report_in(lines[:]) or next(
                    (line[2].strip() for line in lines if _CUT_OFF.search(line[2])), ""
                )
                if not report and len(found) != 1:
                    report = "it is empty" if not content else f"it holds {len(found)} pictures"
                if report or found[0].is_corrupt:
                    raise VideoError("decode", "decode-error", report or "it is marked as damaged")
        except VideoError as error:
            self._context = None  # it may hold parts of the damaged picture
            raise VideoError(error.stage, error.reason, f"{name}: {error.message}") from None
        return found[0]

    def _open(self) -> Any:
        context: Any = av.CodecContext.create(self._codec, "r")
        context.thread_type = "NONE"
        context.thread_count = 1
        context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "crccheck+explode"}
        return context
