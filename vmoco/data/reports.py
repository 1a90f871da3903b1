"""What FFmpeg reports as damage: lines of its log, incomplete packets, and frames that never come.

Only what is reported can be known. Some decoders show other pictures for damaged data without a word.
"""

from __future__ import annotations

import re
from typing import Any

import av
import numpy as np

from vmoco.data.clips import Int64Array

Log = list[tuple[int, str, str]]
"""Lines that FFmpeg logged: level, part of FFmpeg, text."""

LEVEL = av.logging.INFO
"""Level of the log that is read: some codecs mention concealed blocks only as information."""
# Below the level of errors, lines with these words report damage, and others do not ("Increasing reorder buffer").
_MINOR = re.compile(r"conceal|corrupt|damaged|\berror|discarding|skip", re.IGNORECASE)
_INCOMPLETE = re.compile(r"Packet corrupt \(stream = (\d+)")
# Errors that concern no picture.
_HARMLESS = re.compile(r"SEI type|unable to decode APP|User data|Referenced QT chapter track")
_REPEATING_BYTES = 32
"""Largest size of a packet that only says that the frame before stays."""
_WITH_HIDDEN_FRAMES = {"vp8", "vp9", "av1"}


def report_in(
    log: Log, *, ignored: frozenset[str] = frozenset(), stream: int | None = None, near_seam: bool = False
) -> str | None:
    """The first line that reports damage, or None; the log is empty afterwards.

    Args:
        log: Lines since the last call.
        ignored: Parts of FFmpeg whose lines do not count, such as the codecs of other streams.
        stream: Incomplete packets of streams other than that of this index do not count; None if all do.
        near_seam: Whether the packet is one of those `around` a seam: incomplete packets do not count there.
    """
    if not log:
        return None
    lines = [(level, part, " ".join(text.split())) for level, part, text in log]
    log.clear()
    for level, part, text in lines:
        counts = level <= av.logging.ERROR or _MINOR.search(text)
        incomplete = _INCOMPLETE.search(text)
        if incomplete and (near_seam or (stream is not None and int(incomplete[1]) != stream)):
            continue
        if counts and part not in ignored and part != "swscaler" and not _HARMLESS.search(text):
            return f"{part}: {text}"
    return None


def other_parts(container: Any, stream: Any) -> frozenset[str]:
    """Names under which the codecs of the other streams log."""
    others = [each.codec_context for each in container.streams if each is not stream and each.codec_context]
    names = {name for each in others for name in (each.name, each.codec.canonical_name)}
    return frozenset(names - {stream.codec_context.name, stream.codec_context.codec.canonical_name})


def around(seams: tuple[int, ...]) -> frozenset[int]:
    """The packets around each seam: the counter of MPEG-TS jumps there, and FFmpeg takes them for incomplete."""
    return frozenset(seam - back for seam in seams for back in (0, 1, 2))


def hides_frames(codec: str) -> bool:
    """Whether packets of a codec may hold frames that are not shown."""
    return codec in _WITH_HIDDEN_FRAMES


def shows_a_frame(size: int, *, hides: bool) -> bool:
    """Whether a frame must come of a packet: not of the short ones that repeat the frame before, nor of hidden ones.

    Args:
        size: Its bytes.
        hides: Result of `hides_frames` for its codec.
    """
    return size > _REPEATING_BYTES and not hides


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
