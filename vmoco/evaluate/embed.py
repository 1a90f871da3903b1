"""Embeds videos or a data set: a pool of Ray Data actors, each with the encoder, writes a table of embeddings.

All work is planned before it is scheduled, as in ingest. A hash of its clips or videos names each part of the table.
A part that exists is not made again, whichever job made it and however that job ended.

`EmbedTask` is the work of one actor; it does not use Ray. Its clips come from the shards of a data set, or from videos
that it decodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from vmoco import storage
from vmoco.data import ledger, source
from vmoco.data.decoder import Decoder, StoredClips
from vmoco.data.distribute import in_groups
from vmoco.data.found import Found
from vmoco.data.ledger import Damage, Loss, Rejection, VideoError, attributed
from vmoco.data.manifest import NAME, Manifest
from vmoco.data.shard_reader import ClipReader
from vmoco.encoders.dense import SlidingWindow, slide
from vmoco.encoders.encoder import Encoder, VideoClips
from vmoco.evaluate.features import Frames, Window, embed_batch, embed_views, mean_colour, window, without_colour
from vmoco.evaluate.table import SPLITS, FeatureTable, part_bytes, part_losses, part_rejected, part_uri
from vmoco.job_settings import EmbedSettings, PoolSettings, ShortVideos
from vmoco.progress import Progress
from vmoco.seed import hash64
from vmoco.settings import flag

ABOUT = "embeddings.json"
_ROW_NAMES = ["clip_id", "video_id", "start_seconds", "label", *SPLITS, "held_out", "shard", "row"]
_ROW_NAMES += ["offset", "num_bytes", "sha256", "height", "width"]


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
    if is_data_set:
        manifest = Manifest.load(videos)
        seen = window(encoder, manifest)
        items, listed = shard_items(manifest), []
    else:
        listing = source.list_videos(videos, settings.suffixes)
        if listing.left_out:
            show(f"embed  {listing.left_out}")
        items, listed = _video_items(source.split_pattern(videos)[0], listing.videos, settings), list(listing.rejected)
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
    reused = run_items(items, encoder, work, settings, show=show)
    parts = [item["part"] for item in items]
    rejected = listed + [row for part in parts for row in part_rejected(output, part) or []]
    ledger.write(output, rejected, [loss for part in parts for loss in part_losses(output, part)])
    table = FeatureTable(output, parts)
    if not len(table):
        raise ValueError(f"none of the videos in {videos} could be embedded: see {storage.join(output, ledger.NAME)}")
    return Embedded(table, len(rejected), reused)


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


def shard_items(manifest: Manifest, rows: pa.Table | None = None) -> list[dict[str, Any]]:
    """One item per shard of a data set, for `run_items`.

    Args:
        manifest: data set.
        rows: of the clips to embed; None embeds all.
    """
    table = manifest.table if rows is None else rows
    table = table.select([*_ROW_NAMES, "fps"]).sort_by([("shard", "ascending"), ("row", "ascending")])
    about = {"data_set": manifest.uri, "frame_shape": manifest.frame_shape, "encoding": manifest.encoding}
    items = []
    for shard, members in itertools.groupby(table.to_pylist(), key=lambda row: str(row["shard"])):
        rows = [row | {"source": shard, "clip_seconds": manifest.frame_shape[0] / row.pop("fps")} for row in members]
        clips = "".join(row["clip_id"] + row["sha256"] for row in rows)
        items.append({"part": _digest(shard, clips), "plan": json.dumps(about | {"rows": rows})})
    return items


def run_items(
    items: list[dict[str, Any]],
    encoder: Encoder,
    work: Work,
    pool: PoolSettings,
    *,
    show: Callable[[str], None] = print,
) -> int:
    """Makes the missing parts on the pool's workers, and again those with a video that failed for a transient reason.

    Returns:
        Number of parts that were reused.

    Raises:
        ValueError: a worker met an error that the user has to fix.
    """
    todo = []
    for item in items:
        rejected = part_rejected(work.output, item["part"])
        if rejected is None or any(rejection.transient for rejection in rejected):
            todo.append(item)
    progress = Progress(
        show, "embed  made", total=len(todo), unit="parts", counts=["clips"], rate="clips", every_seconds=2
    )
    for made in _run(todo, encoder, work, pool):
        if made["error"]:
            raise ValueError(made["error"])
        progress.add(clips=made["clips"])
    for item in todo:
        if part_rejected(work.output, item["part"]) is None:
            raise ValueError(
                f"part {item['part']} was made on another node and is not in {work.output} here: give a folder that "
                "all nodes share, or a URI (s3://, gs://)"
            )
    return len(items) - len(todo)


def _run(items: list[dict[str, Any]], encoder: Encoder, work: Work, pool: PoolSettings) -> Iterator[dict[str, Any]]:
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


def _video_items(folder: str, videos: Iterable[Found], settings: EmbedSettings) -> list[dict[str, Any]]:
    items = []
    for part in in_groups(videos, settings.videos_per_part):
        group = [[found.video_id, found.num_bytes] for found in part]
        plan = {"folder": folder, "videos": group}
        items.append({"part": _digest(json.dumps(group), ""), "plan": json.dumps(plan)})
    return items


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


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


Made = TypeVar("Made")
_Clip = tuple[dict[str, Any], Frames]
"""A row of the table, and the frames that the encoder sees."""


@dataclasses.dataclass(frozen=True)
class Work:
    """How clips are embedded; equal for all items of a job."""

    output: str
    """Folder of the table."""
    window: Window
    """Which frames of a stored clip the encoder sees."""
    batch_size: int
    colour: bool = True
    """False removes the colour of clips first (`without_colour`)."""
    views: tuple[tuple[int, ...], ...] = ()
    """For clips of a data set: numbers of the stored frames that each view shows; `window` is not used then. A row has
    the features of all views, one after the other."""
    max_clips_per_video: int = 32
    seconds_per_video: float = 600.0
    short_videos: ShortVideos = "reject"
    sliding: SlidingWindow | None = None
    """For videos: their clips, instead of `max_clips_per_video` that lie side by side."""
    device: str = "cpu"
    num_threads: int | None = None
    """Threads of torch; None keeps the present number."""


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
            item: `part`, its name; `plan`, JSON: a data set and rows of its manifest, or a folder and videos.

        Returns:
            `clips`, their number; `error`, an error message that the user can act on, or empty.
        """
        plan = json.loads(item["plan"])
        rejected: list[Rejection] = []
        losses: list[Loss] = []
        try:
            if "videos" not in plan:
                rows, features = self._embed(self._of_data_set(plan))
            elif self._work.sliding:
                rows, features = self._slide(plan, self._work.sliding, rejected, losses)
            else:
                rows, features = self._embed(self._of_videos(plan, rejected, losses))
            content = part_bytes(rows, features, rejected=rejected, losses=losses)
            storage.write_atomic(part_uri(self._work.output, item["part"]), content)
        except (OSError, ValueError) as error:  # as a value: Ray would wrap an exception in its own stack
            return {"clips": 0, "error": str(error)}
        return {"clips": len(rows), "error": ""}

    def _embed(self, clips: Iterable[_Clip]) -> tuple[list[dict[str, Any]], npt.NDArray[np.float32]]:
        """Rows and features of clips, in batches of one size."""
        rows: list[dict[str, Any]] = []
        width = self._encoder.feature_dim * max(len(self._work.views), 1)
        parts = [torch.zeros(0, width)]  # a part may have no clips
        clips = iter(clips)
        while batch := list(itertools.islice(clips, self._work.batch_size)):
            rows += [row for row, _ in batch]
            if self._work.views:
                clips_of = [frames for _, frames in batch]
                parts.append(embed_views(self._encoder, clips_of, self._work.views, colour=self._work.colour))
                continue
            seen = [frames if self._work.colour else without_colour(frames) for _, frames in batch]
            parts.append(embed_batch(self._encoder, seen))
        return rows, torch.cat(parts).numpy()

    def _of_data_set(self, plan: dict[str, Any]) -> Iterator[_Clip]:
        shape, rows = tuple(plan["frame_shape"]), plan["rows"]
        table = pa.Table.from_pylist(rows)
        reader = ClipReader(plan["data_set"], table, frame_shape=shape, encoding=plan["encoding"], crop=True)
        seen = self._work.window.numbers(shape[0])
        for row, frames in zip(rows, reader.several(range(len(rows))), strict=True):  # all frames: for the mean colour
            shown = frames if self._work.views else frames[seen.start : seen.stop : seen.step]
            yield row | {"colour": mean_colour(frames).tolist()}, shown

    def _of_videos(self, plan: dict[str, Any], rejected: list[Rejection], losses: list[Loss]) -> Iterator[_Clip]:
        """Clips of videos that lie side by side."""

        def cut(path: str) -> VideoClips:
            return self._encoder.cut_video(
                path,
                decoder=self._decoder,
                max_clips=self._work.max_clips_per_video,
                seconds=self._work.seconds_per_video,
                short_videos=self._work.short_videos,
            )

        for video, made in self._each_video(plan, cut, rejected):
            if made.damage:
                losses.append(video.loss(made.damage))
            for place, frames in enumerate(made.frames):
                starts = (made.start_times[place], made.start_seconds[place])
                yield video.row(place, starts, made.clip_seconds) | {"colour": mean_colour(frames).tolist()}, frames

    def _slide(
        self, plan: dict[str, Any], window: SlidingWindow, rejected: list[Rejection], losses: list[Loss]
    ) -> tuple[list[dict[str, Any]], npt.NDArray[np.float32]]:
        """Rows and features of the clips of a window that slides over videos."""

        def compute(first: int, frames: Frames) -> tuple[torch.Tensor, list[list[float]]]:
            return embed_batch(self._encoder, list(frames)), [mean_colour(clip).tolist() for clip in frames]

        def over(path: str) -> tuple[StoredClips, list[tuple[torch.Tensor, list[list[float]]]], float]:
            return slide(
                self._encoder,
                path,
                window,
                compute,
                decoder=self._decoder,
                batch_size=self._work.batch_size,
                seconds=self._work.seconds_per_video,
            )

        rows: list[dict[str, Any]] = []
        parts = [torch.zeros(0, self._encoder.feature_dim)]
        for video, (cut, batches, clip_seconds) in self._each_video(plan, over, rejected):
            if cut.damage:
                losses.append(video.loss(cut.damage))
            colours = [colour for _, each in batches for colour in each]
            for place, (seconds, colour) in enumerate(zip(cut.start_seconds, colours, strict=True)):
                # In microseconds: time stamps do not tell clips apart that begin between two frames of a slow video.
                rows.append(video.row(place, (round(seconds * 1e6), seconds), clip_seconds) | {"colour": colour})
            parts += [features for features, _ in batches]
        return rows, torch.cat(parts).numpy()

    def _each_video(
        self, plan: dict[str, Any], cut: Callable[[str], Made], rejected: list[Rejection]
    ) -> Iterator[tuple[_Video, Made]]:
        """Calls `cut` with the path of each video. One that fails with any error is added to `rejected`.

        Raises:
            ScratchError: the disk for temporary files cannot be written.
        """
        for name, num_bytes in plan["videos"]:
            found = source.Found(name, num_bytes)
            try:
                with attributed("decode"), contextlib.ExitStack() as stack:
                    with attributed("read"):
                        path = stack.enter_context(source.local_copy(plan["folder"], found))
                        sha256 = source.file_sha256(path)
                    made = cut(path)
            except VideoError as error:
                why = (error.stage, error.reason, error.message, error.transient)
                rejected.append(Rejection(name, *why, entry=found.entry))
                continue
            yield _Video(found, sha256), made


@dataclasses.dataclass(frozen=True)
class _Video:
    found: source.Found
    sha256: str

    def loss(self, damage: Damage) -> Loss:
        return Loss(self.found.video_id, damage.lost, damage.percent, damage.message, entry=self.found.entry)

    def row(self, place: int, starts: tuple[int, float], clip_seconds: float) -> dict[str, Any]:
        """A row of the table without its colour; `starts` is the number that names the clip, and its second."""
        name = self.found.video_id
        return {
            "clip_id": f"{hash64(name, starts[0]):016x}",
            "video_id": name,
            "start_seconds": starts[1],
            "clip_seconds": clip_seconds,
            "held_out": False,
            "source": name,
            "row": place,
            "sha256": self.sha256,
        }
