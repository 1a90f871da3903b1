"""Decodes the frames of a video that are needed, scaled and cropped.

A video is read twice: once without decoding, which finds its time stamps and cut files, and once decoding, which keeps
only the frames of the chosen clips. So memory holds one decoded frame and one clip, however long the video. A video
with any damage is rejected as a whole: what a decoder conceals is not footage.

A decoder may hang or crash, and nothing here can help that: `decoder.py` runs it in a process of its own.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np

from vmoco.data.clips import ClipPlan, Int64Array, clip_indices, clip_span
from vmoco.data.container import Source, decoded, errors, open_video, video_stream
from vmoco.data.frames import Frames
from vmoco.data.ledger import NOT_SEEKABLE, VideoError
from vmoco.data.parts import Part
from vmoco.data.scale import MAX_PIXELS, Scaler

# Formats that keep the time at which each frame is shown. Elsewhere FFmpeg guesses, and guesses otherwise after a seek.
_SEEKABLE = {"mov", "matroska"}
# Formats whose header states how long they should be; elsewhere FFmpeg estimates the length from what is there.
_DURATION_IN_HEADER = {"mov", "matroska", "flv", "asf"}


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The frames of a video, found without decoding: a good guess, but the decoder has the last word."""

    times: Int64Array
    """int64 (F,): time stamps of the frames in the order in which they are shown, in units of `time_base`."""
    keyframes: Int64Array
    """Time stamps of frames at which decoding can begin; empty where that cannot be known."""
    time_base: Fraction
    """Seconds."""
    fps: float
    """Frames per second, the mean over the video."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is known of the clips of one video or part; their pixels went to the sink."""

    start_times: list[int]
    """Time stamp of the first frame of each clip, in the video's own unit."""
    start_seconds: list[float]
    """The same in seconds."""
    fps: float
    """Frames per second of the video."""


class Sink(Protocol):
    """Takes the clips of a video, one after the other."""

    def add(self, frames: Frames) -> None:
        """Takes a clip, uint8 (T, H, W, 3), RGB; the array is used again afterwards."""

    def restart(self) -> None:
        """Forgets the clips: they are all decoded anew."""


def probe(source: Source) -> Timeline:
    """Reads a video without decoding it.

    Raises:
        VideoError: it is no video, or it is cut off.
    """
    with errors("probe", "cannot-open"), open_video(source) as container:
        return _probe(container)


def cut_clips(source: Source, plan: ClipPlan, *, height: int, width: int, sink: Sink) -> Cut:
    """Decodes the clips of a video, scaled to cover height x width and cropped in the middle.

    Raises:
        VideoError: the video is damaged or too short.
    """
    timeline = probe(source)
    indices = clip_indices(timeline.times, timeline.time_base, plan)
    # A codec may hold back or hide frames, so the guess can be off; the second time the frames are the decoder's own.
    # A third count would mean that decoding is not repeatable.
    for _ in range(3):
        sink.restart()
        collector = _Collector(indices, sink, height=height, width=width)
        with errors("decode", "decode-error"), open_video(source) as container:
            times, time_base = _decode(container, collector)
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
    firsts, starts = indices[:, 0], times[indices[:, 0]]
    if ((np.diff(starts) < 0) | ((np.diff(starts) == 0) & (np.diff(firsts) > 0))).any():
        raise VideoError("clip", "bad-timestamps", "time stamps do not increase from clip to clip")
    return Cut(starts.tolist(), [float(at * time_base) for at in starts.tolist()], timeline.fps)


def cut_part(source: Source, part: Part, *, height: int, width: int, sink: Sink) -> list[float]:
    """Decodes the clips of a part of a long video: the same pixels as `cut_clips` gives.

    Returns:
        The first second of each clip.

    Raises:
        VideoError: NOT_SEEKABLE, where the part does not hold just the frames that it should.
    """
    try:
        with errors("decode", NOT_SEEKABLE), open_video(source) as container:
            return _decode_part(container, part, sink, height=height, width=width)
    except VideoError as error:
        raise VideoError("decode", NOT_SEEKABLE, error.message) from None


