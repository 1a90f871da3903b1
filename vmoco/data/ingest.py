"""Videos -> data set: probes the videos, plans the shards, lets Ray Data make one per task, writes the manifest.

    list  ->  probe: each video read once  ->  plan  ->  cut: one task makes one shard  ->  ledger  ->  manifest

Everything is planned before it is scheduled: the content of each shard, and its name, follow from the videos and the
settings alone. So shards have the same bytes whatever the parallelism, a shard of a killed run is found again by its
name, and adding videos changes no old shard. The manifest, written last, makes the folder a data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from vmoco import storage
from vmoco.data import contact_sheet, ingest_tasks, ledger
from vmoco.data.annotations import LISTS, list_annotated
from vmoco.data.decoder import Decoder
from vmoco.data.disk_space import check_space
from vmoco.data.distribute import run_tasks
from vmoco.data.held_out import is_by_entry, scoring_problem
from vmoco.data.ingest_tasks import (
    MadeShard,
    Probed,
    ProbeTask,
    ShardPlan,
    make_shard,
    plan_shards,
    probe_videos,
    settled,
)
from vmoco.data.ledger import Loss, Rejection
from vmoco.data.listing import Footage, labelled_by_folder, list_footage
from vmoco.data.manifest import FIELDS, NAME, SHARDS, Manifest, note_counts, write_manifest
from vmoco.data.parts import decoded_whole
from vmoco.data.shard import ShardFile
from vmoco.data.source import Found, Listing
from vmoco.job_settings import IngestSettings, Layout
from vmoco.progress import Progress

CUTS = "each of its clips crosses a cut between shots, and --at-cuts is {}: keep takes them, and so do shorter clips"
CPUS_OF_LONG_TASKS = 1.0
"""One task per core: two decoders that share a core push each other out of its cache, and a clip costs each a sixth
more. Ray notices the end of a task only ten times a second, which costs a fiftieth of a shard's time."""
CPUS_OF_WAITING_TASKS = 0.5
"""Two tasks per core: one works while the other waits for a store, or has ended and Ray has not noticed yet."""


def ingest(settings: IngestSettings, progress: Callable[[str], None] = print) -> Manifest:
    """Makes or continues the data set `settings.output`; needs an initialised Ray.

    A video of an earlier run is skipped while its size, range and label stay the same; otherwise its clips are
    replaced. Videos that are gone from the folder stay in the data set.

    Args:
        settings: Of the ingest.
        progress: Takes the progress lines.

    Raises:
        ValueError: no videos, no permission, other settings than those of the data set, or too many rejected videos.
    """
    root, listing = list_inputs(settings)
    output = storage.require_absolute(settings.output, "--output")
    for note in listing.notes:
        progress(f"ingest  {note}")
    previous = _previous(output, settings)
    old_ledger = _old_ledger(output, previous)
    new, num_changed = _new_videos(listing, previous, old_ledger, settings)
    if listing.num_hidden:
        progress(f"ingest  {listing.num_hidden} hidden videos are skipped")
    if listing.left_out:
        progress(f"ingest  {listing.left_out}")
    if previous and not new:
        progress(f"ingest  nothing new: all {len(listing.videos)} videos are in {output} or its ledger")
        _check_rejected(previous.counts["videos"], ledger.read(output), output, settings)
        _warn_of_held_out(previous, settings, progress)
        return previous
    if num_changed:
        progress(f"ingest  {num_changed} videos changed since they were ingested: their clips are replaced")
    if previous and is_by_entry(previous.table):
        progress("ingest  this data set holds out each range by itself, as earlier versions did, and goes on so")
        new = [dataclasses.replace(found, source=found.group) for found in new]
    storage.check_writable(output)

    replaced = {found.video_id for found in new}
    kept = pa.Table.from_pylist([], schema=pa.schema(FIELDS))
    if previous:
        stays = [video_id not in replaced for video_id in previous.table["video_id"].to_pylist()]
        kept = previous.table.filter(pa.array(stays, pa.bool_()))
    probed = _probe_all(new, root=root, output=output, settings=settings, progress=progress)
    good, rejected = _select(probed, kept, settings)
    if good:
        continues = previous is not None
        progress(f"ingest  {check_space(good, output=output, settings=settings, continues=continues)}")
    made = _cut_all(good, root=root, output=output, settings=settings, progress=progress)

    table = pa.concat_tables([kept, pa.Table.from_pylist(made.rows, schema=pa.schema(FIELDS))])
    rejections = [row for row in old_ledger if row.video_id not in replaced]
    rejections += [*rejected, *made.rejected, *listing.rejected]
    losses = [*_old_losses(output, previous, replaced), *made.losses]
    ledger.write(output, rejections, losses)
    if table.num_rows:
        contact_sheet.write(output, table, frame_shape=settings.frame_shape, encoding=settings.encoding)
        manifest = write_manifest(
            output,
            table,
            settings=settings.content(),
            frame_shape=settings.frame_shape,
            encoding=settings.encoding,
            shards={**(previous.shards if previous else {}), **made.files},
            num_rejected=len(rejections),
        )
        storage.delete_folder(storage.join(output, ingest_tasks.FOLDER))
    if losses:
        progress(f"ingest  {len(losses)} videos are damaged: clips without damage are kept; see {output}/{ledger.NAME}")
    if rejections:
        progress(f"ingest  rejected {len(rejections)}: {ledger.totals(rejections)}; see {output}/{ledger.NAME}")
    _check_rejected(manifest.counts["videos"] if table.num_rows else 0, rejections, output, settings)
    if table.num_rows and (noted := note_counts(table)):
        progress("ingest  " + ", ".join(f"{kind} {count}" for kind, count in noted.items()) + ": see the column notes")
    _warn_of_held_out(manifest, settings, progress)
    return manifest


