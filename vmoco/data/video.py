"""Reads a video with PyAV: opens it, finds its time stamps, decodes the frames that are needed, scales and crops them.

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
from typing import Any, BinaryIO, Literal, Protocol

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from vmoco.data import damage, ledger
from vmoco.data.clips import ClipPlan, Int64Array, Part, clip_indices, clip_span
from vmoco.data.frames import Frames
from vmoco.data.ledger import NOT_SEEKABLE, Damage, Stage, VideoError

# Formats that consist of one file. Playlists (hls, concat, dash) are not allowed: a user's file could make FFmpeg open
# other files or addresses.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,h264,hevc,m4v,nut,gif,ivf"

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
    av.logging.set_level(damage.LEVEL)
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


def video_stream(container: Any) -> Any:
    """The first stream of moving pictures, set to decode the same way everywhere; VideoError if there is none."""
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise VideoError(
            "probe", "no-video-stream", f"it holds {len(container.streams)} streams, and no moving picture"
        )
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError("probe", "no-decoder", "FFmpeg has no decoder for its codec")
    # Frame threads can deadlock when decoding stops early, and a task has one core anyway.
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
    return stream


def decoded(container: Any, stream: Any, log: list[Any]) -> Iterator[Any]:
    """The frames of a stream, in display order.

    Raises:
        VideoError: FFmpeg logged damage and went on.
    """
    ignored = damage.other_parts(container, stream)
    log.clear()
    for packet in damage.packets(container, stream):
        if isinstance(packet, av.error.FFmpegError):
            raise packet
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            # Some codecs report a frame for which memory is short as a damaged one. Their memory is not freed yet, so
            # this allocation of one frame fails too: MemoryError. 3 bytes a pixel, for 4:4:4 or 10 bits of 4:2:0.
            np.empty((stream.codec_context.height, stream.codec_context.width, 3), np.uint8)
            raise
        if log and (report := damage.report_in(log, ignored=ignored)):
            raise VideoError("decode", "decode-error", report)
        yield from frames
        log.clear()  # of scaling


MAX_PIXELS = 8192 * 4352
"""Pixels of the largest frame, decoded or scaled: a damaged header may state any size, and memory must hold it."""

# swscale's bilinear filter widens when it shrinks a frame, so it is antialiased: with chroma at full width it is within
# 52 to 58 dB of torch's antialiased resize of the RGB frame (area: 38 to 53 dB, 20 % faster; decoding takes 2 to 5
# times as long as either). With the last two flags it gives the same bytes on every CPU.
SCALING = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class Scaler:
    """Scales the frames of one video to cover height x width."""

    def __init__(self, *, height: int, width: int) -> None:
        self._height, self._width = height, width
        self.pixel_aspect: Fraction | None = None
        self._reformatter = VideoReformatter()  # keeps swscale's tables from frame to frame
        self._covers: dict[tuple[int, int, int], tuple[int, int]] = {}

    def scale(self, frame: Any) -> Frames:
        """The frame as it is stored, turned upright and cropped in the middle: uint8 (H, W, 3), RGB."""
        turns = round(frame.rotation / 90) % 4  # counter-clockwise
        height, width = (self._width, self._height) if turns % 2 else (self._height, self._width)
        shape = (frame.width, frame.height, turns % 2)
        tall, wide = self._covers.get(shape) or self._covers.setdefault(shape, self._cover(frame, height, width))
        # One pass from the codec's colours at full size to RGB at the small size; one thread, as for decoding.
        scaled = self._reformatter.reformat(
            frame, width=wide, height=tall, format="rgb24", interpolation=SCALING, threads=1
        )
        plane = scaled.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:tall, : wide * 3]
        top, left = (tall - height) // 2, (wide - width) // 2
        return np.rot90(rows.reshape(tall, wide, 3)[top : top + height, left : left + width], turns)

    def _cover(self, frame: Any, height: int, width: int) -> tuple[int, int]:
        """Height and width of the scaled frame before it is cropped."""
        # Width of a pixel over its height; extreme values come from damaged headers.
        aspect = self.pixel_aspect
        shown = frame.width * (aspect if aspect and Fraction(1, 8) <= aspect <= 8 else Fraction(1))
        factor = max(Fraction(height) / frame.height, Fraction(width) / shown)
        tall, wide = max(height, round(frame.height * factor)), max(width, round(shown * factor))
        if tall * wide > MAX_PIXELS:
            raise VideoError(
                "decode", "frame-too-large", f"{frame.width} x {frame.height} would be {wide} x {tall} scaled"
            )
        return tall, wide


# Formats that store the time of each frame. In others FFmpeg guesses it, and its guess after a seek is another one.
_SEEKABLE = {"mov", "matroska"}
# Formats whose header states the length of the video; in others FFmpeg estimates it from the packets in the file.
_DURATION_IN_HEADER = {"mov", "matroska", "flv", "asf"}


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The frames of a video, found without decoding it: a good estimate, which decoding may correct."""

    times: Int64Array
    """int64 (F,): time stamps of the frames in display order, in units of `time_base`."""
    keyframes: Int64Array
    """Time stamps of frames at which decoding can begin; empty if the format does not tell."""
    time_base: Fraction
    """Seconds."""
    fps: float
    """Frames per second, the mean over the video."""
    expected: Int64Array
    """Time stamps of the packets of which a frame must come."""
    broken: VideoError | None = None
    """What is wrong with the file, where it is damaged or cut off."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """The clips of a video or part, without their pixels, which went to the sink."""

    start_times: list[int]
    """Time stamp of the first frame of each clip, in the video's own unit."""
    start_seconds: list[float]
    """The same in seconds."""
    fps: float
    """Frames per second of the video."""
    damage: Damage | None = None
    """What of the video is lost."""


