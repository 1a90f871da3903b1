"""Opens a video with PyAV and decodes its frames, the same on every machine; FFmpeg's errors become those of the video.

A decoder may hang or crash; `decoder.py` runs this code in a separate process for that reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import numpy as np

from vmoco.data import reports
from vmoco.data.container import packets
from vmoco.data.ledger import Stage, VideoError
from vmoco.data.pixels import MAX_PIXELS

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


def decoded(
    container: Any, stream: Any, log: list[Any], *, seams: tuple[int, ...] = (), begin: int | None = None
) -> Iterator[Any]:
    """The frames of a stream, in display order.

    Args:
        container: Just opened, or at the place from which to decode.
        stream: To decode.
        log: The list that receives FFmpeg's log.
        seams: Numbers of the packets at which another recording begins.
        begin: Time of the first frame that is wanted. If decoding starts with its packet, packets that are shown before
            it are left out: they may refer to frames that were not decoded, and none of the wanted frames refers to
            them.

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
        if begin is not None and packet.size:
            if not number and packet.pts != begin:  # the container went back further
                begin = None
            elif packet.pts is not None and packet.pts < begin:
                continue
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
