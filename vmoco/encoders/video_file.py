"""A video file as an encoder takes it: found by its path or URI, and cut at the encoder's frame rate.

The clips are those of an ingest with `--fps`, the encoder's rate, or without it where the video has that rate. What
needs FFmpeg is imported with the first video, because many users embed frames alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmoco.job_settings import ShortVideos

if TYPE_CHECKING:
    from vmoco.data.clips import ClipPlan
    from vmoco.data.decoder import Decoder
    from vmoco.data.timeline import Timeline

MAX_CLIPS = 32
"""Most clips of one video file; the default of ingest."""
SECONDS_PER_VIDEO = 600.0
"""Time limit for decoding a video."""
MOST_SECONDS = 7 * 86400.0
"""Longest time limit; the system allows no more than 24 days."""
SAME_RATE = 1e-3
"""Relative difference below which two frame rates are one."""

Place = str | os.PathLike[str]
"""Path or URI of a video."""


def clip_plan(
    path: str, *, num_frames: int, fps: float, short_videos: ShortVideos, max_clips: int = MAX_CLIPS
) -> tuple[ClipPlan, Timeline]:
    """How clips of `num_frames` frames are cut from a video file at a frame rate, and the frames that the file lists.

    Raises:
        VideoError: it is no video.
    """
    from vmoco.data import probing
    from vmoco.data.clips import ClipPlan

    line = probing.probe(path)
    # Rates are measured: by time stamps, a rate that is a little lower than the video's would leave frames out.
    same = abs(line.fps / fps - 1) < SAME_RATE
    return ClipPlan(num_frames, fps=None if same else fps, max_clips=max_clips, short=short_videos), line


@contextlib.contextmanager
def decoding() -> Iterator[Decoder]:
    """A decoder whose process starts with the first video and ends with the block."""
    from vmoco.data.decoder import Decoder

    decoder = Decoder()
    try:
        yield decoder
    finally:
        decoder.close()


@contextlib.contextmanager
def local_file(place: str) -> Iterator[str]:
    """Path of a video on this machine; one in a store is copied, and deleted at the end of the block.

    Raises:
        ValueError: it does not exist.
        VideoError: it cannot be copied.
    """
    from vmoco import storage
    from vmoco.data import source

    local = storage.local_path(place) if "://" in place else place
    if local is not None:
        if os.path.isdir(local):
            raise ValueError(
                f"{place} is a folder: give a video file or uint8 frames (T, H, W, 3). Folders of videos go to "
                "jobs/embed.py, and folders of numbered pictures through jobs/ingest.py --layout frames --fps first"
            )
        if not os.path.isfile(local):
            raise ValueError(f"there is no video file {place}")
        yield str(local)
        return
    folder, _, name = place.rpartition("/")
    filesystem, path = storage.filesystem(place)
    size = filesystem.get_file_info(path).size
    if size is None:
        raise ValueError(f"there is no video file {place}")
    with source.local_copy(folder, source.Found(name, size)) as copy:
        yield copy
