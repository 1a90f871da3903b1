"""Reads a video with PyAV: opens it, finds its time stamps, decodes the frames that are needed, scales and crops them.

A video is read twice: once without decoding, which finds time stamps and truncated files, and once decoding, which
keeps only the frames of the chosen clips. So memory holds one decoded frame and one clip, however long the video is. A
video with any damage is rejected completely, because what a decoder conceals is not footage.

A decoder may hang or crash; `decoder.py` runs this code in a separate process for that reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO, Protocol

import av
import numpy as np

from vmoco.data.clips import ClipPlan, Int64Array, Part, clip_indices, clip_span
from vmoco.data.container import choose_stream, ends_whole, film_streams
from vmoco.data.frames import Frames
from vmoco.data.ledger import NOT_SEEKABLE, Stage, VideoError
from vmoco.data.pixels import MAX_PIXELS, Deinterlacer, Scaler, is_interlaced
from vmoco.data.timeline import Timeline, find_seams, in_display_order, lay_out, on_clock
from vmoco.job_settings import Deinterlace, Hdr

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
def errors(stage: Stage, reason: str) -> Iterator[None]:
    """Turns FFmpeg's errors into a VideoError whose message is the same each time: the error and the last log line."""
    av.logging.set_skip_repeated(False)  # "(repeated 3 more times)" would depend on the video before
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture():
            yield
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


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream, in display order."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            # Some codecs report a frame for which memory is short as a damaged one. Their memory is not freed yet, so
            # this allocation of one frame fails too: MemoryError. 3 bytes a pixel, for 4:4:4 or 10 bits of 4:2:0.
            np.empty((stream.codec_context.height, stream.codec_context.width, 3), np.uint8)
            raise


# Formats that store the time of each frame. In others FFmpeg guesses it, and its guess after a seek is another one.
_SEEKABLE = {"mov", "matroska"}
# Formats whose stamps may start again: they are made to be joined.
_RESTARTING = {"mpegts", "mpeg"}
# Formats whose header states the length of the video; in others FFmpeg estimates it from the packets in the file.
_DURATION_IN_HEADER = {"mov", "matroska", "flv", "asf"}


@dataclasses.dataclass(frozen=True)
class Cut:
    """The clips of a video or part, without their pixels, which went to the sink."""

    start_times: list[int]
    """Time stamp of the first frame of each clip, in the video's own unit."""
    start_seconds: list[float]
    """The same in seconds."""
    fps: float
    """Frames per second of the video."""
    notes: tuple[str, ...] = ()
    """What was done to the frames beyond scaling, as in `Timeline.notes`."""


class Sink(Protocol):
    """Receives the clips of a video, one after the other."""

    def add(self, frames: Frames) -> None:
        """Receives a clip, uint8 (T, H, W, 3), RGB; the next clip overwrites the array."""

    def restart(self) -> None:
        """Discards all clips, because decoding starts again."""


def probe(source: Source) -> Timeline:
    """Reads a video without decoding it.

    Raises:
        VideoError: it is no video, or it is truncated.
    """
    with errors("probe", "cannot-open"):
        with open_video(source) as container:
            streams = film_streams(container)
            if len(streams) == 1:
                return _probe(container, streams[0].index, source)
            index = choose_stream(container, streams)
        with open_video(source) as container:
            line = _probe(container, index, source)
    note = f"stream-chosen: stream {index} of {len(streams)} video streams is the film"
    return dataclasses.replace(line, notes=(note, *line.notes))


def cut_clips(source: Source, plan: ClipPlan, *, height: int, width: int, sink: Sink) -> Cut:
    """Decodes the clips of a video, scaled to cover height x width and cropped in the middle.

    Raises:
        VideoError: the video is damaged or too short.
    """
    timeline = probe(source)
    indices = plan_clips(timeline, plan)
    # A codec may hold back or hide frames, so the estimate can be wrong; the second round uses the decoder's own times.
    # If they differ again, decoding is not repeatable.
    for _ in range(3):
        sink.restart()
        collector = _Collector(indices, sink, height=height, width=width, hdr=plan.hdr, deinterlace=plan.deinterlace)
        with errors("decode", "decode-error"), open_video(source) as container:
            found = _decode(container, collector, timeline)
            collector.finish()
        indices, before = plan_clips(found, plan), indices
        if np.array_equal(indices, before):
            break
    else:
        raise VideoError("decode", "decode-error", f"the frames change between two readings: {len(found.times)}")
    times, time_base = found.times, found.time_base
    if not len(indices):
        ranged = "" if plan.start_seconds is None and plan.end_seconds is None else " in the range that was asked for"
        span = clip_span(num_frames=plan.num_frames, stride=plan.stride)
        rate = f" at {plan.fps:g} frames per second" if plan.fps else ""
        raise VideoError("clip", "too-few-frames", f"{len(times)} frames{ranged}, and a clip spans {span}{rate}")
    firsts, starts = indices[:, 0], times[indices[:, 0]]
    if ((np.diff(starts) < 0) | ((np.diff(starts) == 0) & (np.diff(firsts) > 0))).any():
        raise VideoError("clip", "bad-timestamps", "time stamps do not increase from clip to clip")
    seconds = [float(at * time_base) for at in starts.tolist()]
    return Cut(starts.tolist(), seconds, timeline.fps, collector.notes)