class Sink(Protocol):
    """Receives the clips of a video, one after the other."""

    def add(self, frames: Frames) -> None:
        """Receives a clip, uint8 (T, H, W, 3), RGB; the next clip overwrites the array."""

    def restart(self) -> None:
        """Discards all clips, because decoding starts again."""


def probe(source: Source, *, damaged: Literal["drop-clips", "reject"] = "drop-clips") -> Timeline:
    """Reads a video without decoding it.

    Raises:
        VideoError: it is no video; or it is truncated, and damaged videos are rejected.
    """
    with errors("probe", "cannot-open"), open_video(source) as container:
        timeline = _probe(container)
    if timeline.broken and damaged == "reject":
        raise timeline.broken
    return timeline


def cut_clips(source: Source, plan: ClipPlan, *, height: int, width: int, sink: Sink) -> Cut:
    """Decodes the clips of a video, scaled to cover height x width and cropped in the middle.

    Raises:
        VideoError: the video is too short, or too damaged for the plan.
    """
    timeline = probe(source, damaged=plan.damaged)
    broken = timeline.broken
    if not broken:
        try:
            return _cut_whole(source, plan, timeline, height=height, width=width, sink=sink)
        except VideoError as error:
            if plan.damaged == "reject" or error.reason not in ledger.DAMAGE:
                raise
            broken = error
    return _cut_sound(source, plan, timeline, broken, height=height, width=width, sink=sink)


def _cut_whole(source: Source, plan: ClipPlan, timeline: Timeline, *, height: int, width: int, sink: Sink) -> Cut:
    """The clips of a video without damage."""
    indices = clip_indices(timeline.times, timeline.time_base, plan)
    # A codec may hold back or hide frames, so the estimate can be wrong; the second round uses the decoder's own times.
    # If they differ again, decoding is not repeatable.
    for _ in range(3):
        sink.restart()
        collector = _Collector(indices, sink, height=height, width=width)
        with errors("decode", "decode-error") as log, open_video(source) as container:
            times, time_base = _decode(container, collector, log)
        if len(times) < len(timeline.expected) and len(lost := damage.never_shown(timeline.expected, times)):
            at = float(lost[0] * time_base)
            raise VideoError("decode", "decode-error", f"{len(lost)} frames never came, the first one at {at:.2f} s")
        found = clip_indices(times, time_base, plan)
        if np.array_equal(found, indices):
            break
        indices = found
    else:
        raise VideoError("decode", "decode-error", f"the frames change between two readings: {len(times)}")
    if not len(indices):
        ranged = "" if plan.start_seconds is None and plan.end_seconds is None else " in the range that was asked for"
        span = clip_span(num_frames=plan.num_frames, stride=plan.stride)
        rate = f" at {plan.fps:g} frames per second" if plan.fps else ""
        raise VideoError("clip", "too-few-frames", f"{len(times)} frames{ranged}, and a clip spans {span}{rate}")
    return _cut_at(indices, times, time_base, fps=timeline.fps)


