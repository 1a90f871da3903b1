"""Decodes the frames of a video that are needed, scaled and cropped: the only file that knows PyAV.

A video is read twice: once without decoding, which counts its packets and finds cut files, and once decoding, which
keeps only the frames of the chosen clips. So memory holds one decoded frame, however long the video. A video with any
damage is rejected as a whole: what a decoder conceals is not footage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from vmoco.data.clips import clip_span, start_indices
from vmoco.data.frames import Frames
from vmoco.data.ledger import Stage

MAX_PIXELS = 8192 * 4352
"""Largest frame, decoded or scaled: a damaged header may promise any size, and one frame must fit in memory."""

# Formats that are one file by themselves. Playlists (hls, concat, dash) are left out: a file of the user's could make
# FFmpeg open other files or addresses.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,h264,hevc,m4v,nut,gif,ivf"
# Formats whose header states how long they should be; elsewhere FFmpeg estimates the length from what is there.
_DURATION_IN_HEADER = {"mov", "matroska", "flv", "asf"}
# swscale's bilinear filter widens when it shrinks, so it is antialiased: with chroma at full width it is within 52 to
# 58 dB of torch's antialiased resize of the RGB frame (area: 38 to 53 dB, 20 % faster; decoding takes 2 to 5 times as
# long as either). The last two flags make it give the same bytes on every CPU.
_SCALING = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class InMemory(io.BytesIO):
    """The content of a video, with its name: FFmpeg also goes by the suffix."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


class VideoError(Exception):
    """A video that gives no clips: the fields of a ledger row."""

    def __init__(self, stage: Stage, reason: str, message: str, *, transient: bool = False) -> None:
        super().__init__(f"{stage}: {reason}: {message}")
        self.stage: Stage = stage
        self.reason = reason
        self.message = message
        self.transient = transient


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a video says of itself, found without decoding."""

    width: int
    """Pixels as coded, before rotation."""
    height: int
    num_frames: int
    """Packets that should each give a frame: a good guess, but the decoder has the last word."""
    fps: float
    """Frames per second, the mean over the video."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """The clips of one video."""

    frames: Frames
    """uint8 (N, T, H, W, 3), RGB."""
    start_pts: list[int]
    """Time stamp of the first frame of each clip, in the video's own unit; increasing."""
    start_seconds: list[float]
    """The same in seconds."""
    fps: float
    """Frames per second of the video, before the stride."""


def probe(source: str | InMemory, *, seconds: float = 600.0) -> Probe:
    """Reads a video without decoding it.

    Args:
        source: Path of a local file, or a content in memory.
        seconds: Time limit.

    Raises:
        VideoError: it is no video, or it is cut off.
    """
    with _errors("probe", "cannot-open"), _open(source) as container:
        return _probe(container, _Clock(seconds))


def cut_clips(
    source: str | InMemory,
    *,
    num_frames: int,
    stride: int,
    height: int,
    width: int,
    max_clips: int,
    seconds: float,
    allocate: Callable[[tuple[int, ...]], Frames] = lambda shape: np.empty(shape, np.uint8),
) -> Cut:
    """Decodes the clips of a video (`clips.start_indices`), scaled to cover height x width and cropped in the middle.

    Args:
        source: Path of a local file, or a content in memory.
        num_frames, stride, max_clips: As `clips.start_indices`.
        height, width: H and W in pixels.
        seconds: Time limit for the whole video, looked at between packets.
        allocate: Gives the uint8 array of a shape (N, T, H, W, 3) to decode into.

    Raises:
        VideoError: the video is damaged, too short or too slow.
    """
    clock = _Clock(seconds)
    with _errors("probe", "cannot-open"), _open(source) as container:
        about = _probe(container, clock)
    plan = {"num_frames": num_frames, "stride": stride, "max_clips": max_clips}
    span = clip_span(num_frames=num_frames, stride=stride)
    total = about.num_frames
    # A codec may hold back or hide frames, so the count of packets can be off; the second time the count is the
    # decoder's own. A third count would mean that decoding is not repeatable.
    for _ in range(3):
        starts = start_indices(total, **plan)
        frames = allocate((len(starts), num_frames, height, width, 3))
        with _errors("decode", "decode-error"), _open(source) as container:
            counted, times = _decode(container, starts, frames, stride=stride, clock=clock)
        if counted == total:
            break
        total = counted
    else:
        raise VideoError("decode", "decode-error", f"the number of frames changes between two readings: {total}")
    if not starts:
        raise VideoError("clip", "too-few-frames", f"{total} frames, and a clip spans {span}")
    pts = [time_stamp for time_stamp, _ in times]
    if any(later <= earlier for earlier, later in itertools.pairwise(pts)):
        raise VideoError("clip", "bad-timestamps", "time stamps do not increase from clip to clip")
    return Cut(frames=frames, start_pts=pts, start_seconds=[at for _, at in times], fps=about.fps)


class _Clock:
    """Raises once the time of a video is up."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise VideoError("decode", "timeout", f"not done after {self._seconds:g} s", transient=True)


def _open(source: str | InMemory) -> Any:
    if not isinstance(source, str):
        source.seek(0)  # it is opened twice
    # ENOENT and the like were met when the file was read for its hash; here every failure is one of the format.
    return av.open(source, mode="r", options={"format_whitelist": _FORMATS})


@contextlib.contextmanager
def _errors(stage: Stage, reason: str) -> Iterator[None]:
    """Turns FFmpeg's errors into a VideoError, with the last line that FFmpeg logged and nothing that varies."""
    av.logging.set_skip_repeated(False)  # "(repeated 3 more times)" would depend on the video before
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture():
            yield
    except av.error.FFmpegError as error:
        said = [error.strerror or type(error).__name__]
        logged: Any = error.log  # (level, part of FFmpeg, line); PyAV's type is wrong
        if logged is not None:
            said.append(f"{logged[1]}: {logged[2].strip()}")
        raise VideoError(stage, reason, "; ".join(said)) from None
    finally:
        av.logging.set_level(level)