def plan_clips(line: Timeline, plan: ClipPlan) -> Int64Array:
    """The frames of each clip, as `clip_indices`; the plan's seconds count on the container's clock."""
    if len(line.times):
        plan = on_clock(plan, first=int(line.times[0]), time_base=line.time_base, origin=line.origin)
    borders = {*line.seams, *line.doubtful, *(number + 1 for number in line.doubtful)}
    return clip_indices(line.times, line.time_base, plan, seams=tuple(sorted(borders - {len(line.times)})))


def cut_part(
    source: Source,
    part: Part,
    *,
    height: int,
    width: int,
    sink: Sink,
    hdr: Hdr = "tonemap",
    deinterlace: Deinterlace = "auto",
) -> Cut:
    """Decodes the clips of a part of a long video: the same pixels as `cut_clips` gives.

    Raises:
        VideoError: NOT_SEEKABLE, if the part does not hold exactly the planned frames.
    """
    try:
        with errors("decode", NOT_SEEKABLE), open_video(source) as container:
            wanted = np.array(part.clips or np.empty((0, 0)), np.int64)
            collector = _Collector(wanted, sink, height=height, width=width, hdr=hdr, deinterlace=deinterlace)
            return _decode_part(container, part, sink, collector, whole=deinterlace == "auto")
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
    corrupt: list[int] = []
    seekable = not _SEEKABLE.isdisjoint(container.format.name.split(","))
    times, order, keyframes = [], [], []
    for packet in container.demux():
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream is stream and packet.size:  # the last, empty packet of each stream only ends it
            if packet.is_corrupt:
                corrupt.append(count)
            seekable = seekable and packet.pts is not None and not packet.is_discard
            if not packet.is_discard:
                count += 1
                if stamp is not None:
                    times.append(stamp)
                    order.append(stamp if packet.dts is None else packet.dts)
                if packet.is_keyframe:
                    keyframes.append(stamp)
    time_base = stream.time_base
    if not times and stream.average_rate:  # a bare stream: frames are counted
        times, order, time_base = list(range(count)), [], 1 / stream.average_rate
    elif len(times) < count:
        times, order = list(range(count)), []
    seams = find_seams(np.array(order, np.int64), time_base, restarts=_restarts(container))
    # The counter of MPEG-TS jumps at a seam, which marks one of the last two packets before it.
    marked = [seam for seam in seams if {seam - 2, seam - 1}.intersection(corrupt)]
    if not {seam - back for seam in marked for back in (1, 2)}.issuperset(corrupt):
        raise VideoError("probe", "truncated", f"one of its {count} packets is incomplete")
    shown, places = in_display_order(np.array(times, np.int64), seams)
    promised = _more_promised(container, stream, last=max(times, default=None), end=end)
    if promised and not (count >= stream.frames > 0 or ends_whole(source, container.format.name)):
        raise VideoError("probe", "truncated", promised)
    notes: tuple[str, ...] = (f"header-says-more: {promised}",) if promised else ()
    if seams:
        notes += (f"joined: {len(seams) + 1} recordings, one after the other",)
    spread = int(shown[-1] - shown[0]) if len(shown) else 0
    fps = (len(shown) - 1) / (spread * time_base) if spread else stream.average_rate or 0
    if not seekable or seams or len(set(times)) < count:
        keyframes = []
    return Timeline(
        shown,
        np.array(keyframes, np.int64),
        time_base,
        float(fps),
        stream=index,
        origin=Fraction(container.start_time or 0, av.time_base),
        seams=seams,
        doubtful=tuple(sorted(int(places[seam - back]) for seam in marked for back in (1, 2))),
        notes=notes,
    )


def _restarts(container: Any) -> bool:
    return not _RESTARTING.isdisjoint(container.format.name.split(","))