def list_inputs(settings: IngestSettings) -> tuple[str, Listing]:
    """The folder of the videos, and which of them to ingest.

    Raises:
        ValueError: there are no videos, or a list is wrong.
    """
    videos = storage.require_absolute(settings.videos, "--videos")
    annotations = settings.annotations
    if annotations is not None:
        annotations = storage.require_absolute(annotations, "--annotations")
    elif videos.lower().endswith(LISTS):
        videos, annotations = videos.rpartition("/")[0], videos
    footage: Footage = settings.layout if settings.layout in ("frames", "tar") else "auto"
    options: dict[str, Any] = {"fps": settings.fps, "suffixes": settings.suffixes}
    if annotations is None:
        listing = labelled_by_folder(list_footage(videos, footage, **options))
    else:
        layout: Layout = settings.layout if footage == "auto" else "auto"
        listing = list_annotated(videos, annotations, layout, footage=footage, **options)
    return listing.root, listing


def _new_videos(
    listing: Listing, previous: Manifest | None, old_ledger: list[Rejection], settings: IngestSettings
) -> tuple[list[Found], int]:
    """The videos to ingest, and how many of them have changed since an earlier run."""
    known: dict[str, str] = {}
    if previous:
        columns = previous.table.select(["video_id", "entry"]).to_pydict()
        known = dict(zip(columns["video_id"], columns["entry"], strict=True))
    known |= {row.video_id: row.entry for row in old_ledger if settled(row, settings)}
    new = {found.video_id for found in listing.videos if known.get(found.video_id) != found.entry}
    num_changed = len(new & known.keys())
    if num_changed:  # a duplicate may be one of a video that has changed
        new |= {row.video_id for row in old_ledger if row.reason == "duplicate"}
    return [found for found in listing.videos if found.video_id in new], num_changed


def _select(probed: list[Probed], kept: pa.Table, settings: IngestSettings) -> tuple[list[Probed], list[Rejection]]:
    """The videos to cut, and the rejected ones; of equal videos the first by name is kept, unless all are."""
    columns = kept.select(["video_sha256", "range", "video_id"]).to_pydict()
    first = {(sha256, span): name for sha256, span, name in zip(*columns.values(), strict=True)}
    good, rejected = [], []
    for each in probed:
        if each.rejection:
            rejected.append(each.rejection)
            continue
        found = each.found
        same = first.setdefault((each.sha256, found.range), found.video_id)
        if same == found.video_id or settings.duplicates == "keep":
            good.append(each)
        else:
            message = f"the same content as {same}"
            rejected.append(Rejection(found.video_id, "read", "duplicate", message, entry=found.entry))
    return good, rejected


