"""Ray Data as a pool: a function over texts, one task for each; a task whose node dies is tried again.

The first look at videos: what each of them holds, before shards are planned. Knows nothing of Ray.

Every video is read once here, for its hash, its time stamps and whether it was cut off; nothing is decoded. The plan of
the shards follows from the results, which are kept beside the data set until it is complete: a run that was killed does
not read its videos again.


Planning shards, and what one task of ingest does: decodes what was planned for one shard and writes it.

Knows nothing of Ray. The clips of a shard wait in a nameless temporary file, not in memory: the shard's header, which
comes first, accounts for all its videos, so the last one must have been decoded before the first clip is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from vmoco import storage
from vmoco.cluster import ray_internals
from vmoco.data import fetch, shard
from vmoco.data.clips import ClipPlan, Part
from vmoco.data.decoder import Decoder
from vmoco.data.ledger import Rejection, VideoError
from vmoco.data.manifest import shard_uri
from vmoco.data.shard import VERSION, ShardMetadata, Video
from vmoco.data.shard_reader import ShardScan
from vmoco.data.source import Found
from vmoco.job_settings import IngestSettings
from vmoco.seed import hash64

CPUS_OF_LONG_TASKS = 1.0
"""One task to a core: two decoders that take turns on a core push each other out of its cache, and a clip costs each a
sixth more. Ray's loop sees only ten times a second that a task has ended, which is a fiftieth of a shard's time."""
CPUS_OF_WAITING_TASKS = 0.5
"""Two tasks share a core: one works while the other waits for a store, or is short and has ended unseen."""


def run_tasks(task: Callable[[str], str], items: list[str], *, num_cpus: float) -> Iterator[str]:
    """Runs a function over texts in Ray tasks, one per text, and yields the results as they are done.

    Args:
        task: The function.
        items: What it is called with.
        num_cpus: Cores of one task, which bound how many run at a time.

    Raises:
        ValueError: what a task raised as one.
    """
    import ray.data

    # Texts, because Ray would turn anything else into its own column types. An error travels as a value, because an
    # exception in a task would end the job with Ray's stack trace around it.
    def run(row: dict[str, str]) -> dict[str, str]:
        try:
            return {"result": task(row["item"]), "error": ""}
        except ValueError as error:
            return {"result": "", "error": str(error)}

    if not items:
        return
    context = ray.data.DataContext.get_current()
    log = logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.WARNING)
    logging.getLogger(ray_internals.PROGRESS_LOGGER).setLevel(logging.ERROR)  # it warns that bars are off
    try:
        # One block per text is one task per text.
        blocks = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
        for row in blocks.map(run, num_cpus=num_cpus).iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            yield row["result"]
    finally:
        context.enable_progress_bars = bars
        log.setLevel(level)


FOLDER = "probes"
"""Folder of the results in a data set that is being made."""
VIDEOS_PER_TASK = 32


@dataclasses.dataclass(frozen=True)
class Probed:
    """A video that was looked at."""

    found: Found
    sha256: str = ""
    """Hash of the file; empty where it could not be read."""
    num_clips: int = 0
    """Clips that it will give, unless the decoder finds other frames than the container promises."""
    parts: tuple[Part, ...] = ()
    """Parts of a long video; none where it is decoded as a whole."""
    duration: float = 0.0
    """Seconds."""
    rejection: Rejection | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Probed:
        """Reads `to_json` back."""
        return cls(
            found=found_from_json(values["found"]),
            sha256=values["sha256"],
            num_clips=values["num_clips"],
            parts=tuple(Part(**part) for part in values["parts"]),
            duration=values["duration"],
            rejection=Rejection(**values["rejection"]) if values["rejection"] else None,
        )


def found_from_json(values: dict[str, Any]) -> Found:
    """A `Found` from plain values."""
    return Found(**{**values, "splits": tuple(values["splits"])})


def clip_plan(settings: IngestSettings, found: Found) -> ClipPlan:
    """How clips are cut from a video."""
    return ClipPlan(
        num_frames=settings.num_frames,
        stride=settings.stride,
        max_clips=settings.max_clips_per_video,
        fps=settings.fps,
        short=settings.short_videos,
        start_seconds=found.start_seconds,
        end_seconds=found.end_seconds,
    )


def rejected(found: Found, error: VideoError) -> Rejection:
    """The ledger row of a video."""
    return Rejection(found.video_id, error.stage, error.reason, error.message, error.transient, entry=found.entry)


def probe_videos(
    videos: list[Found], *, root: str, output: str, settings: IngestSettings, decoder: Decoder
) -> list[Probed]:
    """Looks at a group of videos: what one task does. Results that are there already are taken.

    Raises:
        ValueError: the results cannot be written.
    """
    named = [settings.content(), settings.part_seconds, [found.entry for found in videos]]
    name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    place = storage.join(output, FOLDER, f"{name}.json")
    kept = _kept(place)
    if kept is None:
        kept = [_probe(found, root=root, settings=settings, decoder=decoder) for found in videos]
        if not any(each.rejection and each.rejection.transient for each in kept):
            storage.write_atomic(place, json.dumps([each.to_json() for each in kept]).encode())
    return kept


def _kept(place: str) -> list[Probed] | None:
    try:
        return [Probed.from_json(values) for values in json.loads(storage.read_bytes(place))]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _probe(found: Found, *, root: str, settings: IngestSettings, decoder: Decoder) -> Probed:
    sha256 = ""
    try:
        with fetch.local_copy(root, found) as path:
            sha256 = fetch.file_sha256(path)
            num_clips, parts, duration = decoder.probe(
                {"path": path},
                clip_plan(settings, found),
                part_seconds=settings.part_seconds,
                seconds=settings.seconds_per_video,
            )
        return Probed(found, sha256, num_clips, tuple(parts), duration)
    except VideoError as error:
        return Probed(found, sha256, rejection=rejected(found, error))


# What a JPEG at quality 92 takes of its raw frame, roughly: only the size of shards depends on it.
_JPEG_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is decoded in one go: a video, or a part of a long one."""

    found: Found
    sha256: str
    part: Part | None = None
    number: int = 0
    """Of the part."""
    num_parts: int = 1
    duration: float = 0.0
    """Of a video that is decoded as a whole, in seconds."""


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One task: what goes into one shard, and the shard's name, which follows from that."""

    name: str
    units: tuple[Unit, ...]

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ShardPlan:
        """Reads `to_json` back."""
        values = json.loads(text)
        for unit in values["units"]:
            unit["found"] = found_from_json(unit["found"])
            unit["part"] = Part(**unit["part"]) if unit["part"] else None
        return cls(values["name"], tuple(Unit(**unit) for unit in values["units"]))


