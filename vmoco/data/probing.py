"""Reads a video without decoding it: which frames it lists, when they are shown, and whether it is cut off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np

from vmoco.data import reports
from vmoco.data.container import choose_stream, ends_whole, film_streams, more_promised, packets, stamps_restart
from vmoco.data.ledger import VideoError
from vmoco.data.opening import Source, errors, open_video, video_stream
from vmoco.data.pixels import MAX_PIXELS
from vmoco.data.timeline import (
    Timeline,
    filled,
    find_cut_in,
    find_seams,
    in_display_order,
    joined_note,
    when_shown,
)

# Formats that store the time of each frame. In others FFmpeg guesses it, and its guess after a seek is another one.
_SEEKABLE = {"mov", "matroska"}
_LONGEST_NOT_CODED = 10
"""Bytes of a frame of MPEG-4 that is not coded, at most: a start code, a time and a flag. The frame before stays."""
# Codecs of which each packet of a sound file gives one frame.
_ONE_FRAME = {"h264", "hevc", "av1", "mpeg1video", "mpeg2video", "mjpeg", "ffv1", "prores", "dnxhd", "png", "rawvideo"}


def probe(source: Source, *, damaged: Literal["drop-clips", "reject"] = "drop-clips") -> Timeline:
    """Reads a video without decoding it.

    Raises:
        VideoError: it is no video; or it is truncated, and damaged videos are rejected.
    """
    with errors("probe", "cannot-open") as log:
        with open_video(source) as container:
            streams = film_streams(container)
            index = streams[0].index
            line = _probe(container, index, source, log) if len(streams) == 1 else None
            index = index if line else choose_stream(container, streams)
        if line is None:
            with open_video(source) as container:
                line = _probe(container, index, source, log)
            note = f"stream-chosen: stream {index} of {len(streams)} video streams is the film"
            line = dataclasses.replace(line, notes=(note, *line.notes))
    if line.broken and damaged == "reject":
        raise line.broken
    return line


def _probe(container: Any, index: int, source: Source, log: list[Any]) -> Timeline:
    stream = video_stream(container, index)
    log.clear()  # of opening it, which concerns no packet
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise VideoError("probe", "frame-too-large", f"{width} x {height}, and at most {MAX_PIXELS} pixels are decoded")
    count = 0
    ends: dict[Any, int] = {}
    broken: VideoError | None = None
    corrupt: list[int] = []
    seekable = not _SEEKABLE.isdisjoint(container.format.name.split(","))
    times: list[int | None] = []
    order: list[int | None] = []
    keys: list[bool] = []
    expected: list[tuple[int, int]] = []
    contradiction = ""
    codec = stream.codec_context.codec.canonical_name
    hides, exact = reports.hides_frames(codec), codec in _SAID or codec in _ONE_FRAME
    count_shown = _SAID.get(codec) or _units(codec, stream.codec_context.extradata)
    for packet in packets(container):
        if isinstance(packet, av.error.FFmpegError):
            broken = broken or VideoError("probe", "truncated", f"packet {count} cannot be read: {packet.strerror}")
            continue
        shown, decoded, own = packet.pts, packet.dts, packet.stream
        stamp = decoded if shown is None else shown
        if stamp is not None and (until := stamp + (packet.duration or 0)) > ends.get(own, 0):
            ends[own] = until
        if own is stream and (size := packet.size):  # the last, empty packet of each stream only ends it
            if packet.is_corrupt:
                corrupt.append(count)
            if packet.is_discard:
                seekable = False
                continue
            if shown is None:
                seekable = False
            if exact and count_shown and count_shown(packet) != 1:
                exact = False
                contradiction = "" if codec in _SAID else f"packet {count} does not end where its contents end"
            times.append(stamp)
            order.append(stamp if decoded is None else decoded)
            if stamp is not None and reports.shows_a_frame(size, hides=hides):
                expected.append((count, stamp))
            keys.append(packet.is_keyframe)
            count += 1
    # Where the container is damaged, frames may be missing from the list.
    report = reports.report_in(log, ignored=reports.other_parts(container, stream), stream=index)
    if exact and report:
        exact, contradiction = False, report
    end = max((float(until * own.time_base) for own, until in ends.items()), default=0.0)
    time_base = stream.time_base
    decoding = filled(order)
    if decoding is None:  # a bare stream: frames are counted
        stamps = decoding = np.arange(count)
        time_base = 1 / stream.average_rate if stream.average_rate else time_base
    else:
        stamps = when_shown(times, decoding)
    seams = find_seams(decoding, time_base, restarts=stamps_restart(container))
    # The counter of MPEG-TS jumps at a seam, which marks one of the last two packets before it.
    marked = [seam for seam in seams if {seam - 2, seam - 1}.intersection(corrupt)]
    doubtful = {seam - back for seam in marked for back in (1, 2)}
    if incomplete := [number for number in corrupt if number not in doubtful]:
        broken = broken or VideoError("probe", "truncated", f"packet {incomplete[0]} is incomplete")
    if cut_in := find_cut_in(stamps, decoding, keys, seams):
        message = f"the recording that begins at packet {cut_in[0]} lacks the frames that its first ones refer to"
        broken = broken or VideoError("probe", "truncated", message)
    line, places = in_display_order(stamps, seams)
    notes: tuple[str, ...] = ()
    if promised := more_promised(container, stream, last=int(stamps.max()) if count else None, end=end):
        if count >= stream.frames > 0 or ends_whole(source, container.format.name):
            notes = (f"header-says-more: {promised.message}",)
        else:
            broken = promised
    notes += joined_note(seams)
    spread = int(line[-1] - line[0]) if len(line) else 0
    fps = (len(line) - 1) / (spread * time_base) if spread else stream.average_rate or 0
    can_begin = seekable and not seams and not broken
    if exact and (repeated := count - len(set(stamps.tolist()))):
        exact, contradiction = False, f"{repeated} packets have the time stamp of another one"
    keyframes = [time for time, key in zip(times, keys, strict=True) if key and can_begin]
    owners, wanted = np.array(expected, np.int64).reshape(-1, 2).T
    return Timeline(
        line,
        np.array(keyframes, np.int64),
        time_base,
        float(fps),
        stream=index,
        is_exact=exact,
        origin=Fraction(container.start_time or 0, av.time_base),
        seams=seams,
        doubtful=tuple(sorted(int(places[number]) for number in doubtful)),
        cut_in=tuple(cut_in),
        notes=notes,
        expected=tuple(np.split(wanted, np.searchsorted(owners, seams))),
        broken=broken,
        contradiction=contradiction if can_begin else "",
    )


def _units(codec: str, header: bytes | None) -> Callable[[Any], int] | None:
    """Counts a frame for a packet of H.264 or HEVC whose units end where it ends; None where units have no lengths.

    A wrong table of sizes or places makes packets of which this is not so (ISO/IEC 14496-15, 5.3.3 and 8.3.3).
    """
    places = {"h264": 4, "hevc": 21}
    if codec not in places or not header or len(header) <= places[codec] or header[0] != 1:
        return None
    width = (header[places[codec]] & 3) + 1

    def count(packet: Any) -> int:
        content, at = memoryview(packet), 0
        end = len(content)
        while at + width < end:
            at += width + int.from_bytes(content[at : at + width], "big")
        return at == end

    return count


def _shown_by_mpeg4(packet: Any) -> int:
    return int(packet.size > _LONGEST_NOT_CODED)


def _shown_by_vp8(packet: Any) -> int:
    """The bit `show_frame` of the frame header (RFC 6386, section 9.1)."""
    return memoryview(packet)[0] >> 4 & 1


def _shown_by_vp9(packet: Any) -> int:
    """Shown frames of a packet; several frames are a superframe (VP9 Bitstream Specification, annex B and 6.2)."""
    content = memoryview(packet)
    mark = content[-1]
    count, width = (mark & 7) + 1, (mark >> 3 & 3) + 1
    index = 2 + count * width
    if mark & 0xE0 != 0xC0 or len(content) < index or content[-index] != mark:
        return _vp9_frame_is_shown(content)
    found = at = 0
    for place in range(len(content) - index + 1, len(content) - 1, width):
        size = int.from_bytes(content[place : place + width], "little")
        found += _vp9_frame_is_shown(content[at : at + size])
        at += size
    return found


def _vp9_frame_is_shown(frame: memoryview) -> bool:
    if not len(frame) or frame[0] >> 6 != 2:
        return False
    profile = (frame[0] >> 5 & 1) + 2 * (frame[0] >> 4 & 1)
    after = int.from_bytes(bytes(frame[:2]).ljust(2, b"\0"), "big") << (4 + (profile == 3)) & 0xFFFF
    shows_another, _, shown = (bool(after >> bit & 1) for bit in (15, 14, 13))
    return shows_another or shown


_SAID: dict[str, Callable[[Any], int]] = {"mpeg4": _shown_by_mpeg4, "vp8": _shown_by_vp8, "vp9": _shown_by_vp9}
"""Codecs of which some packets give no frame, and how many frames a packet gives."""