def _probe_all(
    videos: list[Found], *, root: str, output: str, settings: IngestSettings, progress: Callable[[str], None]
) -> list[Probed]:
    """The first pass: probes all videos in Ray tasks; returns them sorted by video_id."""

    def task(plan: ProbeTask) -> list[Probed]:
        return probe_videos(plan, root=root, output=output, settings=settings, decoder=_decoder())

    size = ingest_tasks.VIDEOS_PER_TASK
    plans = [ProbeTask(tuple(videos[at : at + size])) for at in range(0, len(videos), size)]
    report = Progress(
        progress, "ingest  looked at", total=len(videos), unit="videos", counts=["rejected", "clips"], rate="clips"
    )
    probed = []
    for each in run_tasks(task, plans, returns=Probed, num_cpus=CPUS_OF_WAITING_TASKS):
        report.add(rejected=int(each.rejection is not None), clips=each.num_clips)
        probed.append(each)
    return sorted(probed, key=lambda each: each.found.video_id)


@dataclasses.dataclass(frozen=True)
class _Made:
    """All new shards: their manifest rows, rejected videos, and files by name."""

    rows: list[dict[str, Any]]
    rejected: list[Rejection]
    losses: list[Loss]
    files: dict[str, ShardFile]


def _cut_all(
    good: list[Probed], *, root: str, output: str, settings: IngestSettings, progress: Callable[[str], None]
) -> _Made:
    """The second pass: makes all shards in Ray tasks.

    A long video is decoded in one go after all if one of its parts cannot be decoded alone.
    """

    def make(plans: list[ShardPlan]) -> list[MadeShard]:
        return _make_shards(plans, root=root, output=output, settings=settings, progress=progress)

    shards = make(plan_shards(good, settings))
    rows = [row for made in shards for row in made.rows]
    rejected = [rejection for made in shards for rejection in made.rejected]
    losses = [loss for made in shards for loss in made.losses]
    again = {row.video_id: row.message for row in reversed(rejected) if row.reason == ledger.NOT_SEEKABLE}
    if again:
        progress(f"ingest  {len(again)} long videos cannot be decoded in parts: each is decoded as a whole")
        whole = [
            dataclasses.replace(each, notes=(*each.notes, decoded_whole(again[each.found.video_id])))
            for each in good
            if each.found.video_id in again
        ]
        second = make(plan_shards(whole, settings, whole=True))
        rows = [row for row in rows if row["video_id"] not in again]
        rows += [row for made in second for row in made.rows]
        rejected = [rejection for rejection in rejected if rejection.video_id not in again]
        rejected += [rejection for made in second for rejection in made.rejected]
        losses += [loss for made in second for loss in made.losses]
        shards += second
    # A long video with one damaged part is damaged, and has one row in the ledger.
    first = {rejection.video_id: rejection for rejection in reversed(rejected)}
    rows = [row for row in rows if row["video_id"] not in first]
    losses = [loss for loss in losses if loss.video_id not in first]
    there = {row["video_id"] for row in rows} | first.keys()
    gone = [each.found for each in good if each.found.video_id not in there]
    why = CUTS.format(settings.at_cuts)
    cut = [Rejection(found.video_id, "clip", "cuts", why, entry=found.entry) for found in gone]
    return _Made(rows, [*first.values(), *cut], losses, {made.name: made.file for made in shards})


