"""Videos -> data set: looks at the videos, plans the shards, lets Ray Data make one per task, writes the manifest.

    list  ->  probe: each video read once  ->  plan  ->  cut: one task makes one shard  ->  ledger  ->  manifest

Everything is planned before it is scheduled: which clips go into which shard, and the shard's name, follow from the
videos and the settings alone. So shards are the same bytes whatever the parallelism, a shard left by a killed run is
found again by its name, and adding videos touches no old shard. The manifest, written last, makes it a data set.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from vmoco import storage
from vmoco.data import contact_sheet, ingest_tasks, ledger
from vmoco.data.annotations import TABLES, list_annotated
from vmoco.data.decoder import Decoder
from vmoco.data.ingest_tasks import (
    CPUS_OF_LONG_TASKS,
    CPUS_OF_WAITING_TASKS,
    Probed,
    ShardPlan,
    found_from_json,
    make_shard,
    plan_shards,
    run_tasks,
)
from vmoco.data.ledger import Rejection
from vmoco.data.manifest import FIELDS, NAME, SHARDS, Manifest, write_manifest
from vmoco.data.shard import ShardFile
from vmoco.data.source import Found, Listing, list_videos, split_pattern
from vmoco.job_settings import IngestSettings
from vmoco.progress import Progress


def ingest(settings: IngestSettings, progress: Callable[[str], None] = print) -> Manifest:
    """Makes or continues the data set `settings.output`; needs an initialised Ray.

    A video that was accounted for by an earlier run is left alone while its size, range and label stay; one of which
    something changed replaces its clips. Videos that are gone from the folder stay in the data set.

    Args:
        settings: What to do.
        progress: Takes the progress lines.

    Raises:
        ValueError: no videos, no permission, other settings than those of the data set, or too many rejected.
    """
    root, listing = list_inputs(settings)
    output = storage.require_absolute(settings.output, "--output")
    previous = _previous(output, settings)
    old_ledger = _old_ledger(output, previous)
    new, num_changed = _new_videos(listing, previous, old_ledger)
    if listing.num_hidden:
        progress(f"ingest  {listing.num_hidden} hidden videos are left out")
    if previous and not new:
        progress(f"ingest  nothing new: all {len(listing.videos)} videos are accounted for in {output}")
        _check_rejected(previous.counts["videos"], ledger.read(output), output, settings)
        return previous
    if num_changed:
        progress(f"ingest  {num_changed} videos changed since they were ingested: their clips are replaced")
    storage.check_writable(output)

    replaced = {found.video_id for found in new}
    kept = pa.Table.from_pylist([], schema=pa.schema(FIELDS))
    if previous:
        stays = [video_id not in replaced for video_id in previous.table["video_id"].to_pylist()]
        kept = previous.table.filter(pa.array(stays, pa.bool_()))
    probed = _probe(new, root=root, output=output, settings=settings, progress=progress)
    good, rejected = _select(probed, kept, settings)
    made = _cut(good, root=root, output=output, settings=settings, progress=progress)

    table = pa.concat_tables([kept, pa.Table.from_pylist(made.rows, schema=pa.schema(FIELDS))])
    whole_ledger = [row for row in old_ledger if row.video_id not in replaced]
    whole_ledger += [*rejected, *made.rejected, *listing.rejected]
    ledger.write(output, whole_ledger)
    if table.num_rows:
        contact_sheet.write(output, table, frame_shape=settings.frame_shape, encoding=settings.encoding)
        manifest = write_manifest(
            output,
            table,
            settings=settings.content(),
            frame_shape=settings.frame_shape,
            encoding=settings.encoding,
            shards={**(previous.shards if previous else {}), **made.files},
            num_rejected=len(whole_ledger),
        )
        storage.delete_folder(storage.join(output, ingest_tasks.FOLDER))
    if whole_ledger:
        progress(f"ingest  rejected {len(whole_ledger)}: {ledger.totals(whole_ledger)}; see {output}/{ledger.NAME}")
    _check_rejected(manifest.counts["videos"] if table.num_rows else 0, whole_ledger, output, settings)
    return manifest


def list_inputs(settings: IngestSettings) -> tuple[str, Listing]:
    """The folder of the videos, and which of them are to be ingested.

    Raises:
        ValueError: nothing is there, or a list is wrong.
    """
    videos = storage.require_absolute(settings.videos, "--videos")
    if settings.annotations is not None:
        annotations = storage.require_absolute(settings.annotations, "--annotations")
        return videos, list_annotated(videos, annotations, settings.layout)
    if videos.lower().endswith(TABLES):
        folder = videos.rpartition("/")[0]
        return folder, list_annotated(folder, videos, "table")
    return split_pattern(videos)[0], list_videos(videos)


def _new_videos(listing: Listing, previous: Manifest | None, old_ledger: list[Rejection]) -> tuple[list[Found], int]:
    """The videos to ingest, and how many of them were ingested before as they were then."""
    known: dict[str, str] = {}
    if previous:
        columns = previous.table.select(["video_id", "entry"]).to_pydict()
        known = dict(zip(columns["video_id"], columns["entry"], strict=True))
    known |= {row.video_id: row.entry for row in old_ledger if not row.transient}
    new = {found.video_id for found in listing.videos if known.get(found.video_id) != found.entry}
    num_changed = len(new & known.keys())
    if num_changed:  # what a video duplicates may be what changed
        new |= {row.video_id for row in old_ledger if row.reason == "duplicate"}
    return [found for found in listing.videos if found.video_id in new], num_changed


def _select(probed: list[Probed], kept: pa.Table, settings: IngestSettings) -> tuple[list[Probed], list[Rejection]]:
    """The videos to cut, and those that are none or duplicates: of equal ones the first by name is taken."""
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
            said = f"the same content as {same}"
            rejected.append(Rejection(found.video_id, "read", "duplicate", said, entry=found.entry))
    return good, rejected


def _probe(
    videos: list[Found], *, root: str, output: str, settings: IngestSettings, progress: Callable[[str], None]
) -> list[Probed]:
    """Looks at all videos in Ray tasks, a group in each; in the order of the videos."""
    size = ingest_tasks.VIDEOS_PER_TASK
    groups = [videos[at : at + size] for at in range(0, len(videos), size)]

    def task(text: str) -> str:
        group = [found_from_json(found) for found in json.loads(text)]
        probed = ingest_tasks.probe_videos(group, root=root, output=output, settings=settings, decoder=_decoder())
        return json.dumps([each.to_json() for each in probed])

    report = Progress(
        progress, "ingest  looked at", total=len(videos), unit="videos", counts=["rejected", "clips"], rate="clips"
    )
    probed: list[Probed] = []
    items = [json.dumps([dataclasses.asdict(found) for found in group]) for group in groups]
    for text in run_tasks(task, items, num_cpus=CPUS_OF_WAITING_TASKS):
        done = [Probed.from_json(values) for values in json.loads(text)]
        rejected = sum(each.rejection is not None for each in done)
        report.add(len(done), rejected=rejected, clips=sum(each.num_clips for each in done))
        probed += done
    return sorted(probed, key=lambda each: each.found.video_id)


@dataclasses.dataclass
class _Made:
    rows: list[dict[str, Any]]
    rejected: list[Rejection]
    files: dict[str, ShardFile]


def _cut(
    good: list[Probed], *, root: str, output: str, settings: IngestSettings, progress: Callable[[str], None]
) -> _Made:
    """Makes all shards; a long video of which a part cannot be decoded alone is then decoded as a whole."""
    made = _make_shards(plan_shards(good, settings), root=root, output=output, settings=settings, progress=progress)
    again = {row.video_id for row in made.rejected if row.reason == ledger.NOT_SEEKABLE}
    if again:
        progress(f"ingest  {len(again)} long videos cannot be decoded in parts: each is decoded as a whole")
        plans = plan_shards([each for each in good if each.found.video_id in again], settings, whole=True)
        second = _make_shards(plans, root=root, output=output, settings=settings, progress=progress)
        made.rows = [row for row in made.rows if row["video_id"] not in again] + second.rows
        made.rejected = [row for row in made.rejected if row.video_id not in again] + second.rejected
        made.files |= second.files
    # A video of which one part is damaged is damaged; one row of the ledger is enough.
    made.rejected = list({row.video_id: row for row in reversed(made.rejected)}.values())
    damaged = {row.video_id for row in made.rejected}
    made.rows = [row for row in made.rows if row["video_id"] not in damaged]
    return made


def _make_shards(
    plans: list[ShardPlan], *, root: str, output: str, settings: IngestSettings, progress: Callable[[str], None]
) -> _Made:
    _remove_leftovers(output, plans)

    def task(text: str) -> str:
        plan = ShardPlan.from_json(text)
        return json.dumps(make_shard(plan, root=root, output=output, settings=settings, decoder=_decoder()))

    num_videos = len({unit.found.video_id for plan in plans for unit in plan.units})
    work = {plan.name: sum(unit.found.num_bytes // unit.num_parts for unit in plan.units) for plan in plans}
    report = Progress(
        progress,
        "ingest  cut",
        total=num_videos,
        unit="videos",
        counts=["rejected", "clips"],
        rate="clips",
        total_work=sum(work.values()),
    )
    parts: list[dict[str, Any]] = []
    counted: set[str] = set()
    by_name = {plan.name: plan for plan in plans}
    here = storage.local_path(root) is not None and storage.local_path(output) is not None
    num_cpus = CPUS_OF_LONG_TASKS if here else CPUS_OF_WAITING_TASKS
    for text in run_tasks(task, [plan.to_json() for plan in plans], num_cpus=num_cpus):
        made = json.loads(text)
        parts.append(made)
        videos = {unit.found.video_id for unit in by_name[made["shard"]].units} - counted
        counted |= videos
        count = {"rejected": len(made["rejected"]), "clips": len(made["rows"])}
        report.add(len(videos), work=work[made["shard"]], reused=made["reused"], **count)
    parts.sort(key=lambda made: made["shard"])
    return _Made(
        [row for made in parts for row in made["rows"]],
        [Rejection(**row) for made in parts for row in made["rejected"]],
        {made["shard"]: ShardFile(**made["file"]) for made in parts},
    )


_of_this_process: list[Decoder] = []


def _decoder() -> Decoder:
    """The decoder of this Ray worker, which runs one task after another."""
    if not _of_this_process:
        _of_this_process.append(Decoder())
    return _of_this_process[0]


def _old_ledger(output: str, previous: Manifest | None) -> list[Rejection]:
    """What earlier runs rejected; nothing of what is listed anew, or was left by a run killed before its manifest."""
    if previous is None:
        return []
    rows = [row for row in ledger.read(output) if row.stage != "list"]
    return [row for row in rows if not row.shard or row.shard in previous.shards]


def _previous(output: str, settings: IngestSettings) -> Manifest | None:
    """The manifest that is there, if it was made with the same settings."""
    if not storage.exists(storage.join(output, NAME)):
        return None
    manifest = Manifest.load(output)
    for name, value in settings.content().items():
        was = manifest.settings.get(name)
        if was != value:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"data set {output} was made with {option} {was}, not {value}: "
                f"use {option} {was} to continue it, or give another --output"
            )
    return manifest


def _remove_leftovers(output: str, plans: list[ShardPlan]) -> None:
    """Removes half-written shards of a killed run; only a local file system has such a thing."""
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
