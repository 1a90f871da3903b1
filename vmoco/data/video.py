"""Reads a video with PyAV: opens it, finds its time stamps, and decodes the frames of the clips.

A video is read twice: once without decoding, which finds time stamps and truncated files, and once decoding, which
keeps only the frames of the chosen clips. So memory holds one decoded frame and one clip, however long the video is.
What a decoder conceals is not footage: where it reports damage, `damage.py` finds the clips that have none.

A decoder may hang or crash; `decoder.py` runs this code in a separate process for that reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO, Literal

import av
import numpy as np
import numpy.typing as npt

from vmoco.data import damage, ledger, reports
from vmoco.data.clips import ClipPlan, Int64Array, Part, clip_span
from vmoco.data.collector import Collector, Sink
from vmoco.data.container import CutOffError, choose_stream, ends_whole, film_streams, more_promised, packets
from vmoco.data.ledger import NOT_SEEKABLE, Damage, Stage, VideoError
from vmoco.data.pixels import MAX_PIXELS, is_interlaced
from vmoco.data.timeline import (
    Timeline,
    filled,
    find_cut_in,
    find_seams,
    in_display_order,
    joined_note,
    lay_out,
    plan_clips,
    plan_windows,
    when_shown,
)

# Formats that consist of one file. Playlists (hls, concat, dash) are not allowed: a user's file could make FFmpeg open
# other files or addresses.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,h264,hevc,m4v,nut,gif,ivf,dhav"

Source = str | BinaryIO
"""Path of a local file, or a file that is open for reading and has a name."""


def open_video(source: Source) -> Any:
    """PyAV's container, which the caller closes; call it inside `errors`, because it raises av.error.FFmpegError."""
    if not isinstance(source, str):
        source.seek(0)  # it is opened twice
    # Titles may be in any encoding, and nothing here reads them.
    options = {"format_whitelist": FORMATS}
    return av.open(source, mode="r", options=options, buffer_size=2**20, metadata_errors="replace")


@contextlib.contextmanager
def errors(stage: Stage, reason: str) -> Iterator[list[Any]]:
    """Turns FFmpeg's errors into a VideoError whose message is the same each time: the error and the last log line.

    Gives the list that receives the log.
    """
    av.logging.set_skip_repeated(False)  # "(repeated 3 more times)" would depend on the video before
    level = av.logging.get_level()
    av.logging.set_level(reports.LEVEL)
    try:
        with av.logging.Capture() as log:
            yield log
    except (MemoryError, av.error.MemoryError) as error:
        raise VideoError("decode", "too-much-memory", f"one frame and its references do not fit: {error}") from None
    except av.error.FileNotFoundError:
        raise VideoError("read", "missing", "it was listed, but is gone", transient=True) from None
    except av.error.FFmpegError as error:
        message = [error.strerror or type(error).__name__]
        logged: Any = error.log  # (level, part of FFmpeg, line); PyAV's type is wrong
        if logged is not None:
            message.append(f"{logged[1]}: {logged[2].strip()}")
        raise VideoError(stage, reason, "; ".join(message)) from None
    finally:
        av.logging.set_level(level)


def video_stream(container: Any, index: int) -> Any:
    """The stream of that index, set to decode the same way everywhere."""
    stream = container.streams[index]
    if stream.codec_context is None:
        raise VideoError("probe", "no-decoder", "FFmpeg has no decoder for its codec")
    # Frame threads can deadlock when decoding stops early, and a task has one core anyway.
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
    return stream


