"""What a container tells: its packets, which of its streams is the film, and whether the file is cut off.

A header may promise too much for two reasons. A recorder guessed the length, or never came back to correct it: the file
is whole. Or the end of the file is missing. The boxes of the container tell which: in a whole file the last one ends
where the file ends. Only files whose header promises too much are read here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
from av.stream import Disposition

from vmoco.data.ledger import VideoError

# Formats whose stamps may start again: they are made to be joined.
_RESTARTING = {"mpegts", "mpeg"}
_DEMUX_ERRORS = 3
"""Errors in a row after which a file is read no further."""
_DEFAULT_BONUS = 5_000_000
"""Pixels that the mark of a default stream is worth; the value of FFmpeg's program."""
# Formats whose header states the length of the video; in others FFmpeg estimates it from the packets in the file.
_DURATION_IN_HEADER = {"mov", "matroska", "flv", "asf"}


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


def stamps_restart(container: Any) -> bool:
    """Whether the format allows that time stamps start again."""
    return not _RESTARTING.isdisjoint(container.format.name.split(","))


def film_streams(container: Any) -> list[Any]:
    """The streams that may be the film; VideoError if there is none."""
    cover = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise VideoError(
            "probe", "no-video-stream", f"it holds {len(container.streams)} streams, and no moving picture"
        )
    return streams


def choose_stream(container: Any, streams: list[Any]) -> int:
    """Index of the stream that is the film: it has more than one picture, and then as FFmpeg's program chooses.

    That is the stream with the largest frame or with the mark of the default; the first of equal ones.

    Args:
        container: Read from its start until each stream has shown its second picture.
        streams: To choose from.
    """
    counts = dict.fromkeys((stream.index for stream in streams), 0)
    for packet in packets(container, *streams):
        if isinstance(packet, av.error.FFmpegError):
            continue
        counts[packet.stream.index] += bool(packet.size)
        if min(counts.values()) > 1:
            break

    def score(stream: Any) -> tuple[bool, bool, int]:
        codec = stream.codec_context
        marked = bool(stream.disposition & Disposition.default)
        area = codec.width * codec.height + _DEFAULT_BONUS * marked if codec else 0
        return counts[stream.index] > 1, codec is not None, area

    return int(max(streams, key=score).index)


class CutOffError(VideoError):
    """A file that ends before its header says: the length that the header promises."""

    def __init__(self, message: str, *, promised: float) -> None:
        super().__init__("probe", "truncated", message)
        self.promised = promised
        """Seconds at which the video should end, as its time stamps count."""


def more_promised(container: Any, stream: Any, *, last: int | None, end: float) -> CutOffError | None:
    """What the header promises and the file does not hold; None if it holds all.

    A file that is cut off often decodes without an error, and only this tells. But some recorders promise too much.

    Args:
        container: Read to its end.
        stream: The film.
        last: Its latest time stamp.
        end: Seconds at which the last frame of any stream ends.
    """
    names = set(container.format.name.split(","))
    # In AVI a time stamp is a number, also of a frame that was left out and repeats the one before.
    if "avi" in names and last is not None and last + 1 < stream.frames - max(2, 0.02 * stream.frames):
        promised = float(stream.frames / (stream.average_rate or 25))
        return CutOffError(f"{last + 1} frames, and the header promises {stream.frames}", promised=promised)
    if names & _DURATION_IN_HEADER and container.duration:
        promised = ((container.start_time or 0) + container.duration) / av.time_base
        # Headers are rounded, off by one, or count the display time of the last frame.
        if end < promised - max(0.2, 0.02 * promised):
            message = f"it ends at {end:.2f} s, and the header promises {promised:.2f} s"
            return CutOffError(message, promised=promised)
    return None


_SEGMENT, _CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
_MAX_HEADER = 12
"""Bytes of an EBML element's identifier and size, at most."""


def ends_whole(source: str | BinaryIO, format_name: str) -> bool:
    """Whether the last box of a Matroska, WebM or AVI file ends with the file; False for any other format."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(source, "rb")) if isinstance(source, str) else source
        end = file.seek(0, os.SEEK_END)
        names = set(format_name.split(","))
        if names & {"matroska", "webm"}:
            return _matroska_is_whole(file, end)
        if "avi" in names:
            return _avi_is_whole(file, end)
        return False


def _matroska_is_whole(file: BinaryIO, end: int) -> bool:
    """A segment or cluster of unknown size, as live recorders write it, is searched for its last element."""
    at = 0
    while at < end:
        found = _element(file, at)
        if found is None:
            return False
        identifier, start, size = found
        # Their elements follow; elsewhere an unknown size means that there is nothing to go by.
        if size is None and identifier not in {_SEGMENT, _CLUSTER}:
            return False
        at = start if size is None else start + size
    return at == end


def _element(file: BinaryIO, at: int) -> tuple[bytes, int, int | None] | None:
    """Identifier, first byte of the content and size of the EBML element at a byte; a size of None is unknown."""
    file.seek(at)
    header = file.read(_MAX_HEADER)
    places = []
    place = 0
    for longest in (4, 8):
        if place >= len(header) or not header[place]:
            return None
        length = 9 - header[place].bit_length()
        if length > longest or place + length > len(header):
            return None
        places.append((place, place + length))
        place += length
    (_, middle), (_, stop) = places
    bits = 7 * (stop - middle)
    size = int.from_bytes(header[middle:stop], "big") & ((1 << bits) - 1)
    return header[:middle], at + stop, None if size == (1 << bits) - 1 else size


def _avi_is_whole(file: BinaryIO, end: int) -> bool:
    sizes = list(_riff_sizes(file, end))
    # 12 bytes hold nothing: a recorder that never came back to its header left the size open.
    return bool(sizes) and sizes[0] > 12 and sum(sizes) - end in {0, 1}


def _riff_sizes(file: BinaryIO, end: int) -> Iterator[int]:
    """Bytes of each RIFF chunk of a file, padded to an even number; a long AVI file has several."""
    at = 0
    while at < end:
        file.seek(at)
        header = file.read(8)
        if len(header) < 8 or header[:4] not in {b"RIFF", b"JUNK"}:
            return
        size = 8 + int.from_bytes(header[4:], "little")
        yield size + size % 2
        at += size + size % 2
