"""What one task of ingest does: decodes the videos of one planned shard and writes it. Knows nothing of Ray.

The pixels of a shard wait in nameless temporary files, not in memory: its header, which comes first, accounts for all
its videos, so the last one must have been decoded before the first clip is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from vmoco.data import frames as storing
from vmoco.data import shard, source, video
from vmoco.data.account import VERSION, Account, Video
from vmoco.data.ingest_settings import IngestSettings
from vmoco.data.ledger import Rejection
from vmoco.data.manifest import shard_uri
from vmoco.seed import hash64


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One task: the videos of one shard, and the shard's name, which follows from them."""

    name: str
    videos: tuple[source.Found, ...]


def plan_shards(videos: list[source.Found], *, content: dict[str, Any], videos_per_shard: int) -> list[ShardPlan]:
    """Groups consecutive videos; the name of a shard is a hash of the settings and of what goes into it."""
    plans = []
    for first in range(0, len(videos), videos_per_shard):
        group = tuple(videos[first : first + videos_per_shard])
        named = [VERSION, content, [[found.video_id, found.num_bytes] for found in group]]
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
        plans.append(ShardPlan(digest[:16], group))
    return plans


def is_held_out(video_id: str, percent: float) -> bool:
    """Whether a video is kept from training: a hash of its name, so the split is stable when videos are added."""
    return hash64("held-out", video_id) % 10_000 < percent * 100


def frame_shape(settings: IngestSettings) -> tuple[int, int, int, int]:
    """(T, H, W, C) of every clip."""
    return (settings.num_frames, settings.height, settings.width, 3)


def make_shard(plan: ShardPlan, *, videos: str, output: str, settings: IngestSettings) -> dict[str, Any]:
    """Decodes the videos of one shard and writes it: what one task does.

    A shard of that name that is there already holds the same bytes, unless something transient was in its way.

    Returns:
        `shard`, its manifest `rows`, its `rejected` videos, and whether it was `reused`.

    Raises:
        ValueError: the shard cannot be written.
    """
    uri = shard_uri(output, plan.name)
    try:
        there = shard.read_rows(uri)
        if not any(rejection.transient for rejection in there.account.rejected):
            return _made(plan.name, there.table.to_pylist(), shard.read_file(uri), there.account, reused=True)
    except ValueError:
        pass  # missing, or damaged: it is made anew and replaced
    cuts: list[tuple[source.Found, video.Cut]] = []
    read, rejected = [], []
    for found in plan.videos:
        digest = ""
        try:
            content = source.read_video(videos, found)
            digest = content.sha256
            cuts.append((found, _cut(content, settings)))
        except video.VideoError as error:
            why = (error.stage, error.reason, error.message, error.transient)
            rejected.append(Rejection(found.video_id, *why, num_bytes=found.num_bytes))
        read.append(Video(found.video_id, found.num_bytes, digest))
    account = Account(
        settings.content(), frame_shape(settings), tuple(read), tuple(rejected), encoding=settings.encoding
    )
    rows, file = shard.write_shard(uri, _clips(cuts, settings), account=account)
    return _made(plan.name, rows, file, account, reused=False)


def _cut(content: source.Content, settings: IngestSettings) -> video.Cut:
    try:
        return video.cut_clips(
            content.source,
            num_frames=settings.num_frames,
            stride=settings.stride,
            height=settings.height,
            width=settings.width,
            max_clips=settings.max_clips_per_video,
            seconds=settings.seconds_per_video,
            allocate=_on_disk,
        )
    except video.VideoError:
        raise
    except Exception as error:  # one strange video must not end a job of many hours; it is counted and tried again
        said = f"{type(error).__name__}: {error}"
        raise video.VideoError("decode", "unexpected-error", said, transient=True) from error


def _on_disk(shape: tuple[int, ...]) -> storing.Frames:
    """An array in a nameless temporary file."""
    size = int(np.prod(shape))
    if not size:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and would kill the task later
        return np.memmap(file, np.uint8, "r+", shape=shape)


def _clips(cuts: list[tuple[source.Found, video.Cut]], settings: IngestSettings) -> Iterator[shard.Clip]:
    for found, cut in cuts:
        for pts, seconds, frames in zip(cut.start_pts, cut.start_seconds, cut.frames, strict=True):
            yield shard.Clip(
                clip_id=f"{hash64(found.video_id, pts):016x}",
                video_id=found.video_id,
                start_seconds=seconds,
                fps=cut.fps / settings.stride,
                held_out=is_held_out(found.video_id, settings.held_out_percent),
                stored=storing.encode(frames, settings.encoding, quality=settings.jpeg_quality),
                height=settings.height,
                width=settings.width,
            )


def _made(
    name: str, rows: list[dict[str, Any]], file: shard.ShardFile, account: Account, *, reused: bool
) -> dict[str, Any]:
    videos = {read.video_id: read for read in account.videos}
    for number, row in enumerate(rows):
        read = videos[row["video_id"]]
        row |= {"shard": name, "row": number, "entry": "", "video_bytes": read.num_bytes, "video_sha256": read.sha256}
    rejected = [rejection.to_json() for rejection in account.rejected]
    return {
        "shard": name,
        "file": dataclasses.asdict(file),
        "rows": rows,
        "rejected": rejected,
        "num_videos": len(videos),
        "reused": reused,
    }