def decoded(container: Any, stream: Any, log: list[Any], *, seams: tuple[int, ...] = ()) -> Iterator[Any]:
    """The frames of a stream, in display order.

    Args:
        container: Just opened, or at the place from which to decode.
        stream: To decode.
        log: The list that receives FFmpeg's log.
        seams: Numbers of the packets at which another recording begins.

    Raises:
        VideoError: FFmpeg logged damage and went on.
    """
    which: Any = {"ignored": reports.other_parts(container, stream), "stream": stream.index}
    around = reports.around(seams)
    log.clear()
    number = 0
    for packet in packets(container, stream):
        if isinstance(packet, av.error.FFmpegError):
            raise packet
        near_seam = number in around
        number += bool(packet.size)
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            # Some codecs report a frame for which memory is short as a damaged one. Their memory is not freed yet, so
            # this allocation of one frame fails too: MemoryError. 3 bytes a pixel, for 4:4:4 or 10 bits of 4:2:0.
            np.empty((stream.codec_context.height, stream.codec_context.width, 3), np.uint8)
            raise
        if log and (report := reports.report_in(log, near_seam=near_seam, **which)):
            raise VideoError("decode", "decode-error", report)
        yield from frames
        log.clear()  # of scaling


# Formats that store the time of each frame. In others FFmpeg guesses it, and its guess after a seek is another one.
_SEEKABLE = {"mov", "matroska"}
# Formats whose stamps may start again: they are made to be joined.
_RESTARTING = {"mpegts", "mpeg"}


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


def probe(source: Source, *, damaged: Literal["drop-clips", "reject"] = "drop-clips") -> Timeline:
    """Reads a video without decoding it.

    Raises:
        VideoError: it is no video; or it is truncated, and damaged videos are rejected.
    """
    with errors("probe", "cannot-open"):
        with open_video(source) as container:
            streams = film_streams(container)
            index = streams[0].index
            line = _probe(container, index, source) if len(streams) == 1 else None
            index = index if line else choose_stream(container, streams)
        if line is None:
            with open_video(source) as container:
                line = _probe(container, index, source)
            note = f"stream-chosen: stream {index} of {len(streams)} video streams is the film"
            line = dataclasses.replace(line, notes=(note, *line.notes))
    if line.broken and damaged == "reject":
        raise line.broken
    return line


def cut_clips(source: Source, plan: ClipPlan, *, height: int, width: int, sink: Sink) -> Cut:
    """Decodes the clips of a video, scaled to cover height x width and cropped in the middle.

    Raises:
        VideoError: the video is too short, or too damaged for the plan.
    """
    line = probe(source, damaged=plan.damaged)
    broken = line.broken
    if not broken:
        try:
            return _cut_whole(source, plan, line, height=height, width=width, sink=sink)
        except VideoError as error:
            if plan.damaged == "reject" or error.reason not in ledger.DAMAGE:
                raise
            broken = error
    return _cut_sound(source, plan, line, broken, height=height, width=width, sink=sink)


def _cut_whole(source: Source, plan: ClipPlan, line: Timeline, *, height: int, width: int, sink: Sink) -> Cut:
    """The clips of a video without damage."""
    indices = plan_clips(line, plan)
    # A codec may hold back or hide frames, so the estimate can be wrong; the second round uses the decoder's own times.
    # If they differ again, decoding is not repeatable.
    for _ in range(3):
        sink.restart()
        collector = Collector(indices, sink, plan, height=height, width=width)
        with errors("decode", "decode-error") as log, open_video(source) as container:
            found = _decode(container, collector, line, log)
        indices, before = plan_clips(found, plan), indices
        if np.array_equal(indices, before):
            break
    else:
        raise VideoError("decode", "decode-error", f"the frames change between two readings: {len(found.times)}")
    if not len(indices):
        ranged = "" if plan.start_seconds is None and plan.end_seconds is None else " in the range that was asked for"
        span = clip_span(num_frames=plan.num_frames, stride=plan.stride)
        rate = f" at {plan.fps:g} frames per second" if plan.fps else ""
        raise VideoError("clip", "too-few-frames", f"{len(found.times)} frames{ranged}, and a clip spans {span}{rate}")
    notes = () if line.seams else joined_note(found.seams)
    return _cut_at(indices, found, plan, (*notes, *collector.notes))


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
    planned = plan_clips(found.line, plan)
    sound = found.is_sound(planned)
    indices = planned[sound]
    if not len(indices):
        raise VideoError(broken.stage, broken.reason, f"no clip is without damage: {lost}")
    sink.restart()
    collector = Collector(found.frames[indices], sink, plan, height=height, width=width)
    with errors("decode", "decode-error") as log, open_video(source) as container:
        stream = video_stream(container, line.stream)
        collector.scaler.pixel_aspect = stream.sample_aspect_ratio
        damage.take_again(container, stream, log, collector=collector, found=found)
    assert collector.complete, found
    if found.damaged and not lost.lost:  # not in the range that was asked for
        return _cut_at(indices, found.line, plan, collector.notes, kept=sound)
    kind = "cut-off" if promised is not None else "damaged"
    note = f"{kind}: {lost.percent:.1f} % of it is lost"
    cut = _cut_at(indices, found.line, plan, (note, *collector.notes), kept=sound)
    return dataclasses.replace(cut, damage=lost)