def _cut_sound(
    source: Source,
    plan: ClipPlan,
    timeline: Timeline,
    broken: VideoError,
    *,
    height: int,
    width: int,
    sink: Sink,
) -> Cut:
    """The clips of a damaged video that hold no damaged frame."""
    with errors("decode", "decode-error") as log, open_video(source) as container:
        stream = video_stream(container)
        time_base = stream.time_base
        found = damage.survey(container, stream, log)
    promised = broken.promised if isinstance(broken, damage.CutOffError) else None
    lost = damage.assess(found, time_base, plan, promised=promised, message=broken.message)
    if lost.percent > plan.max_damaged_percent:
        raise VideoError(broken.stage, broken.reason, f"more than {plan.max_damaged_percent:g} %: {lost}")
    if not found.ordered:
        raise VideoError("clip", "bad-timestamps", f"time stamps do not increase, and {lost}")
    indices = found.keep(clip_indices(found.times, time_base, plan))
    if not len(indices):
        raise VideoError(broken.stage, broken.reason, f"no clip is without damage: {lost}")
    sink.restart()
    collector = _Collector(found.frames[indices], sink, height=height, width=width)
    with errors("decode", "decode-error") as log, open_video(source) as container:
        stream = video_stream(container)
        collector.scaler.pixel_aspect = stream.sample_aspect_ratio
        damage.take_again(container, stream, log, taker=collector, found=found)
    assert collector.complete, found
    cut = _cut_at(indices, found.times, time_base, fps=timeline.fps)
    return dataclasses.replace(cut, damage=lost if lost.lost or not found.damaged else None)


def _cut_at(indices: Int64Array, times: Int64Array, time_base: Fraction, *, fps: float) -> Cut:
    firsts, starts = indices[:, 0], times[indices[:, 0]]
    if ((np.diff(starts) < 0) | ((np.diff(starts) == 0) & (np.diff(firsts) > 0))).any():
        raise VideoError("clip", "bad-timestamps", "time stamps do not increase from clip to clip")
    return Cut(starts.tolist(), [float(at * time_base) for at in starts.tolist()], fps)


def cut_part(source: Source, part: Part, *, height: int, width: int, sink: Sink) -> Cut:
    """Decodes the clips of a part of a long video: the same pixels as `cut_clips` gives.

    Raises:
        VideoError: NOT_SEEKABLE, if the part does not hold exactly the planned frames.
    """
    try:
        with errors("decode", NOT_SEEKABLE) as log, open_video(source) as container:
            return _decode_part(container, part, sink, log, height=height, width=width)
    except VideoError as error:
        raise VideoError("decode", NOT_SEEKABLE, error.message) from None


def _probe(container: Any) -> Timeline:
    stream = video_stream(container)
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise VideoError("probe", "frame-too-large", f"{width} x {height}, and at most {MAX_PIXELS} pixels are decoded")
    count, end = 0, 0.0
    broken: VideoError | None = None
    seekable = not _SEEKABLE.isdisjoint(container.format.name.split(","))
    times, keyframes, expected = [], [], []
    for packet in damage.packets(container):
        if isinstance(packet, av.error.FFmpegError):
            broken = broken or VideoError("probe", "truncated", f"packet {count} cannot be read: {packet.strerror}")
            continue
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream is stream and packet.size:  # the last, empty packet of each stream only ends it
            seekable = seekable and packet.pts is not None and not packet.is_discard
            if packet.is_corrupt:
                broken = broken or VideoError("probe", "truncated", f"packet {count} is incomplete")
            if not packet.is_discard:
                count += 1
                if stamp is not None:
                    times.append(stamp)
                    if damage.shows_a_frame(packet):
                        expected.append(stamp)
                if packet.is_keyframe:
                    keyframes.append(stamp)
    try:
        _check_length(container, stream, count=count, end=end)
    except damage.CutOffError as error:
        broken = error
    times.sort()
    spread = times[-1] - times[0] if times else 0
    fps = (len(times) - 1) / (spread * stream.time_base) if spread else stream.average_rate or 0
    if len(times) < count:  # a bare stream: frames are counted
        times = list(range(count))
    if not seekable or len(set(times)) < count:
        keyframes = []
    return Timeline(
        np.array(times, np.int64),
        np.array(keyframes, np.int64),
        stream.time_base,
        float(fps),
        np.array(expected, np.int64),
        broken,
    )