def _video_stream(container: Any) -> Any:
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise VideoError(
            "probe", "no-video-stream", f"it holds {len(container.streams)} streams, and no moving picture"
        )
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError("probe", "no-decoder", "FFmpeg has no decoder for its codec")
    # Threads of frames can deadlock when decoding stops early, and one task has one core.
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
    return stream


def _probe(container: Any, clock: _Clock) -> Probe:
    stream = _video_stream(container)
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise VideoError("probe", "frame-too-large", f"{width} x {height}, and at most {MAX_PIXELS} pixels are decoded")
    count, end, corrupt = 0, 0.0, False
    stamps = []
    for packet in container.demux():
        clock.check()
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream is stream and packet.size:  # the last, empty packet of each stream only ends it
            corrupt = corrupt or packet.is_corrupt
            if not packet.is_discard:
                count += 1
                if stamp is not None:
                    stamps.append(stamp)
    if corrupt:
        raise VideoError("probe", "truncated", f"one of its {count} packets is incomplete")
    _check_length(container, stream, count=count, end=end)
    spread = max(stamps, default=0) - min(stamps, default=0)
    fps = (len(stamps) - 1) / (spread * stream.time_base) if spread else stream.average_rate or 0
    return Probe(width=width, height=height, num_frames=count, fps=float(fps))


def _check_length(container: Any, stream: Any, *, count: int, end: float) -> None:
    """A cut file often decodes without a complaint; only its header knows that there was more."""
    names = set(container.format.name.split(","))
    if "avi" in names and count < stream.frames - max(2, 0.02 * stream.frames):
        raise VideoError("probe", "truncated", f"{count} frames, and the header promises {stream.frames}")
    if names & _DURATION_IN_HEADER and container.duration:
        promised = ((container.start_time or 0) + container.duration) / av.time_base
        # Headers are rounded, off by one, or count the display time of the last frame.
        if end < promised - max(0.2, 0.02 * promised):
            raise VideoError("probe", "truncated", f"it ends at {end:.2f} s, and the header promises {promised:.2f} s")


def _decode(
    container: Any, starts: list[int], frames: Frames, *, stride: int, clock: _Clock
) -> tuple[int, list[tuple[int, float]]]:
    """Decodes the whole video; fills `frames` (N, T, H, W, 3); returns the number of frames and the clips' times."""
    stream = _video_stream(container)
    num_frames, height, width = frames.shape[1:4]
    scaler = _Scaler(height=height, width=width, pixel_aspect=stream.sample_aspect_ratio)
    times = []
    clip, index = 0, 0
    for packet in container.demux(stream):
        clock.check()
        for frame in packet.decode():
            if frame.is_corrupt:
                raise VideoError("decode", "decode-error", f"frame {index} is damaged")
            if clip < len(starts) and index >= starts[clip]:
                position, between = divmod(index - starts[clip], stride)
                if position == 0 and not between:
                    stamp = frame.pts if frame.pts is not None else index
                    times.append((stamp, float(stamp * (frame.time_base or 0))))
                if not between:
                    scaler.scale(frame, frames[clip, position])
                    clip += position == num_frames - 1
            index += 1
    return index, times


class _Scaler:
    """Scales frames to cover height x width, turned as their metadata says, and crops the middle."""

    def __init__(self, *, height: int, width: int, pixel_aspect: Fraction | None) -> None:
        self._height, self._width = height, width
        # Width of a pixel over its height; values that no camera makes come from damaged headers.
        self._aspect = pixel_aspect if pixel_aspect and Fraction(1, 8) <= pixel_aspect <= 8 else Fraction(1)
        self._reformatter = VideoReformatter()  # keeps swscale's tables from frame to frame

    def scale(self, frame: Any, out: Frames) -> None:
        """Writes the frame into `out`, uint8 (H, W, 3)."""
        turns = round(frame.rotation / 90) % 4  # counter-clockwise
        height, width = (self._width, self._height) if turns % 2 else (self._height, self._width)
        shown = frame.width * self._aspect
        factor = max(Fraction(height) / frame.height, Fraction(width) / shown)
        tall, wide = max(height, round(frame.height * factor)), max(width, round(shown * factor))
        if tall * wide > MAX_PIXELS:
            raise VideoError(
                "decode", "frame-too-large", f"{frame.width} x {frame.height} would be {wide} x {tall} scaled"
            )
        # One pass from the codec's colours at full size to RGB at the small size; one thread, as for decoding.
        scaled = self._reformatter.reformat(
            frame, width=wide, height=tall, format="rgb24", interpolation=_SCALING, threads=1
        )
        plane = scaled.planes[0]
        pixels = (
            np.frombuffer(memoryview(plane), np.uint8)
            .reshape(-1, plane.line_size)[:tall, : wide * 3]
            .reshape(tall, wide, 3)
        )
        top, left = (tall - height) // 2, (wide - width) // 2
        out[:] = np.rot90(pixels[top : top + height, left : left + width], turns)
