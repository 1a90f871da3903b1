"""Embeds videos or a data set: a pool of Ray Data actors, each with the encoder, writes a table of embeddings.

`embed_items` plans the work, and `embed_task` is that of one actor. A part of the table that exists is not made again,
whichever job made it and however that job ended.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import logging
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from vmoco import storage
from vmoco.data import ledger, source
from vmoco.data.ledger import Rejection
from vmoco.data.manifest import NAME, Manifest
from vmoco.encoders.dense import SlidingWindow
from vmoco.encoders.encoder import Encoder
from vmoco.evaluate import embed_items
from vmoco.evaluate.embed_items import Item, Items
from vmoco.evaluate.embed_task import EmbedTask, Work
from vmoco.evaluate.features import Window, window
from vmoco.evaluate.table import FeatureTable, part_losses, part_rejected
from vmoco.job_settings import EmbedSettings, PoolSettings
from vmoco.progress import Progress
from vmoco.settings import flag

ABOUT = "embeddings.json"


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The result of an embedding job."""

    table: FeatureTable
    num_rejected: int
    num_reused: int
    """Parts that existed before."""


def embed(encoder: Encoder, settings: EmbedSettings, *, show: Callable[[str], None] = print) -> Embedded:
    """Embeds what `settings.videos` names; needs an initialised Ray.

    Raises:
        ValueError: there is nothing to embed, the output holds another encoder's table, or permission is missing.
    """
    videos = storage.require_absolute(settings.videos, "--videos")
    output = storage.require_absolute(settings.output, "--output")
    is_data_set = storage.exists(storage.join(videos, NAME))
    sliding = sliding_window(encoder, settings)
    if sliding and is_data_set:
        raise ValueError(
            f"{settings.sliding} needs videos, and --videos {videos} is a data set, whose clips are fixed: give the "
            f"folder of its videos, or leave out {settings.sliding}"
        )
    storage.check_writable(output)
    seen = Window(encoder.preprocessing.num_frames, 1)
    listed: Collection[Rejection] = ()
    if is_data_set:
        manifest = Manifest.load(videos)
        seen = window(encoder, manifest)
        items = embed_items.of_data_set(manifest)
    else:
        listing = source.list_videos(videos, settings.suffixes)
        if listing.left_out:
            show(f"embed  {listing.left_out}")
        folder, listed = source.split_pattern(videos)[0], listing.rejected
        items = embed_items.of_videos(folder, listing.videos, videos_per_part=settings.videos_per_part)
    about: dict[str, Any] = {
        "videos": videos,
        "max_clips_per_video": settings.max_clips_per_video,
        "stride": seen.stride,
    }
    about["short_videos"] = "loop" if settings.short_videos == "loop" else None  # as tables from before the option
    about["every_seconds"] = sliding and sliding.every_seconds
    about["frames_per_clip"] = sliding and sliding.num_frames
    _claim(output, encoder, about)
    if seen.note:
        show(f"warning: {seen.note}")
    work = Work(
        output=output,
        window=seen,
        batch_size=settings.batch_size,
        max_clips_per_video=settings.max_clips_per_video,
        seconds_per_video=settings.seconds_per_video,
        short_videos=settings.short_videos,
        sliding=sliding,
    )
    parts, num_reused = run_items(items, encoder, work, settings, show=show)
    num_rejected = _write_ledger(output, listed, parts)
    table = FeatureTable(output, parts)
    if not len(table):
        raise ValueError(f"none of the videos in {videos} could be embedded: see {storage.join(output, ledger.NAME)}")
    return Embedded(table, num_rejected, num_reused)


def _write_ledger(output: str, listed: Collection[Rejection], parts: Sequence[str]) -> int:
    """Writes the ledger from what the parts record, one at a time; returns the number of rejected videos.

    Args:
        output: folder of the table.
        listed: videos that were rejected before any was read.
        parts: in the order of the videos, as those of each part are.
    """
    count = 0

    def rejected() -> Iterator[Rejection]:
        nonlocal count
        of_parts = (row for part in parts for row in part_rejected(output, part) or [])
        by_video = operator.attrgetter("video_id")
        for row in heapq.merge(sorted(listed, key=by_video), of_parts, key=by_video):
            count += 1
            yield row

    ledger.write_sorted(output, rejected(), (loss for part in parts for loss in part_losses(output, part)))
    return count


