"""Finds which stretches of a damaged video are sound, so that clips are cut from these alone.

A decoder conceals damage: it fills a frame from its neighbours, or goes on with references that are wrong. So a report
of damage makes every frame unsound from there to the next key frame, where decoding starts again with an empty decoder.
A report is whatever FFmpeg has for it: an error, a line of its log, or a flag of a packet or a frame.

    packets   K . . . . . K . . . X . . . . . K L L . . .     K key frame, X report, L shown before its key frame
    sound     yes yes yes yes yes  no  no  no     yes yes

The whole video is walked twice: `survey` finds the stretches, and the second walk keeps pixels. A video without damage
is never walked, so it costs nothing there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np
import numpy.typing as npt

from vmoco.data.clips import ClipPlan, Int64Array, in_range
from vmoco.data.ledger import Damage, VideoError

_Log = list[tuple[int, str, str]]
"""Lines that FFmpeg logged: level, part of FFmpeg, text."""

LEVEL = av.logging.INFO
"""Level of the log that is read: some codecs mention concealed blocks only as information."""
# Below the level of errors, lines with these words report damage, and others do not ("Increasing reorder buffer").
_MINOR = re.compile(r"conceal|corrupt|damaged|\berror|discarding|skip", re.IGNORECASE)
# Errors that concern no picture.
_HARMLESS = re.compile(r"SEI type|unable to decode APP|User data|Referenced QT chapter track")
# Here FFmpeg finds the borders of frames itself, so a packet may hold the damage of the one after it.
_PARSED = {"mpegts", "mpeg", "mpegvideo", "h264", "hevc", "m4v"}
# A decoder holds back at most 16 frames; a frame that is missing this near to damage is lost.
_MOST_DELAYED = 17
_REPEATING_BYTES = 32
"""Largest size of a packet that only says that the frame before stays."""
_WITH_HIDDEN_FRAMES = {"vp8", "vp9", "av1"}
_DEMUX_ERRORS = 3
"""Errors in a row after which a file is read no further."""


def report_in(log: _Log, *, ignored: frozenset[str] = frozenset()) -> str | None:
    """The first line that reports damage, or None; the log is empty afterwards.

    Args:
        log: Lines since the last call.
        ignored: Parts of FFmpeg whose lines do not count, such as the codecs of other streams.
    """
    if not log:
        return None
    lines = [(level, part, " ".join(text.split())) for level, part, text in log]
    log.clear()
    for level, part, text in lines:
        counts = level <= av.logging.ERROR or _MINOR.search(text)
        if counts and part not in ignored and part != "swscaler" and not _HARMLESS.search(text):
            return f"{part}: {text}"
    return None


def other_parts(container: Any, stream: Any) -> frozenset[str]:
    """Names under which the codecs of the other streams log."""
    others = [each.codec_context for each in container.streams if each is not stream and each.codec_context]
    names = {name for each in others for name in (each.name, each.codec.canonical_name)}
    return frozenset(names - {stream.codec_context.name, stream.codec_context.codec.canonical_name})


def packets(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of a file; in place of one that cannot be read, the error, after which reading goes on."""
    errors = 0
    found = container.demux(*streams)
    while errors < _DEMUX_ERRORS:
        try:
            packet = next(found)
        except StopIteration:
            return
        except IndexError:  # PyAV, at the end of a file in which a stream appeared late
            return
        except av.error.FFmpegError as error:
            errors += 1
            found = container.demux(*streams)
            yield error
        else:
            errors = 0
            yield packet


def shows_a_frame(packet: Any) -> bool:
    """Whether a frame must come of a packet: not of the short ones that repeat the frame before, nor of hidden ones."""
    hidden = packet.stream.codec_context.codec.canonical_name in _WITH_HIDDEN_FRAMES
    return bool(packet.size > _REPEATING_BYTES and not packet.is_discard and not hidden)


def never_shown(expected: Int64Array, shown: Int64Array) -> Int64Array:
    """Times of frames that a decoder left out without a word: those that leave a hole in the times of the others.

    Args:
        expected: int64, times of packets of which a frame must come.
        shown: int64, times of the decoded frames.
    """
    times = np.unique(shown)
    missing = np.setdiff1d(expected, times)
    if len(times) < 2 or not len(missing):
        return np.empty(0, np.int64)
    steps = np.diff(times)
    after = np.searchsorted(times, missing)
    between = (after > 0) & (after < len(times))
    holes = steps[np.clip(after - 1, 0, len(steps) - 1)] > 1.5 * np.median(steps)
    return missing[between & holes]