def plan_shards(probed: Sequence[Probed], settings: IngestSettings, *, whole: bool = False) -> list[ShardPlan]:
    """Groups neighbours until a shard has the size that is aimed at; names follow from settings and content.

    Args:
        probed: The videos to cut, in the order of the shards; none is rejected.
        settings: Of the ingest.
        whole: Decode long videos as a whole too.
    """
    shape = settings.frame_shape
    clip_bytes = shape[0] * shape[1] * shape[2] * shape[3] * (1.0 if settings.encoding == "raw" else _JPEG_SHARE)
    groups: list[list[Unit]] = []
    size = 0.0
    for each in probed:
        for unit, num_clips in _units(each, whole=whole):
            full = groups and size + num_clips * clip_bytes > settings.shard_megabytes * 2**20
            if not groups or full or len(groups[-1]) == settings.videos_per_shard:
                groups.append([])
                size = 0.0
            groups[-1].append(unit)
            size += num_clips * clip_bytes
    return [ShardPlan(_name(group, settings), tuple(group)) for group in groups]


def _units(each: Probed, *, whole: bool) -> Iterator[tuple[Unit, int]]:
    if whole or not each.parts:
        yield Unit(each.found, each.sha256, duration=each.duration), each.num_clips
        return
    for number, part in enumerate(each.parts):
        yield Unit(each.found, each.sha256, part, number, len(each.parts)), len(part.clips)


