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
import itertools
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from vmoco.data.clips import ClipPlan, Int64Array, in_range
from vmoco.data.collector import Collector
from vmoco.data.container import packets
from vmoco.data.ledger import Damage, VideoError
from vmoco.data.reports import Log, around, hides_frames, never_shown, other_parts, report_in, shows_a_frame
from vmoco.data.timeline import Timeline, filled, lay_out, on_clock

# Here FFmpeg finds the borders of frames itself, so a packet may hold the damage of the one after it.
_PARSED = {"mpegts", "mpeg", "mpegvideo", "h264", "hevc", "m4v"}
# A decoder holds back at most 16 frames; a frame that is missing this near to damage is lost.
_MOST_DELAYED = 17


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


_Take = Callable[[int, Any], None]
"""Receives decoded frames, each with its number among those that the decoder gives."""


class _Walk:
    """One decoding from end to end that starts again at the first key frame after each damage."""

    def __init__(
        self, container: Any, stream: Any, log: Log, *, seams: tuple[int, ...], cut_in: tuple[int, ...]
    ) -> None:
        self._container, self._stream, self._log = container, stream, log
        self.seams, self._cut_in = seams, cut_in
        self._around = around(seams)
        self._context = stream.codec_context
        self._context.copy_opaque = True
        self._ignored = other_parts(container, stream)
        self._hides = hides_frames(self._context.codec.canonical_name)
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
        self.marked: set[int] = set()
        """Packets around a seam that FFmpeg takes for incomplete."""
        self.message = ""
        """The first report."""
        self._from: int | None = None
        self._no_restart_before = 0
        self._restart: int | None = None
        self._shown_from: int | None = None

    def run(self, taker: _Take | None = None) -> None:
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

    def _packet(self, packet: Any, taker: _Take | None) -> None:
        number = len(self.packets)
        time = packet.pts if packet.pts is not None else packet.dts
        shown = not packet.is_discard
        expected = shown and shows_a_frame(packet.size, hides=self._hides)
        self.packets.append(_Packet(time, shown, expected, packet.is_keyframe))
        corrupt = packet.is_corrupt and number not in self._around
        if corrupt:
            self._report(number, f"packet {number} is incomplete", demuxing=self._parsed)
        elif packet.is_corrupt:
            self.marked.add(number)
        if number in self._cut_in:  # also where it is a key frame: frames may be shown before it
            self._from = number if self._from is None else self._from
        if self._from is not None:
            if not packet.is_keyframe or number < self._no_restart_before or corrupt:
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

    def _drain(self, taker: _Take | None) -> None:
        """Takes the frames that the decoder still holds."""
        self._decode(None, len(self.packets), taker)

    def _decode(self, packet: Any, number: int, taker: _Take | None) -> None:
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
                taker(len(self.frames), frame)
                self._log.clear()  # of scaling
            self.frames.append((owner, frame.pts))

    def _log_report(self, number: int, *, demuxing: bool = False) -> None:
        near_seam = number in self._around
        message = report_in(self._log, ignored=self._ignored, stream=self._stream.index, near_seam=near_seam)
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

    line: Timeline
    """Their times, seams and doubtful frames."""
    frames: Int64Array
    """int64 (F,): number of each frame among those that the decoder gives; -1 for a lost one."""
    message: str
    """The first report of damage; empty if there is none."""
    seams: tuple[int, ...] = ()
    """Numbers of the packets at which another recording begins."""

    @property
    def damaged(self) -> bool:
        """Whether any frame is lost."""
        return bool((self.frames < 0).any())

    @property
    def ordered(self) -> bool:
        """Whether the sound frames come from the decoder in the order of their time stamps."""
        return bool((np.diff(self.frames[self.frames >= 0]) > 0).all())

    def is_sound(self, indices: Int64Array) -> npt.NDArray[np.bool_]:
        """Whether each of the clips, int64 (N, T), lies in one sound stretch, from first to last frame: bool (N,)."""
        if not len(indices):
            return np.zeros(0, bool)
        lost = np.concatenate([[0], np.cumsum(self.frames < 0)])
        sound: npt.NDArray[np.bool_] = lost[indices.max(axis=1) + 1] == lost[indices.min(axis=1)]
        return sound


def survey(container: Any, stream: Any, log: Log, line: Timeline) -> Survey:
    """Decodes a video from end to end, and finds what of it is sound.

    Args:
        container: PyAV's container, just opened.
        stream: The film, set up for decoding.
        log: The list that receives FFmpeg's log, at `reports.LEVEL`.
        line: What probing found: its seams count.
    """
    walk = _Walk(container, stream, log, seams=line.seams, cut_in=line.cut_in)
    walk.run()
    return _survey(walk, stream, line)