def _probe(container: Any) -> Timeline:
    stream = video_stream(container)
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise VideoError("probe", "frame-too-large", f"{width} x {height}, and at most {MAX_PIXELS} pixels are decoded")
    count, end, corrupt = 0, 0.0, False
    seekable = not _SEEKABLE.isdisjoint(container.format.name.split(","))
    times, keyframes = [], []
    for packet in container.demux():
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream is stream and packet.size:  # the last, empty packet of each stream only ends it
            corrupt = corrupt or packet.is_corrupt
            seekable = seekable and packet.pts is not None and not packet.is_discard
            if not packet.is_discard:
                count += 1
                if stamp is not None:
                    times.append(stamp)
                if packet.is_keyframe:
                    keyframes.append(stamp)
    if corrupt:
        raise VideoError("probe", "truncated", f"one of its {count} packets is incomplete")
    _check_length(container, stream, count=count, end=end)
    times.sort()
    spread = times[-1] - times[0] if times else 0
    fps = (len(times) - 1) / (spread * stream.time_base) if spread else stream.average_rate or 0
    if len(times) < count:  # a bare stream: frames are counted
        times = list(range(count))
    if not seekable or len(set(times)) < count:
        keyframes = []
    return Timeline(np.array(times, np.int64), np.array(keyframes, np.int64), stream.time_base, float(fps))


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


def _decode(container: Any, collector: _Collector) -> tuple[Int64Array, Fraction]:
    """Decodes the whole video; returns the times of its frames and their unit."""
    stream = video_stream(container)
    collector.scaler.pixel_aspect = stream.sample_aspect_ratio
    times: list[int] = []
    for frame in decoded(container, stream):
        if frame.is_corrupt:
            raise VideoError("decode", "decode-error", f"frame {len(times)} is damaged")
        collector.take(len(times), frame)
        times.append(frame.pts if frame.pts is not None else len(times))
    return np.array(times, np.int64), stream.time_base


def _decode_part(container: Any, part: Part, sink: Sink, *, height: int, width: int) -> list[float]:
    stream = video_stream(container)
    sink.restart()
    wanted = np.array(part.clips or np.empty((0, 0)), np.int64)
    collector = _Collector(wanted, sink, height=height, width=width)
    collector.scaler.pixel_aspect = stream.sample_aspect_ratio
    last = max((max(clip) for clip in part.clips), default=part.start)
    container.seek(part.start, stream=stream, backward=True)
    count = 0
    for frame in decoded(container, stream):
        if frame.pts is None:
            raise VideoError("decode", NOT_SEEKABLE, "a frame has no time stamp")
        if frame.pts < part.start:  # of the part before: shown earlier, or the seek went back further
            continue
        if frame.is_corrupt or (not count and not (frame.pts == part.start and frame.key_frame)):
            raise VideoError("decode", NOT_SEEKABLE, f"decoding does not begin at {part.start}")
        if part.end is None or frame.pts < part.end:
            count += 1
        elif frame.pts > last:
            return _part_seconds(part, stream, count=count, collector=collector)
        collector.take(frame.pts, frame)
    return _part_seconds(part, stream, count=count, collector=collector)


def _part_seconds(part: Part, stream: Any, *, count: int, collector: _Collector) -> list[float]:
    if count != part.num_frames or not collector.complete:
        raise VideoError("decode", NOT_SEEKABLE, f"{count} frames from {part.start}, and should be {part.num_frames}")
    return [float(clip[0] * stream.time_base) for clip in part.clips]


class _Collector:
    """Takes the decoded frames of a video in turn, and hands those of each clip to the sink once it has them all."""

    def __init__(self, wanted: Int64Array, sink: Sink, *, height: int, width: int) -> None:
        """`wanted` is (N, T): what each frame of each clip is called, increasing from clip to clip."""
        self._sink = sink
        self._lasts = wanted.max(axis=1).tolist() if wanted.size else []
        self._places = [{name: np.flatnonzero(clip == name) for name in clip.tolist()} for clip in wanted]
        self._clip = 0
        self._frames = np.empty((wanted.shape[1] if wanted.size else 0, height, width, 3), np.uint8)
        self.scaler = Scaler(height=height, width=width)

    @property
    def complete(self) -> bool:
        """Whether every clip was handed over."""
        return self._clip == len(self._places)

    def take(self, name: int, frame: Any) -> None:
        """Takes a frame; two clips, or two places of one, may want the same."""
        scaled = None
        while self._clip < len(self._places) and name in self._places[self._clip]:
            scaled = self.scaler.scale(frame) if scaled is None else scaled
            self._frames[self._places[self._clip][name]] = scaled
            if name != self._lasts[self._clip]:
                return
            self._sink.add(self._frames)
            self._clip += 1
