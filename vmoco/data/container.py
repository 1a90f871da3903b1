"""Opens a video and reads it with PyAV: a closed list of formats, one thread, and errors that name what is wrong.

With `video.py` and `scale.py` all that knows PyAV.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import numpy as np

from vmoco.data.ledger import Stage, VideoError
from vmoco.data.scale import MAX_PIXELS

# Formats that are one file by themselves. Playlists (hls, concat, dash) are left out: a file of the user's could make
# FFmpeg open other files or addresses.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,h264,hevc,m4v,nut,gif,ivf"

Source = str | BinaryIO
"""Path of a local file, or a file opened for reading, with a name."""


def open_video(source: Source) -> Any:
    """PyAV's container, to be closed by the caller; raises av.error.FFmpegError, which `errors` turns."""
    if not isinstance(source, str):
        source.seek(0)  # it is opened twice
    # ENOENT and the like were met when the file was read for its hash; here every failure is one of the format.
    # Titles are in whatever encoding; nobody reads them here.
    options = {"format_whitelist": FORMATS}
    return av.open(source, mode="r", options=options, buffer_size=2**20, metadata_errors="replace")


@contextlib.contextmanager
def errors(stage: Stage, reason: str) -> Iterator[None]:
    """Turns FFmpeg's errors into a VideoError, with the last line that FFmpeg logged and nothing that varies."""
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
        said = [error.strerror or type(error).__name__]
        logged: Any = error.log  # (level, part of FFmpeg, line); PyAV's type is wrong
        if logged is not None:
            said.append(f"{logged[1]}: {logged[2].strip()}")
        raise VideoError(stage, reason, "; ".join(said)) from None
    finally:
        av.logging.set_level(level)


def video_stream(container: Any) -> Any:
    """The first stream of moving pictures, set to decode the same way everywhere; VideoError where there is none."""
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


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream, in the order in which they are shown."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            # Some codecs report a frame for which there is no memory as a damaged one. What they hold is not freed yet,
            # so another frame would not fit either: MemoryError. 3 bytes a pixel, for 4:4:4 or 10 bits of 4:2:0.
            np.empty((stream.codec_context.height, stream.codec_context.width, 3), np.uint8)
            raise