def _more_promised(container: Any, stream: Any, *, last: int | None, end: float) -> str:
    """What the header promises and the file does not hold; empty if it holds all.

    A truncated file often decodes without an error, and only this tells. But some recorders promise too much.
    """
    names = set(container.format.name.split(","))
    # In AVI a time stamp is a number, also of a frame that was left out and repeats the one before.
    if "avi" in names and last is not None and last + 1 < stream.frames - max(2, 0.02 * stream.frames):
        return f"{last + 1} frames, and the header promises {stream.frames}"
    if names & _DURATION_IN_HEADER and container.duration:
        promised = ((container.start_time or 0) + container.duration) / av.time_base
        # Headers are rounded, off by one, or count the display time of the last frame.
        if end < promised - max(0.2, 0.02 * promised):
            return f"it ends at {end:.2f} s, and the header promises {promised:.2f} s"
    return ""


def _decode(container: Any, collector: _Collector, line: Timeline) -> Timeline:
    """Decodes a complete video; returns the line with the times that its frames really have."""
    stream = video_stream(container, line.stream)
    collector.scaler.pixel_aspect = stream.sample_aspect_ratio
    times: list[int] = []
    time_base = line.time_base
    for frame in decoded(container, stream):
        if frame.is_corrupt:
            raise VideoError("decode", "decode-error", f"frame {len(times)} is damaged")
        collector.take(len(times), frame)
        times.append(frame.pts if frame.pts is not None else len(times))
        time_base = stream.time_base if frame.pts is not None else time_base
    stamps = np.array(times, np.int64)
    seams = find_seams(stamps, time_base, restarts=_restarts(container))
    return dataclasses.replace(line, times=lay_out(stamps, seams), time_base=time_base, seams=seams)


def _decode_part(container: Any, part: Part, sink: Sink, collector: _Collector, *, whole: bool) -> Cut:
    """`whole` refuses interlaced frames: deinterlacing the first one needs the last one of the part before."""
    stream = video_stream(container, part.stream)
    sink.restart()
    collector.scaler.pixel_aspect = stream.sample_aspect_ratio
    last = max((max(clip) for clip in part.clips), default=part.start)
    container.seek(part.start, stream=stream, backward=True)
    count = 0
    for frame in decoded(container, stream):
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


class _Collector:
    """Receives the decoded frames of a video in turn, and gives each clip to the sink once all its frames are there."""

    def __init__(
        self, wanted: Int64Array, sink: Sink, *, height: int, width: int, hdr: Hdr, deinterlace: Deinterlace
    ) -> None:
        """`wanted` is (N, T): number or time stamp of each frame of each clip, increasing from clip to clip."""
        self._sink = sink
        self._lasts = wanted.max(axis=1).tolist() if wanted.size else []
        self._places = [{name: np.flatnonzero(clip == name) for name in clip.tolist()} for clip in wanted]
        self._clip = 0
        self._frames = np.empty((wanted.shape[1] if wanted.size else 0, height, width, 3), np.uint8)
        self.scaler = Scaler(height=height, width=width, hdr=hdr)
        self._deinterlacer = Deinterlacer() if deinterlace == "auto" else None
        self._deinterlaced = False

    @property
    def complete(self) -> bool:
        """Whether the sink has every clip."""
        return self._clip == len(self._places)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the frames beyond scaling, as in `Timeline.notes`."""
        own = ("deinterlaced: its frames are interlaced",) if self._deinterlaced else ()
        return (*own, *sorted(self.scaler.notes))

    def take(self, name: int, frame: Any) -> None:
        """Receives a frame; some frames wait in the deinterlacer for the next one."""
        if self._deinterlacer is None:
            self._keep(name, frame)
            return
        self._deinterlaced = self._deinterlaced or is_interlaced(frame)
        for each, done in self._deinterlacer.push(name, frame):
            self._keep(each, done)

    def finish(self) -> None:
        """Takes the frames that still wait; the last call."""
        for name, done in self._deinterlacer.flush() if self._deinterlacer else ():
            self._keep(name, done)

    def _keep(self, name: int, frame: Any) -> None:
        """Keeps a frame where a clip needs it; two clips, or two places of one clip, may need the same one."""
        scaled = None
        while self._clip < len(self._places) and name in self._places[self._clip]:
            scaled = self.scaler.scale(frame) if scaled is None else scaled
            self._frames[self._places[self._clip][name]] = scaled
            if name != self._lasts[self._clip]:
                return
            self._sink.add(self._frames)
            self._clip += 1