def _cut_at(
    indices: Int64Array,
    line: Timeline,
    plan: ClipPlan,
    notes: tuple[str, ...],
    *,
    kept: npt.NDArray[np.bool_] | slice = slice(None),
) -> Cut:
    """`kept` tells which of the planned clips `indices` are."""
    firsts, starts = indices[:, 0], line.times[indices[:, 0]]
    if ((np.diff(starts) < 0) | ((np.diff(starts) == 0) & (np.diff(firsts) > 0))).any():
        raise VideoError("clip", "bad-timestamps", "time stamps do not increase from clip to clip")
    seconds = [float(at * line.time_base) for at in starts.tolist()]
    if plan.every_seconds is not None:
        seconds = plan_windows(line, plan).seconds[kept].tolist()
    return Cut(starts.tolist(), seconds, line.fps, notes)


def cut_part(source: Source, part: Part, plan: ClipPlan, *, height: int, width: int, sink: Sink) -> Cut:
    """Decodes the clips of a part of a long video: the same pixels as `cut_clips` gives.

    Raises:
        VideoError: NOT_SEEKABLE, if the part does not hold exactly the planned frames.
    """
    try:
        with errors("decode", NOT_SEEKABLE) as log, open_video(source) as container:
            wanted = np.array(part.clips or np.empty((0, 0)), np.int64)
            collector = Collector(wanted, sink, plan, height=height, width=width)
            sink.restart()
            return _decode_part(container, part, collector, log, whole=plan.deinterlace == "auto")
    except VideoError as error:
        if error.reason == "hdr":
            raise
        raise VideoError("decode", NOT_SEEKABLE, error.message) from None


