"""Videos or a data set -> table of embeddings, by a pool of Ray Data actors that each hold the encoder.

As in ingest, all is planned before it is scheduled: the name of a part follows from the clips that go into it, so what
is there is not made again, whoever made it and however the job ended.


What one actor of an embedding job does: keeps the encoder, reads clips, writes one part of the table at a time.

Knows nothing of Ray. A clip comes from a shard, or from a video that is decoded here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from vmoco import storage
from vmoco.data import fetch, ledger, source
from vmoco.data.decoder import Decoder
from vmoco.data.ledger import Rejection, VideoError
from vmoco.data.manifest import NAME, Manifest
from vmoco.data.shard import ShardReader
from vmoco.encoders.encoder import Encoder
from vmoco.evaluate.features import Window, embed_batch, mean_colour, window, without_colour
from vmoco.evaluate.table import SPLITS, FeatureTable, part_bytes, part_rejected, part_uri
from vmoco.job_settings import EmbedSettings, PoolSettings
from vmoco.seed import hash64

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


Frames = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Work:
    """How clips are embedded, the same for all items of a job."""

    output: str
    """Folder of the table."""
    window: Window
    """Which frames of a stored clip the encoder sees."""
    batch_size: int
    colour: bool = True
    """False shows the encoder the clips `without_colour`."""
    max_clips_per_video: int = 32
    seconds_per_video: float = 600.0
    device: str = "cpu"
    num_threads: int | None = None
    """Of torch; None leaves them as they are."""


class EmbedTask:
    """Makes parts of a table of embeddings.

    Args:
        encoder: in evaluation mode.
        work: see `Work`.
    """

    def __init__(self, encoder: Encoder, work: Work) -> None:
        if work.num_threads:
            torch.set_num_threads(work.num_threads)
        self._encoder = encoder.to(work.device).eval()
        self._decoder = Decoder()  # its process starts with the first video
        self._work = work

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Makes one part.

        Args:
            item: `part`, its name; `plan`, JSON: the URI of a shard and rows of its manifest, or a folder and videos.

        Returns:
            `clips`, the number of them; `error`, what a person has to mend, or empty.
        """
        plan = json.loads(item["plan"])
        rejected: list[Rejection] = []
        try:
            if "shard" in plan:
                rows, features = self._embed(_of_shard(plan))
            else:
                rows, features = self._embed(self._of_videos(plan, rejected))
            content = part_bytes(rows, features, rejected=rejected)
            storage.write_atomic(part_uri(self._work.output, item["part"]), content)
        except ValueError as error:  # as a value: an exception in a task ends the job with Ray's stack around it
            return {"clips": 0, "error": str(error)}
        return {"clips": len(rows), "error": ""}

    def _embed(
        self, clips: Iterator[tuple[dict[str, Any], Frames]]
    ) -> tuple[list[dict[str, Any]], npt.NDArray[np.float32]]:
        """Rows and features of clips, in batches of one size."""
        rows: list[dict[str, Any]] = []
        parts = [torch.zeros(0, self._encoder.feature_dim)]  # a part may have no clip
        batch: list[Frames] = []
        for row, frames in clips:
            seen = self._work.window.of(frames) if "shard" in row else frames
            row = {name: value for name, value in row.items() if name != "shard"}
            rows.append(row | {"colour": mean_colour(frames).tolist()})
            batch.append(seen if self._work.colour else without_colour(seen))
            if len(batch) == self._work.batch_size:
                parts.append(embed_batch(self._encoder, batch))
                batch.clear()
        if batch:
            parts.append(embed_batch(self._encoder, batch))
        return rows, torch.cat(parts).numpy()

    def _of_videos(self, plan: dict[str, Any], rejected: list[Rejection]) -> Iterator[tuple[dict[str, Any], Frames]]:
        for name, num_bytes in plan["videos"]:
            found = source.Found(name, num_bytes)
            try:
                with fetch.local_copy(plan["folder"], found) as path:
                    sha256 = fetch.file_sha256(path)
                    cut = self._encoder.cut_video(
                        path,
                        decoder=self._decoder,
                        max_clips=self._work.max_clips_per_video,
                        seconds=self._work.seconds_per_video,
                    )
            except VideoError as error:
                why = (error.stage, error.reason, error.message, error.transient)
                rejected.append(Rejection(name, *why, entry=found.entry))
                continue
            for place, frames in enumerate(cut.frames):
                yield (
                    {
                        "clip_id": f"{hash64(name, cut.start_times[place]):016x}",
                        "video_id": name,
                        "start_seconds": cut.start_seconds[place],
                        "clip_seconds": cut.clip_seconds,
                        "held_out": False,
                        "source": name,
                        "row": place,
                        "sha256": sha256,
                    },
                    frames,
                )


def _of_shard(plan: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Frames]]:
    with local_shard(plan["shard"]) as reader:
        for row in plan["rows"]:
            height, width = row.pop("height"), row.pop("width")
            frames = reader.frames(row["row"])[:, :height, :width]  # what is left is padding
            yield row | {"shard": True}, frames


@contextlib.contextmanager
def local_shard(uri: str) -> Iterator[ShardReader]:
    """A reader of a shard wherever it lies: a remote one is copied to this machine's disk, and removed again."""
    if storage.local_path(uri) is not None:
        with ShardReader(uri) as reader:
            yield reader
        return
    with tempfile.NamedTemporaryFile(suffix=".arrow") as copy:
        copy.write(storage.read_bytes(uri))
        copy.flush()
        with ShardReader(copy.name) as reader:
            yield reader