def _check_length(container: Any, stream: Any, *, count: int, end: float) -> None:
    """Finds truncated files: they often decode without an error, and only the header tells that more should follow."""
    names = set(container.format.name.split(","))
    if "avi" in names and count < stream.frames - max(2, 0.02 * stream.frames):
        message = f"{count} frames, and the header promises {stream.frames}"
        raise damage.CutOffError(message, promised=float(stream.frames / (stream.average_rate or 25)))
    if names & _DURATION_IN_HEADER and container.duration:
        promised = ((container.start_time or 0) + container.duration) / av.time_base
        # Headers are rounded, off by one, or count the display time of the last frame.
        if end < promised - max(0.2, 0.02 * promised):
            message = f"it ends at {end:.2f} s, and the header promises {promised:.2f} s"
            raise damage.CutOffError(message, promised=promised)


def _decode(container: Any, collector: _Collector, log: list[Any]) -> tuple[Int64Array, Fraction]:
    """Decodes a complete video; returns the times of its frames and their unit."""
    stream = video_stream(container)
    collector.scaler.pixel_aspect = stream.sample_aspect_ratio
    times: list[int] = []
    for frame in decoded(container, stream, log):
        if frame.is_corrupt:
            raise VideoError("decode", "decode-error", f"frame {len(times)} is damaged")
        collector.take(len(times), frame)
        times.append(frame.pts if frame.pts is not None else len(times))
    return np.array(times, np.int64), stream.time_base


def _decode_part(container: Any, part: Part, sink: Sink, log: list[Any], *, height: int, width: int) -> Cut:
    stream = video_stream(container)
    sink.restart()
    wanted = np.array(part.clips or np.empty((0, 0)), np.int64)
    collector = _Collector(wanted, sink, height=height, width=width)
    collector.scaler.pixel_aspect = stream.sample_aspect_ratio
    last = max((max(clip) for clip in part.clips), default=part.start)
    container.seek(part.start, stream=stream, backward=True)
    count = 0
    for frame in decoded(container, stream, log):
        if frame.pts is None:
            raise VideoError("decode", NOT_SEEKABLE, "a frame has no time stamp")
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
    return Cut(starts, [float(start * stream.time_base) for start in starts], part.fps)


class _Collector:
    """Receives the decoded frames of a video in turn, and gives each clip to the sink once all its frames are there."""

    def __init__(self, wanted: Int64Array, sink: Sink, *, height: int, width: int) -> None:
        """`wanted` is (N, T): number or time stamp of each frame of each clip, increasing from clip to clip."""
        self._sink = sink
        self._lasts = wanted.max(axis=1).tolist() if wanted.size else []
        self._places = [{name: np.flatnonzero(clip == name) for name in clip.tolist()} for clip in wanted]
        self._clip = 0
        self._frames = np.empty((wanted.shape[1] if wanted.size else 0, height, width, 3), np.uint8)
        self.scaler = Scaler(height=height, width=width)

    @property
    def complete(self) -> bool:
        """Whether the sink has every clip."""
        return self._clip == len(self._places)

    def take(self, name: int, frame: Any) -> None:
        """Receives a frame; two clips, or two places of one clip, may need the same one."""
        scaled = None
        while self._clip < len(self._places) and name in self._places[self._clip]:
            scaled = self.scaler.scale(frame) if scaled is None else scaled
            self._frames[self._places[self._clip][name]] = scaled
            if name != self._lasts[self._clip]:
                return
            self._sink.add(self._frames)
            self._clip += 1
