"""Videos or a data set -> table of embeddings, by a pool of Ray Data actors that each hold the encoder.

As in ingest, all is planned before it is scheduled: the name of a part follows from the clips that go into it, so what
is there is not made again, whoever made it and however the job ended.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.compute as pc

from vmoco import storage
from vmoco.data import ledger, source
from vmoco.data.manifest import NAME, Manifest
from vmoco.encoders.encoder import Encoder
from vmoco.evaluate.embed_settings import EmbedSettings, PoolSettings
from vmoco.evaluate.embed_task import EmbedTask, Work
from vmoco.evaluate.features import Window, window
from vmoco.evaluate.table import SPLITS, FeatureTable, part_rejected

ABOUT = "embeddings.json"


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What an embedding job has made."""

    table: FeatureTable
    num_rejected: int
    num_reused: int
    """Parts that were there already."""


def embed(encoder: Encoder, settings: EmbedSettings, *, show: Callable[[str], None] = print) -> Embedded:
    """Embeds what `settings.videos` names; needs an initialised Ray.

    Raises:
        ValueError: nothing to embed, another encoder's table in the way, or no permission.
    """
    videos = storage.require_absolute(settings.videos, "--videos")
    output = storage.require_absolute(settings.output, "--output")
    storage.check_writable(output)
    seen = Window(encoder.preprocessing.num_frames, 1)
    if storage.exists(storage.join(videos, NAME)):
        manifest = Manifest.load(videos)
        seen = window(encoder, manifest)
        items, listed = shard_items(manifest), []
    else:
        listing = source.list_videos(videos)
        items, listed = _video_items(videos, listing.videos, settings), list(listing.rejected)
    about = {"videos": videos, "max_clips_per_video": settings.max_clips_per_video, "stride": seen.stride}
    _claim(output, encoder, about)
    if seen.note:
        show(f"warning: {seen.note}")
    work = Work(
        output=output,
        window=seen,
        batch_size=settings.batch_size,
        max_clips_per_video=settings.max_clips_per_video,
        seconds_per_video=settings.seconds_per_video,
    )
    reused = run_items(items, encoder, work, settings, show=show)
    parts = [item["part"] for item in items]
    rejected = listed + [row for part in parts for row in part_rejected(output, part) or []]
    ledger.write(output, rejected)
    table = FeatureTable(output, parts)
    if not len(table):
        raise ValueError(f"none of the videos in {videos} could be embedded: see {storage.join(output, ledger.NAME)}")
    return Embedded(table, len(rejected), reused)


def shard_items(manifest: Manifest, chosen: Any = None) -> list[dict[str, Any]]:
    """One item per shard of a data set, for `run_items`.

    Args:
        manifest: data set.
        chosen: boolean column, which clips are embedded; all when left out.
    """
    table = manifest.table if chosen is None else manifest.table.filter(chosen)
    names = ["clip_id", "video_id", "start_seconds", "label", *SPLITS, "held_out", "row", "sha256", "height", "width"]
    items = []
    for shard in sorted(table["shard"].unique().to_pylist()):
        members = table.filter(pc.equal(table["shard"], shard)).sort_by("row")
        rows = members.select(names).to_pylist()
        for row, fps in zip(rows, members["fps"].to_pylist(), strict=True):
            row |= {"source": shard, "clip_seconds": manifest.frame_shape[0] / fps}
        clips = "".join(row["clip_id"] + row["sha256"] for row in rows)
        plan = {"shard": manifest.shard_uri(shard), "rows": rows}
        items.append({"part": _digest(shard, clips), "plan": json.dumps(plan)})
    return items


def run_items(
    items: list[dict[str, Any]],
    encoder: Encoder,
    work: Work,
    pool: PoolSettings,
    *,
    show: Callable[[str], None] = print,
) -> int:
    """Makes the parts that are not there yet, or that something transient was in the way of, on the pool's workers.

    Returns:
        How many were there.

    Raises:
        ValueError: a worker met what a person has to mend.
    """
    todo = []
    for item in items:
        rejected = part_rejected(work.output, item["part"])
        if rejected is None or any(rejection.transient for rejection in rejected):
            todo.append(item)
    done, clips, started = 0, 0, time.monotonic()
    said = started
    for made in _run(todo, encoder, work, pool):
        if made["error"]:
            raise ValueError(made["error"])
        done, clips = done + 1, clips + made["clips"]
        now = time.monotonic()
        if now - said > 2 or done == len(todo):
            said = now
            left = int((now - started) / done * (len(todo) - done))
            show(
                f"embed  parts {done}/{len(todo)}  clips {clips}  {clips / (now - started):.1f} clips/s  "
                f"{left // 60}:{left % 60:02d} left"
            )
    for item in todo:
        if part_rejected(work.output, item["part"]) is None:
            raise ValueError(
                f"part {item['part']} was made and is not in {work.output}: that folder must be the same one on every "
                "node; give a shared folder or a URI (s3://, gs://)"
            )
    return len(items) - len(todo)


def _run(items: list[dict[str, Any]], encoder: Encoder, work: Work, pool: PoolSettings) -> Iterator[dict[str, Any]]:
    if not items:
        return
    import ray.data

    resource, each = ("GPU", 1) if pool.use_gpu else ("CPU", pool.cpus_per_worker)
    fit = int(ray.cluster_resources().get(resource, 0) // each)
    if not fit:
        raise ValueError(f"a worker needs {each} {resource}, and the cluster has not so many: lower it, or add nodes")
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


def _video_items(folder: str, videos: tuple[source.Found, ...], settings: EmbedSettings) -> list[dict[str, Any]]:
    items = []
    for first in range(0, len(videos), settings.videos_per_part):
        group = [[found.video_id, found.num_bytes] for found in videos[first : first + settings.videos_per_part]]
        plan = {"folder": folder, "videos": group}
        items.append({"part": _digest(json.dumps(group), ""), "plan": json.dumps(plan)})
    return items


def _claim(output: str, encoder: Encoder, about: dict[str, Any]) -> None:
    """Ties the folder to the encoder and to how it sees clips: a table is of one encoder alone."""
    mine = {"encoder": encoder.card.get("backbone"), "weights": encoder.weights_hash(), **about}
    uri = storage.join(output, ABOUT)
    if storage.exists(uri):
        theirs = json.loads(storage.read_bytes(uri))
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"the table in {output} was made with {name} {theirs.get(name)}, not {value}: "
                    "give another --output, or what it was made with"
                )
    storage.write_atomic(uri, json.dumps(mine, indent=1, sort_keys=True).encode())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