def _make_shards(
    plans: list[ShardPlan], *, root: str, output: str, settings: IngestSettings, progress: Callable[[str], None]
) -> list[MadeShard]:
    """Makes the planned shards in Ray tasks; returns them sorted by name."""
    _remove_leftovers(output, plans)

    def task(plan: ShardPlan) -> list[MadeShard]:
        return [make_shard(plan, root=root, output=output, settings=settings, decoder=_decoder())]

    work = {plan.name: sum(unit.found.num_bytes // unit.num_parts for unit in plan.units) for plan in plans}
    videos = {plan.name: {unit.found.video_id for unit in plan.units} for plan in plans}
    report = Progress(
        progress,
        "ingest  cut",
        total=len(set().union(*videos.values())),
        unit="videos",
        counts=["rejected", "clips"],
        rate="clips",
        total_work=sum(work.values()),
    )
    local = storage.local_path(root) is not None and storage.local_path(output) is not None
    num_cpus = CPUS_OF_LONG_TASKS if local else CPUS_OF_WAITING_TASKS
    shards, counted = [], set[str]()
    for made in run_tasks(task, plans, returns=MadeShard, num_cpus=num_cpus):
        new = videos[made.name] - counted
        counted |= new
        counts = {"rejected": len(made.rejected), "clips": len(made.rows)}
        report.add(len(new), work=work[made.name], reused=made.reused, **counts)
        shards.append(made)
    return sorted(shards, key=lambda made: made.name)


_of_this_process: list[Decoder] = []


def _decoder() -> Decoder:
    """The decoder of this Ray worker; a worker runs one task at a time."""
    if not _of_this_process:
        _of_this_process.append(Decoder())
    return _of_this_process[0]


def _old_ledger(output: str, previous: Manifest | None) -> list[Rejection]:
    """What earlier runs rejected, without what every run lists again, and without rows of shards in no manifest."""
    if previous is None:
        return []
    rows = [row for row in ledger.read(output) if row.stage != "list"]
    return [row for row in rows if not row.shard or row.shard in previous.shards]


def _old_losses(output: str, previous: Manifest | None, replaced: set[str]) -> list[Loss]:
    """What earlier runs lost of videos that are still in the data set as they were."""
    if previous is None:
        return []
    return [row for row in ledger.read_losses(output) if row.shard in previous.shards and row.video_id not in replaced]


def _previous(output: str, settings: IngestSettings) -> Manifest | None:
    """The manifest of an earlier run, which must have had the same settings; None if there is none."""
    if not storage.exists(storage.join(output, NAME)):
        return None
    manifest = Manifest.load(output)
    given = settings.content()
    # An option that came later is written only where it is used.
    fields = type(settings).model_fields
    for name in given | manifest.settings:
        default = fields[name].default if name in fields else None
        value, was = given.get(name, default), manifest.settings.get(name, default)
        if was != value:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"data set {output} was made with {option} {was}, not {value}: "
                f"use {option} {was} to continue it, or give another --output"
            )
    return manifest


def _remove_leftovers(output: str, plans: list[ShardPlan]) -> None:
    """Removes half-written shards of a killed run; only a local file system shows them."""
    folder = storage.local_path(storage.join(output, SHARDS))
    names = {f".{plan.name}.arrow" for plan in plans}
    for path in folder.glob(".*.tmp") if folder else ():
        if path.name.rsplit(".", 2)[0] in names:
            path.unlink(missing_ok=True)


def _check_rejected(num_accepted: int, rejected: list[Rejection], output: str, settings: IngestSettings) -> None:
    total = num_accepted + len(rejected)
    percent = 100 * len(rejected) / total
    if num_accepted and percent <= settings.max_rejected_percent:
        return
    todo = f"see {storage.join(output, ledger.NAME)}"
    if num_accepted:
        todo += f"; the clips of the others are kept, and --max-rejected-percent {percent:.0f} would accept this"
    raise ValueError(f"{len(rejected)} of {total} videos were rejected ({ledger.totals(rejected)}): {todo}")


def _warn_of_held_out(manifest: Manifest, settings: IngestSettings, progress: Callable[[str], None]) -> None:
    """Warns where an encoder cannot be scored on the held-out videos, unless none are wanted."""
    if settings.held_out_percent and (problem := scoring_problem(manifest)):
        progress(f"warning: an encoder cannot be scored on this data set: {problem}")