def take_again(container: Any, stream: Any, log: Log, *, collector: Collector, found: Survey) -> None:
    """Decodes once more as `survey` did, and hands over the sound frames.

    Raises:
        VideoError: the frames are not those of the survey.
    """
    # Deinterlacing must not mix a frame with one that is lost, or with one of another recording.
    first = np.ones(len(found.frames), bool)
    first[1:] = found.frames[:-1] < 0
    first[list(found.line.seams)] = True
    begins = dict(zip(found.frames.tolist(), first.tolist(), strict=True))

    def take(number: int, frame: Any) -> None:
        if number in begins:
            if begins[number]:
                collector.flush()
            collector.take(number, frame)

    walk = _Walk(container, stream, log, seams=found.seams, cut_in=found.line.cut_in)
    walk.run(take)
    collector.flush()
    again = _survey(walk, stream, found.line)
    if not (np.array_equal(again.line.times, found.line.times) and np.array_equal(again.frames, found.frames)):
        raise VideoError("decode", "decode-error", f"the frames change between two readings: {len(again.frames)}")


def _survey(walk: _Walk, stream: Any, line: Timeline) -> Survey:
    sound = np.ones(len(walk.packets), bool)
    for first, end in walk.unsound:
        sound[max(0, first) : end] = False
    sound[list(walk.leading)] = False
    sound[_silent(walk, sound)] = False
    # Each entry is a frame, or a packet without one: (recording, stretch, time, order, number of the frame or -1).
    borders = sorted({end for _, end in walk.unsound})

    def entry(packet: float, time: int | None, frame: int) -> tuple[int, int, int | None, float, int]:
        recording, stretch = (int(np.searchsorted(each, packet, side="right")) for each in (walk.seams, borders))
        return recording, stretch, time, packet, frame

    known = filled([time for _, time in walk.frames])
    timed = known is not None
    times: list[int | None] = [None] * len(walk.frames) if known is None else known.tolist()
    entries = [
        entry(packet, time, number if sound[packet] else -1)
        for number, ((packet, _), time) in enumerate(zip(walk.frames, times, strict=True))
    ]
    given = {packet for packet, _ in walk.frames}
    near = np.zeros(len(sound), bool)
    for first, _ in walk.unsound:
        near[max(0, first - _MOST_DELAYED) : max(0, first)] = True
    for packet, about in enumerate(walk.packets):
        if packet not in given and about.shown and (not sound[packet] or near[packet]):
            entries.append(entry(packet, about.time, -1))
    for gap in sorted(set(walk.gaps)):
        recording = int(np.searchsorted(walk.seams, gap - 0.5))
        low, high = (0, *walk.seams)[recording], (*walk.seams, len(walk.packets))[recording]
        missing = _missing(walk.packets[low:high], gap - low) if timed else [None]
        entries += [entry(gap - 0.5, time, -1) for time in missing]
    if timed:
        entries = [each for each in entries if each[2] is not None]
        entries.sort(key=lambda each: each[:4])
    else:  # the order of the decoder is that of display
        entries.sort(key=lambda each: each[:2])
    frames = np.array([each[4] for each in entries], np.int64)
    seams = np.flatnonzero(np.diff([each[0] for each in entries])) + 1
    marked = {seam for seam in walk.seams if not walk.marked.isdisjoint({seam - 2, seam - 1})}
    doubtful = {seam - back for seam in marked for back in (1, 2)}
    counted = not timed and stream.average_rate
    stamps = [each[2] for each in entries] if timed else range(len(entries))
    found = dataclasses.replace(
        line,
        times=lay_out(np.array(stamps, np.int64), tuple(seams.tolist())),
        time_base=1 / stream.average_rate if counted else stream.time_base,
        seams=tuple(seams.tolist()),
        doubtful=tuple(place for place, each in enumerate(entries) if each[3] in doubtful),
    )
    return Survey(found, frames, walk.message, walk.seams)


def _silent(walk: _Walk, sound: npt.NDArray[np.bool_]) -> list[int]:
    """Sound packets whose frame the decoder left out without a word, and those that refer to it."""
    packets = walk.packets
    found: list[int] = []
    for low, high in itertools.pairwise((0, *walk.seams, len(packets))):
        shown = [time for packet, time in walk.frames if low <= packet < high and time is not None]
        fed = [number for number in range(low, high) if sound[number] and packets[number].expected]
        expected = [time for number in fed if (time := packets[number].time) is not None]
        times = set(never_shown(np.array(expected, np.int64), np.array(shown, np.int64)).tolist())
        for number in [number for number in fed if packets[number].time in times]:
            key: int | None = None
            for after in range(number, high):
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


def assess(found: Survey, plan: ClipPlan, *, promised: float | None, message: str) -> Damage:
    """What of a video, or of the range that the plan asks for, is lost.

    Args:
        found: The survey.
        plan: Its range counts.
        promised: Seconds at which the header says that the video ends, where the file ends before.
        message: Used where decoding reports nothing.
    """
    times = found.line.times
    if not len(times):
        return Damage(lost=(), percent=100.0, message=found.message or message)
    unit, plan = float(found.line.time_base), on_clock(plan, found.line)
    steps = np.maximum(np.diff(times), 0)
    lengths = np.append(steps, np.median(steps[steps > 0]) if (steps > 0).any() else 1) * unit
    inside = np.zeros(len(times), bool)
    inside[in_range(times, found.line.time_base, plan)] = True
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