def sliding_window(encoder: Encoder, settings: EmbedSettings) -> SlidingWindow | None:
    """The clips of --every-seconds or --dense; None where clips lie side by side.

    Raises:
        ValueError: the seconds are too few for the encoder.
    """
    if not settings.sliding:
        return None
    return SlidingWindow.of(
        encoder,
        every_seconds=settings.every_seconds,
        clip_seconds=settings.clip_seconds,
        short_videos=settings.short_videos,
        named=flag,
    )


def run_items(
    items: Items, encoder: Encoder, work: Work, pool: PoolSettings, *, show: Callable[[str], None] = print
) -> tuple[list[str], int]:
    """Makes the missing parts on the pool's workers, and again those with a video that failed for a transient reason.

    Returns:
        The names of all parts, in the order of the items, and how many of them were reused.

    Raises:
        ValueError: a worker met an error that the user has to fix.
    """
    progress = Progress(
        show, "embed  made", total=items.count, unit="parts", counts=["clips"], rate="clips", every_seconds=2
    )
    parts, num_reused = list[str](), 0
    for items_of_round in items.rounds:
        todo = []
        for item in items_of_round:
            rejected = part_rejected(work.output, item["part"])
            if rejected is None or any(rejection.transient for rejection in rejected):
                todo.append(item)
        parts += [item["part"] for item in items_of_round]
        if reused := len(items_of_round) - len(todo):
            num_reused += reused
            progress.add(reused, reused=True)
        for made in _run(todo, encoder, work, pool):
            if made["error"]:
                raise ValueError(made["error"])
            progress.add(clips=made["clips"])
        for item in todo:
            if part_rejected(work.output, item["part"]) is None:
                raise ValueError(
                    f"part {item['part']} was made on another node and is not in {work.output} here: give a folder "
                    "that all nodes share, or a URI (s3://, gs://)"
                )
    return parts, num_reused


def _run(items: list[Item], encoder: Encoder, work: Work, pool: PoolSettings) -> Iterator[dict[str, Any]]:
    if not items:
        return
    import ray.data

    resource, each = ("GPU", 1) if pool.use_gpu else ("CPU", pool.cpus_per_worker)
    fit = int(ray.cluster_resources().get(resource, 0) // each)
    if not fit:
        flag = "--no-use-gpu" if pool.use_gpu else f"a --cpus-per-worker below {pool.cpus_per_worker}"
        raise ValueError(f"a worker needs {each} {resource}, and the cluster has fewer: give {flag}, or add nodes")
    size = min(fit, len(items), pool.max_workers or fit)
    work = dataclasses.replace(
        work, device="cuda" if pool.use_gpu else "cpu", num_threads=None if pool.use_gpu else pool.cpus_per_worker
    )
    context = ray.data.DataContext.get_current()
    log = logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.WARNING)
    try:
        data = ray.data.from_items(items, override_num_blocks=len(items)).map(
            EmbedTask,  # type: ignore[arg-type]
            fn_constructor_args=(encoder, work),
            num_cpus=0 if pool.use_gpu else pool.cpus_per_worker,
            num_gpus=1 if pool.use_gpu else 0,
            compute=ray.data.ActorPoolStrategy(size=size),
        )
        yield from data.iter_rows()
    finally:
        context.enable_progress_bars = bars
        log.setLevel(level)


def _claim(output: str, encoder: Encoder, about: dict[str, Any]) -> None:
    """Records in the folder which encoder the table belongs to: a table holds features of one encoder only.

    Raises:
        ValueError: the folder belongs to another encoder, or to other settings of how it sees clips.
    """
    mine = {"encoder": encoder.card.get("backbone"), "weights": encoder.weights_hash(), **about}
    uri = storage.join(output, ABOUT)
    if storage.exists(uri):
        theirs = json.loads(storage.read_bytes(uri))
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"the table in {output} was made with {name} {theirs.get(name)}, not {value}: "
                    f"give another --output, or use {name} {theirs.get(name)} again"
                )
    storage.write_atomic(uri, json.dumps(mine, indent=1, sort_keys=True).encode())