def _name(group: list[Unit], settings: IngestSettings) -> str:
    units = [[unit.found.entry, unit.sha256, unit.part and [unit.part.start, unit.part.end]] for unit in group]
    named = json.dumps([VERSION, settings.content(), units], sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def is_held_out(video_id: str, percent: float) -> bool:
    """Whether a video is kept from training: a hash of its name, so the split is stable when videos are added."""
    return hash64("held-out", video_id) % 10_000 < percent * 100


def make_shard(
    plan: ShardPlan, *, root: str, output: str, settings: IngestSettings, decoder: Decoder
) -> dict[str, Any]:
    """Decodes what was planned for one shard and writes it: what one task does.

    A shard of that name that is there already holds the same bytes, unless something transient was in its way.

    Returns:
        `shard`, its `file`, its manifest `rows`, its `rejected` videos, `num_videos`, and whether it was `reused`.

    Raises:
        ValueError: the shard cannot be written.
    """
    uri = shard_uri(output, plan.name)
    try:
        there = shard.read_rows(uri)
        rows = there.table.to_pylist()
        scan = ShardScan(uri, rows)
        damaged = not all(whole for _, _, whole in scan)
        if not damaged and not any(rejection.transient for rejection in there.metadata.rejected):
            return _made(plan, rows, scan.file, there.metadata, reused=True)
    except (OSError, ValueError):
        pass  # missing, or damaged: it is made anew and replaced
    cuts: list[tuple[Unit, dict[str, Any]]] = []
    rejections: list[Rejection] = []
    offset = 0  # over the clips of the shard before, whose pages are there already: new ones cost more than the copy
    for unit in plan.units:
        try:
            cut = _cut(unit, root=root, settings=settings, decoder=decoder, offset=offset)
        except VideoError as error:
            rejections.append(rejected(unit.found, error))
        else:
            cuts.append((unit, cut | {"offset": offset}))
            offset += sum(cut["sizes"])
    videos = [
        Video(
            video_id=unit.found.video_id,
            num_bytes=unit.found.num_bytes,
            sha256=unit.sha256,
            entry=unit.found.entry,
            range=unit.found.range,
            part=unit.number,
            num_parts=unit.num_parts,
        )
        for unit in plan.units
    ]
    metadata = ShardMetadata(
        settings.content(), settings.frame_shape, tuple(videos), tuple(rejections), encoding=settings.encoding
    )
    rows, file = shard.write_shard(uri, _clips(cuts, decoder.scratch, settings), metadata=metadata)
    return _made(plan, rows, file, metadata, reused=False)


def _cut(unit: Unit, *, root: str, settings: IngestSettings, decoder: Decoder, offset: int) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if unit.part:
            source = fetch.ranged(root, unit.found)
        else:
            source = {"path": stack.enter_context(fetch.local_copy(root, unit.found))}
        return decoder.cut(
            source,
            clip_plan(settings, unit.found),
            part=unit.part,
            size=settings.size,
            encoding=settings.encoding,
            quality=settings.jpeg_quality,
            offset=offset,
            # A long video that could not be split takes as long as its parts would together.
            seconds=settings.seconds_per_video * max(1.0, unit.duration / settings.part_seconds),
        )


def _clips(
    cuts: list[tuple[Unit, dict[str, Any]]], scratch: BinaryIO, settings: IngestSettings
) -> Iterator[shard.Clip]:
    # Mapped, so that pixels go from one file to the other without a copy of their own.
    stored = np.memmap(scratch, np.uint8, mode="r") if any(cut["sizes"] for _, cut in cuts) else np.empty(0, np.uint8)
    for unit, cut in cuts:
        found, place, repeats, before = unit.found, cut["offset"], 0, None
        rate = settings.fps or cut["fps"]
        for time, seconds, size in zip(cut["start_times"], cut["start_seconds"], cut["sizes"], strict=True):
            # At a rate far above the video's, two clips may start with the same frame.
            repeats, before = (repeats + 1 if time == before else 0), time
            parts = [found.video_id, time, *([repeats] if repeats else [])]
            yield shard.Clip(
                clip_id=f"{hash64(*parts):016x}",
                video_id=found.video_id,
                start_seconds=seconds,
                fps=rate / settings.stride,
                held_out=is_held_out(found.video_id, settings.held_out_percent),
                stored=stored[place : place + size],
                label=found.label,
                splits=found.splits,
            )
            place += size


def _made(
    plan: ShardPlan, rows: list[dict[str, Any]], file: shard.ShardFile, metadata: ShardMetadata, *, reused: bool
) -> dict[str, Any]:
    videos = {read.video_id: read for read in metadata.videos}
    for number, row in enumerate(rows):
        read = videos[row["video_id"]]
        row |= {"shard": plan.name, "row": number, "entry": read.entry, "range": read.range}
        row |= {"video_bytes": read.num_bytes, "video_sha256": read.sha256}
    return {
        "shard": plan.name,
        "file": dataclasses.asdict(file),
        "rows": rows,
        "rejected": [{**rejection.to_json(), "shard": plan.name} for rejection in metadata.rejected],
        "num_videos": len(videos),
        "reused": reused,
    }