class Taker(Protocol):
    """Receives decoded frames, each with its number among those that the decoder gives."""

    def take(self, name: int, frame: Any) -> None:
        """Receives a frame."""


class CutOffError(VideoError):
    """A file that ends before its header says: the length that the header promises."""

    def __init__(self, message: str, *, promised: float) -> None:
        super().__init__("probe", "truncated", message)
        self.promised = promised
        """Seconds at which the video should end."""


@dataclasses.dataclass
class _Packet:
    time: int | None
    shown: bool
    """Whether the file wants its frame to be shown."""
    expected: bool
    """Whether a frame must come of it."""
    key: bool


class _Tag:
    """Goes with a packet through the decoder. PyAV tells tags apart by identity, so a plain number will not do."""

    def __init__(self, packet: int) -> None:
        self.packet = packet


class _Walk:
    """One decoding from end to end that starts again at the first key frame after each damage."""

    def __init__(self, container: Any, stream: Any, log: _Log) -> None:
        self._container, self._stream, self._log = container, stream, log
        self._context = stream.codec_context
        self._context.copy_opaque = True
        self._ignored = other_parts(container, stream)
        self._parsed = not _PARSED.isdisjoint(container.format.name.split(","))
        self.packets: list[_Packet] = []
        self.frames: list[tuple[int, int | None]] = []
        """Packet and time of each frame, in the order of the decoder."""
        self.unsound: list[tuple[int, int]] = []
        """Packets from which, and before which, nothing is sound."""
        self.gaps: list[int] = []
        """Packets before which others may be missing."""
        self.leading: set[int] = set()
        """Packets that are shown before the key frame at which decoding started again, and refer to damage."""
        self.message = ""
        """The first report."""
        self._from: int | None = None
        self._no_restart_before = 0
        self._restart: int | None = None
        self._shown_from: int | None = None

    def run(self, taker: Taker | None = None) -> None:
        """Decodes everything; `taker` gets the frames."""
        self._log.clear()  # what was logged while the file was opened concerns the streams, and not a packet
        for packet in packets(self._container, self._stream):
            self._log_report(len(self.packets), demuxing=True)
            if isinstance(packet, av.error.FFmpegError):
                self._report(len(self.packets), _text(packet), demuxing=True)
            elif packet.size:
                self._packet(packet, taker)
        self._drain(taker)
        self.gaps.append(len(self.packets))  # a file that is cut off may lack frames that are shown before its last one
        if self._from is not None:
            self.unsound.append((self._from, len(self.packets)))

    def _packet(self, packet: Any, taker: Taker | None) -> None:
        number = len(self.packets)
        time = packet.pts if packet.pts is not None else packet.dts
        self.packets.append(_Packet(time, not packet.is_discard, shows_a_frame(packet), packet.is_keyframe))
        if packet.is_corrupt:
            self._report(number, f"packet {number} is incomplete", demuxing=self._parsed)
        if self._from is not None:
            if not packet.is_keyframe or number < self._no_restart_before or packet.is_corrupt:
                return
            self._drain(taker)
            self._context.flush_buffers()
            self.unsound.append((self._from, number))
            self._from, self._restart, self._shown_from = None, number, packet.pts
        elif self._shown_from is not None:
            if packet.pts is not None and packet.pts < self._shown_from:
                self.leading.add(number)
                return
            self._shown_from = None
        packet.opaque = _Tag(number)
        self._decode(packet, number, taker)

    def _drain(self, taker: Taker | None) -> None:
        """Takes the frames that the decoder still holds."""
        self._decode(None, len(self.packets), taker)

    def _decode(self, packet: Any, number: int, taker: Taker | None) -> None:
        try:
            found = self._context.decode(packet)
        except EOFError:  # drained already
            found = []
        except av.error.FFmpegError as error:
            _check_memory(self._context)
            found = []
            self._report(number, _text(error))
        self._log_report(number)
        for frame in found:
            owner = frame.opaque.packet if frame.opaque is not None else 0
            if frame.opaque is None:
                self._report(0, "a frame belongs to no packet")
            if frame.is_corrupt:
                self._report(owner, f"the frame of packet {owner} is marked as damaged")
            if owner == self._restart:
                self._restart = None
                if not frame.key_frame:
                    self._report(owner, f"decoding cannot begin at packet {owner}")
            if taker:
                taker.take(len(self.frames), frame)
                self._log.clear()  # of scaling
            self.frames.append((owner, frame.pts))

    def _log_report(self, number: int, *, demuxing: bool = False) -> None:
        message = report_in(self._log, ignored=self._ignored)
        if message:
            self._report(number, message, demuxing=demuxing)

    def _report(self, number: int, message: str, *, demuxing: bool = False) -> None:
        """Notes damage at a packet, or between it and the one before."""
        self.message = self.message or message
        first = number
        if demuxing:
            self.gaps.append(number)
            first -= int(self._parsed)
        self._from = min(first, number if self._from is None else self._from)
        after = len(self.packets) if not (demuxing and self._parsed) else number + 2
        self._no_restart_before = max(self._no_restart_before, after)


