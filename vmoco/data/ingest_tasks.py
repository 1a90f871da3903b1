"""The two kinds of tasks of ingest: one probes a group of videos, the other cuts the clips of one shard and writes it.

Knows nothing of Ray. Probing reads every video once, for its hash, its time stamps and whether it is truncated, and
decodes nothing; the plans of the shards follow from the results. These are kept beside the data set until it is
complete, so a run that continues a killed one reads no video again.

The clips of a shard wait in a temporary file, not in memory: the shard's header comes first and lists all its videos,
so the last one must be decoded before the first clip is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import TypeAdapter

from vmoco import storage
from vmoco.data import frame_folder, shard, shots, source
from vmoco.data.clip_scores import Looked, look
from vmoco.data.clips import ClipPlan
from vmoco.data.decoder import Decoder, Extent, StoredClips
from vmoco.data.found import Found
from vmoco.data.held_out import is_held_out
from vmoco.data.ingest_plan import Probed, ProbeTask, ShardPlan, Unit
from vmoco.data.ledger import DAMAGE, NOT_SEEKABLE, Loss, Rejection, VideoError, attributed
from vmoco.data.manifest import FIELDS, shard_uri
from vmoco.data.parts import decoded_whole
from vmoco.data.shard import ShardFile, ShardMetadata, Video
from vmoco.data.shard_reader import ShardScan
from vmoco.data.shots import Stretch
from vmoco.job_settings import IngestSettings
from vmoco.seed import hash64

FOLDER = "probes"
"""Folder of the results of probing, in a data set that is not complete yet."""
_MOST_SECONDS = 7 * 86400.0
"""Longest time limit of a video; the system allows no more than 24 days."""


_PROBED = TypeAdapter(list[Probed])


def clip_plan(settings: IngestSettings, found: Found) -> ClipPlan:
    """How clips are cut from a video."""
    return ClipPlan(
        num_frames=settings.num_frames,
        stride=settings.stride,
        max_clips=settings.max_clips_per_video,
        fps=settings.fps,
        short=settings.short_videos,
        hdr=settings.hdr,
        deinterlace=settings.deinterlace,
        start_seconds=found.start_seconds,
        end_seconds=found.end_seconds,
        damaged=settings.damaged,
        max_damaged_percent=settings.max_damaged_percent,
        split_at_cuts=settings.at_cuts == "split",
    )


def rejected(found: Found, error: VideoError, settings: IngestSettings) -> Rejection:
    """The ledger row of a video."""
    damaged = settings.damaged if error.reason in DAMAGE else ""
    why = (error.stage, error.reason, error.message, error.transient)
    return Rejection(found.video_id, *why, entry=found.entry, damaged=damaged)


def settled(rejection: Rejection, settings: IngestSettings) -> bool:
    """Whether another try would reject the video again: not after a transient error, nor where damage now counts less.

    Data sets from before `--damaged` rejected every damaged video.
    """
    if rejection.transient:
        return False
    return rejection.reason not in DAMAGE or (rejection.damaged or "reject") == settings.damaged


def probe_videos(
    task: ProbeTask, *, root: str, output: str, settings: IngestSettings, decoder: Decoder
) -> list[Probed]:
    """Probes a group of videos, or takes the results of an earlier run.

    Raises:
        ValueError: the results cannot be written.
    """
    named = [settings.content(), settings.part_seconds, [found.entry for found in task.videos]]
    name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    place = storage.join(output, FOLDER, f"{name}.json")
    kept = _kept(place, task, settings)
    if kept is not None:
        return kept
    probed = [_probe(found, root=root, settings=settings, decoder=decoder) for found in task.videos]
    if not any(each.rejection and each.rejection.transient for each in probed):
        storage.write_atomic(place, _PROBED.dump_json(probed))
    return probed


def _kept(place: str, task: ProbeTask, settings: IngestSettings) -> list[Probed] | None:
    """The results of an earlier run; None if there are none, or none that are settled for this version."""
    try:
        kept = _PROBED.validate_json(storage.read_bytes(place))
    except (OSError, ValueError):
        return None
    if any(each.rejection and not settled(each.rejection, settings) for each in kept):
        return None
    return kept if tuple(each.found for each in kept) == task.videos else None


def _probe(found: Found, *, root: str, settings: IngestSettings, decoder: Decoder) -> Probed:
    sha256 = ""
    try:
        with attributed("probe"), contextlib.ExitStack() as stack:
            with attributed("read"):
                path = stack.enter_context(source.fetched(root, found))
                if isinstance(path, source.PictureFolder):
                    sha256 = frame_folder.sha256(path)
                else:
                    sha256 = source.file_sha256(path)
            contents = decoder.probe(
                path,
                clip_plan(settings, found),
                part_seconds=settings.part_seconds,
                seconds=settings.seconds_per_video,
            )
        return Probed(found, sha256, contents.num_clips, contents.parts, contents.duration, contents.notes)
    except VideoError as error:
        return Probed(found, sha256, rejection=rejected(found, error, settings))


ManifestRows = Annotated[list[dict[str, Any]], pa.list_(pa.struct(FIELDS))]
"""Rows of the manifest, one per clip."""


@dataclasses.dataclass(frozen=True)
class MadeShard:
    """A shard that was written, or was there already."""

    name: str
    file: ShardFile
    rows: ManifestRows
    rejected: tuple[Rejection, ...]
    reused: bool
    """It was there already, with the same bytes."""
    losses: tuple[Loss, ...] = ()
    """Videos of which a part is lost."""
    stretches: tuple[Stretch, ...] = ()
    """Of its videos with parts in other shards: `shot` of the rows counts on from there."""


def make_shard(plan: ShardPlan, *, root: str, output: str, settings: IngestSettings, decoder: Decoder) -> MadeShard:
    """Cuts the clips of one shard and writes it, or takes the shard of an earlier run.

    An existing shard of that name has the same bytes, unless one of its rejections is not `settled`.

    Raises:
        ValueError: the shard, or the temporary file, cannot be written.
    """
    uri = shard_uri(output, plan.name)
    reused = _existing(plan, uri, settings)
    if reused is not None:
        return reused
    cuts: list[tuple[Unit, int, StoredClips]] = []
    rejections: list[Rejection] = []
    notes = [unit.notes for unit in plan.units]
    losses: list[Loss] = []
    offset = 0  # overwrites the clips of the shard before: new pages of the file would cost more than the copy
    for number, unit in enumerate(plan.units):
        try:
            cut = _cut(unit, root=root, settings=settings, decoder=decoder, offset=offset)
        except VideoError as error:
            rejections.append(rejected(unit.found, error, settings))
        else:
            cuts.append((unit, offset, cut))
            notes[number] += cut.notes
            offset += sum(cut.sizes)
            if cut.damage:
                named = dataclasses.asdict(cut.damage)
                losses.append(Loss(video_id=unit.found.video_id, entry=unit.found.entry, **named))
    looked = _looked(cuts, decoder.scratch, settings)
    kept = [[settings.at_cuts == "keep" or not each.scores.cuts for each in own] for own in looked]
    new_shots = _new_shots(cuts, kept)
    for name, own in _of_videos(cuts, kept).items():
        if dropped := own.count(False):
            number = next(number for number, unit in enumerate(plan.units) if unit.found.video_id == name)
            notes[number] += (f"cuts: {dropped} of {len(own)} clips cross a cut and are left out",)
    videos = [
        Video(
            video_id=unit.found.video_id,
            num_bytes=unit.found.num_bytes,
            sha256=unit.sha256,
            entry=unit.found.entry,
            range=unit.found.range,
            source=unit.found.source,
            part=unit.number,
            num_parts=unit.num_parts,
            notes=own,
            new_shots=new_shots.get((unit.found.video_id, unit.number), ()),
        )
        for unit, own in zip(plan.units, notes, strict=True)
    ]
    metadata = ShardMetadata(
        settings.content(),
        settings.frame_shape,
        tuple(videos),
        tuple(rejections),
        encoding=settings.encoding,
        losses=tuple(losses),
    )
    rows, file = shard.write_shard(uri, _clips(cuts, decoder.scratch, settings, kept), metadata=metadata)
    stored = [each for own in zip(looked, kept, strict=True) for each in itertools.compress(*own)]
    return _made(plan, rows, stored, file, metadata, settings, reused=False)


def _existing(plan: ShardPlan, uri: str, settings: IngestSettings) -> MadeShard | None:
    """The shard if it is there, undamaged, and each of its rejections is settled; otherwise it is made again."""
    try:
        there = shard.read_rows(uri)
        rows = there.table.to_pylist()
        scan = ShardScan(uri, rows, by_clips=True)  # its name says the version
        looked: list[Looked] = []
        intact = _knows_its_shots(there.metadata)
        for _, stored, whole in scan:
            intact = intact and whole
            if intact:
                looked.append(look(stored, settings.encoding, settings.frame_shape))
        if intact and all(settled(rejection, settings) for rejection in there.metadata.rejected):
            return _made(plan, rows, looked, scan.file, there.metadata, settings, reused=True)
    except (OSError, ValueError):
        pass
    return None


def _knows_its_shots(metadata: ShardMetadata) -> bool:
    """Whether the shard says where the cuts are that its notes count; those of earlier versions do not."""
    told = {video.video_id for video in metadata.videos if video.new_shots}
    noted = {video.video_id for video in metadata.videos if any(note.startswith("cuts:") for note in video.notes)}
    return noted <= told


def _cut(unit: Unit, *, root: str, settings: IngestSettings, decoder: Decoder, offset: int) -> StoredClips:
    def cut(video: source.Source, extent: Extent, seconds: float) -> StoredClips:
        return decoder.cut(
            video,
            clip_plan(settings, unit.found),
            extent=extent,
            size=settings.size,
            encoding=settings.encoding,
            quality=settings.jpeg_quality,
            offset=offset,
            seconds=seconds,
        )

    with attributed("decode"), contextlib.ExitStack() as stack:
        notes: tuple[str, ...] = ()
        rounds = 2 if settings.at_cuts == "split" else 1  # a video with cuts is decoded twice
        if unit.part:
            with attributed("read"):
                video = source.ranged(root, unit.found)
            try:
                return cut(video, unit.part, settings.seconds_per_video * rounds)
            except VideoError as error:
                if error.reason != NOT_SEEKABLE or unit.num_parts > 1:  # other tasks have the other parts
                    raise
                notes = (decoded_whole(error.message),)
        with attributed("read"):
            video = stack.enter_context(source.fetched(root, unit.found))
        # Decoding a long video takes as long as its parts would together.
        # A wrong time stamp may say that it lasts for years.
        times_as_long = max(1.0, unit.duration / settings.part_seconds)
        limit = min(settings.seconds_per_video * rounds * times_as_long, _MOST_SECONDS)
        made = cut(video, "whole", limit)
        return dataclasses.replace(made, notes=(*notes, *made.notes))


Cuts = list[tuple[Unit, int, StoredClips]]
"""What was cut of each unit, and its offset in the scratch file."""


def _mapped(cuts: Cuts, scratch: BinaryIO) -> npt.NDArray[np.uint8]:
    # A memory map, so pixels go from one file to the other without a further copy.
    return np.memmap(scratch, np.uint8, mode="r") if any(cut.sizes for *_, cut in cuts) else np.empty(0, np.uint8)


def _looked(cuts: Cuts, scratch: BinaryIO, settings: IngestSettings) -> list[list[Looked]]:
    """Looks at each clip of each unit."""
    stored, looked = _mapped(cuts, scratch), []
    for _, place, cut in cuts:
        ends = itertools.pairwise((place + np.cumsum([0, *cut.sizes])).tolist())
        looked.append([look(stored[low:high], settings.encoding, settings.frame_shape) for low, high in ends])
    return looked


def _new_shots(cuts: Cuts, kept: list[list[bool]]) -> dict[tuple[str, int], tuple[int, ...]]:
    """`shard.Video.new_shots` of each unit, by video and part; a clip that is left out lies between two shots."""
    found, before = {}, Counter[str]()
    for (unit, _, cut), own in zip(cuts, kept, strict=True):
        name = unit.found.video_id
        places = (before[name] + np.cumsum([0, *own])).tolist()  # of the first clip that stays, from each one on
        left_out = [number for number, stays in enumerate(own) if not stays]
        found[name, unit.number] = tuple(sorted({places[number] for number in (*cut.new_shots, *left_out)}))
        before[name] = places[-1]
    return found


def _of_videos(cuts: Cuts, kept: list[list[bool]]) -> dict[str, list[bool]]:
    """Which clips of each video stay, over all its parts in the shard."""
    found: dict[str, list[bool]] = {}
    for (unit, *_), own in zip(cuts, kept, strict=True):
        found.setdefault(unit.found.video_id, []).extend(own)
    return found


def _clips(cuts: Cuts, scratch: BinaryIO, settings: IngestSettings, kept: list[list[bool]]) -> Iterator[shard.Clip]:
    """The clips of a shard, from the scratch file."""
    stored = _mapped(cuts, scratch)
    for (unit, place, cut), own in zip(cuts, kept, strict=True):
        found, repeats, before = unit.found, 0, None
        rate = settings.fps or cut.fps
        columns = (cut.start_times, cut.start_seconds, cut.sizes, own)
        for time, seconds, size, stays in zip(*columns, strict=True):
            # At a rate far above the video's, two clips may start with the same frame.
            repeats, before = (repeats + 1 if time == before else 0), time
            parts = [found.video_id, time, *([repeats] if repeats else [])]
            if not stays:
                place += size
                continue
            yield shard.Clip(
                clip_id=f"{hash64(*parts):016x}",
                video_id=found.video_id,
                start_seconds=seconds,
                fps=rate / settings.stride,
                held_out=is_held_out(found.source or found.video_id, settings.held_out_percent),
                stored=stored[place : place + size],
                label=found.label,
                splits=found.splits,
            )
            place += size


def _made(
    plan: ShardPlan,
    rows: list[dict[str, Any]],
    looked: list[Looked],
    file: ShardFile,
    metadata: ShardMetadata,
    settings: IngestSettings,
    *,
    reused: bool,
) -> MadeShard:
    stretches = _add_scores(rows, looked, metadata, settings)
    videos = _parts(metadata)
    notes = {name: dict.fromkeys(note for part in parts for note in part.notes) for name, parts in videos.items()}
    for number, row in enumerate(rows):
        read = videos[row["video_id"]][0]
        row |= {"shard": plan.name, "row": number, "entry": read.entry, "range": read.range}
        row |= {"video_bytes": read.num_bytes, "video_sha256": read.sha256, "source": read.source}
        row |= {"notes": "; ".join(notes[row["video_id"]]) or None}
    rejections = tuple(dataclasses.replace(rejection, shard=plan.name) for rejection in metadata.rejected)
    losses = tuple(dataclasses.replace(loss, shard=plan.name) for loss in metadata.losses)
    return MadeShard(plan.name, file, rows, rejections, reused, losses, stretches)


def _add_scores(
    rows: list[dict[str, Any]], looked: list[Looked], metadata: ShardMetadata, settings: IngestSettings
) -> tuple[Stretch, ...]:
    """Adds the columns of `clip_scores.FIELDS` to the rows; returns what the shots of other shards depend on."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row["video_id"], []).append(place)
    stretches = []
    for name, parts in _parts(metadata).items():
        own = places.get(name, [])
        known = {number for video in parts for number in video.new_shots}
        clips = [looked[place] for place in own]
        found = shots.numbers(clips, known=known, every_frame=settings.at_cuts == "split")
        for place, clip, shot in zip(own, clips, found, strict=True):
            rows[place] |= {**dataclasses.asdict(clip.scores), "shot": shot}
        if len(parts) < parts[0].num_parts:
            stretches.append(shots.stretch(name, parts[0].part, clips, found, known))
    return tuple(stretches)


def _parts(metadata: ShardMetadata) -> dict[str, list[Video]]:
    """What of each video was read for the shard, by its name."""
    found: dict[str, list[Video]] = {}
    for video in metadata.videos:
        found.setdefault(video.video_id, []).append(video)
    return found