def _probe(container: Any, index: int, source: Source) -> Timeline:
    stream = video_stream(container, index)
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise VideoError("probe", "frame-too-large", f"{width} x {height}, and at most {MAX_PIXELS} pixels are decoded")
    count, end = 0, 0.0
    broken: VideoError | None = None
    corrupt: list[int] = []
    seekable = not _SEEKABLE.isdisjoint(container.format.name.split(","))
    times: list[int | None] = []
    order: list[int | None] = []
    keys: list[bool] = []
    expected: list[tuple[int, int]] = []
    for packet in packets(container):
        if isinstance(packet, av.error.FFmpegError):
            broken = broken or VideoError("probe", "truncated", f"packet {count} cannot be read: {packet.strerror}")
            continue
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream is stream and packet.size:  # the last, empty packet of each stream only ends it
            if packet.is_corrupt:
                corrupt.append(count)
            seekable = seekable and packet.pts is not None and not packet.is_discard
            if not packet.is_discard:
                times.append(stamp)
                order.append(stamp if packet.dts is None else packet.dts)
                if stamp is not None and reports.shows_a_frame(packet):
                    expected.append((count, stamp))
                keys.append(packet.is_keyframe)
                count += 1
    time_base = stream.time_base
    decoding = filled(order)
    if decoding is None:  # a bare stream: frames are counted
        stamps = decoding = np.arange(count)
        time_base = 1 / stream.average_rate if stream.average_rate else time_base
    else:
        stamps = when_shown(times, decoding)
    seams = find_seams(decoding, time_base, restarts=_restarts(container))
    # The counter of MPEG-TS jumps at a seam, which marks one of the last two packets before it.
    marked = [seam for seam in seams if {seam - 2, seam - 1}.intersection(corrupt)]
    doubtful = {seam - back for seam in marked for back in (1, 2)}
    if incomplete := [number for number in corrupt if number not in doubtful]:
        broken = broken or VideoError("probe", "truncated", f"packet {incomplete[0]} is incomplete")
    if cut_in := find_cut_in(stamps, decoding, keys, seams):
        message = f"the recording that begins at packet {cut_in[0]} lacks the frames that its first ones refer to"
        broken = broken or VideoError("probe", "truncated", message)
    shown, places = in_display_order(stamps, seams)
    notes: tuple[str, ...] = ()
    if promised := more_promised(container, stream, last=int(stamps.max()) if count else None, end=end):
        if count >= stream.frames > 0 or ends_whole(source, container.format.name):
            notes = (f"header-says-more: {promised.message}",)
        else:
            broken = promised
    notes += joined_note(seams)
    spread = int(shown[-1] - shown[0]) if len(shown) else 0
    fps = (len(shown) - 1) / (spread * time_base) if spread else stream.average_rate or 0
    can_begin = seekable and not seams and not broken and len(set(stamps.tolist())) == count
    keyframes = [time for time, key in zip(times, keys, strict=True) if key and can_begin]
    owners, wanted = np.array(expected, np.int64).reshape(-1, 2).T
    return Timeline(
        shown,
        np.array(keyframes, np.int64),
        time_base,
        float(fps),
        stream=index,
        origin=Fraction(container.start_time or 0, av.time_base),
        seams=seams,
        doubtful=tuple(sorted(int(places[number]) for number in doubtful)),
        cut_in=tuple(cut_in),
        notes=notes,
        expected=tuple(np.split(wanted, np.searchsorted(owners, seams))),
        broken=broken,
    )


def _restarts(container: Any) -> bool:
    return not _RESTARTING.isdisjoint(container.format.name.split(","))


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
    seams = find_seams(stamps, time_base, restarts=_restarts(container))
    if len(line.expected) == len(seams) + 1:
        for expected, shown in zip(line.expected, np.split(stamps, seams), strict=True):
            if len(shown) < len(expected) and len(lost := reports.never_shown(expected, shown)):
                at = float(lost[0] * time_base)
                raise VideoError(
                    "decode", "decode-error", f"{len(lost)} frames never came, the first one at {at:.2f} s"
                )
    return dataclasses.replace(line, times=lay_out(stamps, seams), time_base=time_base, seams=seams)


def _decode_part(container: Any, part: Part, collector: Collector, log: list[Any], *, whole: bool) -> Cut:
    """`whole` refuses interlaced frames: deinterlacing the first one needs the last one of the part before."""
    stream = video_stream(container, part.stream)
    collector.scaler.pixel_aspect = stream.sample_aspect_ratio
    last = max((max(clip) for clip in part.clips), default=part.start)
    container.seek(part.start, stream=stream, backward=True)
    count = 0
    for frame in decoded(container, stream, log):
        if frame.pts is None:
            raise VideoError("decode", NOT_SEEKABLE, "a frame has no time stamp")
        if whole and is_interlaced(frame):
            raise VideoError("decode", NOT_SEEKABLE, "interlaced frames are deinterlaced from the start")
        if frame.pts < part.start:  # of the part before: displayed earlier, or the seek went back further
            continue
        if frame.is_corrupt or (not count and not (frame.pts == part.start and frame.key_frame)):
            raise VideoError("decode", NOT_SEEKABLE, f"decoding does not begin at {part.start}")
        if part.end is None or frame.pts < part.end:
            count += 1
        elif frame.pts > last:
            break
        collector.take(frame.pts, frame)
    if count != part.num_frames or not collector.complete:
        raise VideoError("decode", NOT_SEEKABLE, f"{count} frames from {part.start}, and should be {part.num_frames}")
    starts = [clip[0] for clip in part.clips]
    seconds = [float(start * stream.time_base) for start in starts]
    return Cut(starts, seconds, part.fps, collector.notes)