def _text(error: av.error.FFmpegError) -> str:
    log: Any = error.log
    return f"{log[1]}: {' '.join(log[2].split())}" if log else str(error.strerror or type(error).__name__)


def _check_memory(context: Any) -> None:
    # Some codecs report a frame for which memory is short as a damaged one: this allocation fails too then.
    np.empty((context.height, context.width, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class Survey:
    """The frames of a damaged video in display order, the lost ones among them."""

    times: Int64Array
    """int64 (F,): time stamp of each frame, or its number where the file has none."""
    frames: Int64Array
    """int64 (F,): number of each frame among those that the decoder gives; -1 for a lost one."""
    message: str
    """The first report of damage; empty if there is none."""

    @property
    def damaged(self) -> bool:
        """Whether any frame is lost."""
        return bool((self.frames < 0).any())

    @property
    def ordered(self) -> bool:
        """Whether the sound frames come from the decoder in the order of their time stamps."""
        return bool((np.diff(self.frames[self.frames >= 0]) > 0).all())

    def keep(self, indices: Int64Array) -> Int64Array:
        """Those of the clips, int64 (N, T), that lie in one sound stretch each, from first to last frame."""
        if not len(indices):
            return indices
        lost = np.concatenate([[0], np.cumsum(self.frames < 0)])
        return indices[lost[indices.max(axis=1) + 1] == lost[indices.min(axis=1)]]


def survey(container: Any, stream: Any, log: _Log) -> Survey:
    """Decodes a video from end to end, and finds what of it is sound.

    Args:
        container: PyAV's container, just opened.
        stream: Its video stream, set up for decoding.
        log: The list that receives FFmpeg's log, at `LEVEL`.
    """
    walk = _Walk(container, stream, log)
    walk.run()
    return _survey(walk)


def take_again(container: Any, stream: Any, log: _Log, *, taker: Taker, found: Survey) -> None:
    """Decodes once more as `survey` did, and hands over the frames.

    Raises:
        VideoError: the frames are not those of the survey.
    """
    walk = _Walk(container, stream, log)
    walk.run(taker)
    again = _survey(walk)
    if not (np.array_equal(again.times, found.times) and np.array_equal(again.frames, found.frames)):
        raise VideoError("decode", "decode-error", f"the frames change between two readings: {len(again.times)}")


def _survey(walk: _Walk) -> Survey:
    sound = np.ones(len(walk.packets), bool)
    for first, end in walk.unsound:
        sound[max(0, first) : end] = False
    sound[list(walk.leading)] = False
    sound[_silent(walk, sound)] = False
    # Each entry is a frame, or a packet without one: (stretch, time, order, number of the frame or -1).
    borders = sorted({end for _, end in walk.unsound})

    def stretch(packet: float) -> int:
        return int(np.searchsorted(borders, packet, side="right"))

    entries: list[tuple[int, int | None, float, int]] = []
    for number, (packet, time) in enumerate(walk.frames):
        entries.append((stretch(packet), time, packet, number if sound[packet] else -1))
    given = {packet for packet, _ in walk.frames}
    near = np.zeros(len(sound), bool)
    for first, _ in walk.unsound:
        near[max(0, first - _MOST_DELAYED) : max(0, first)] = True
    for packet, about in enumerate(walk.packets):
        if packet not in given and about.shown and (not sound[packet] or near[packet]):
            entries.append((stretch(packet), about.time, packet, -1))
    timed = all(time is not None for _, time in walk.frames)
    for gap in sorted(set(walk.gaps)):
        missing = _missing(walk.packets, gap) if timed else [None]
        entries += [(stretch(gap - 0.5), time, gap - 0.5, -1) for time in missing]
    if timed:
        entries = [entry for entry in entries if entry[1] is not None]
        entries.sort(key=lambda entry: (entry[0], entry[1], entry[2]))
    else:  # the order of the decoder is that of display
        entries.sort(key=lambda entry: entry[0])
    times = [time if timed and time is not None else place for place, (_, time, _, _) in enumerate(entries)]
    return Survey(np.array(times, np.int64), np.array([entry[3] for entry in entries], np.int64), walk.message)


def _silent(walk: _Walk, sound: npt.NDArray[np.bool_]) -> list[int]:
    """Sound packets whose frame the decoder left out without a word, and those that refer to it."""
    packets = walk.packets
    shown = np.array([time for _, time in walk.frames if time is not None], np.int64)
    fed = [number for number, about in enumerate(packets) if sound[number] and about.expected]
    expected = np.array([time for number in fed if (time := packets[number].time) is not None], np.int64)
    times = set(never_shown(expected, shown).tolist())
    found: list[int] = []
    for number in [number for number in fed if packets[number].time in times]:
        key: int | None = None
        for after in range(number, len(packets)):
            time = packets[after].time
            if key is None and packets[after].key and after > number:
                key = time
            elif key is None or (time is not None and time < key):
                found.append(after)
            else:
                break
    return found


def _missing(packets: list[_Packet], gap: int) -> list[int]:
    """Times at which frames are missing around a gap before a packet: one for each step of time without a packet."""
    times = sorted({about.time for about in packets if about.time is not None})
    steps = np.diff(times)
    if not len(steps):
        return []
    step = float(np.median(steps))
    near = [
        about.time for about in packets[max(0, gap - _MOST_DELAYED) : gap + _MOST_DELAYED] if about.time is not None
    ]
    missing: list[int] = []
    for at in np.flatnonzero(steps > 1.5 * step).tolist():
        if near and min(near) <= times[at] <= max(near):
            # A wrong time stamp may be years away; one frame then stands for all.
            count = min(round(float(steps[at]) / step) - 1, len(times))
            missing += [times[at] + round((place + 1) * step) for place in range(count)]
    return missing


def assess(found: Survey, time_base: Fraction, plan: ClipPlan, *, promised: float | None, message: str) -> Damage:
    """What of a video, or of the range that the plan asks for, is lost.

    Args:
        found: The survey.
        time_base: Seconds of one unit of its time stamps.
        plan: Its range counts.
        promised: Seconds at which the header says that the video ends, where the file ends before.
        message: Used where decoding reports nothing.
    """
    times = found.times
    if not len(times):
        return Damage(lost=(), percent=100.0, message=found.message or message)
    unit = float(time_base)
    steps = np.maximum(np.diff(times), 0)
    lengths = np.append(steps, np.median(steps[steps > 0]) if (steps > 0).any() else 1) * unit
    inside = np.zeros(len(times), bool)
    inside[in_range(times, time_base, plan)] = True
    bad = inside & (found.frames < 0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], bad.astype(np.int8), [0]])))
    lost = [
        (float(times[first]) * unit, float(times[end - 1]) * unit + float(lengths[end - 1]))
        for first, end in edges.reshape(-1, 2).tolist()
    ]
    gone, total = float(lengths[bad].sum()), float(lengths[inside].sum())
    end = float(times[-1]) * unit + float(lengths[-1])
    limit = np.inf if plan.end_seconds is None else float(times[0]) * unit + plan.end_seconds
    if promised is not None and (until := min(promised, limit)) > end:
        lost.append((end, float(until)))
        gone, total = gone + until - end, total + until - end
    percent = 100 * gone / total if total else 100.0
    return Damage(_joined(lost), round(percent, 2), found.message or message)


def _joined(lost: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Stretches in milliseconds; those that touch are one."""
    joined: list[tuple[float, float]] = []
    for start, end in lost:
        if joined and start - joined[-1][1] < 1e-3:
            start = joined.pop()[0]
        joined.append((round(start, 3), round(end, 3)))
    return tuple(joined)
