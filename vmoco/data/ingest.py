"""Videos -> data set: probes the videos, plans the shards, lets Ray Data make one per task, writes the manifest.

    list  ->  probe: each video read once  ->  plan  ->  cut: one task makes one shard  ->  ledger  ->  manifest

Everything is planned before it is scheduled: the content of each shard, and its name, follow from the videos and the
settings alone. So shards have the same bytes whatever the parallelism, a shard of a killed run is found again by its
name, and adding videos changes no old shard. The manifest, written last, makes the folder a data set.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from vmoco import storage
from vmoco.data import contact_sheet, ingest_plan, ingest_tasks, ledger
from vmoco.data.annotations import LISTS, list_annotated
from vmoco.data.catalog import Catalog
from vmoco.data.decoder import Decoder
from vmoco.data.disk_space import check_space
from vmoco.data.distribute import in_groups, run_tasks
from vmoco.data.held_out import scoring_problem
from vmoco.data.ingest_plan import Probed, ProbeTask, ShardPlan, plan_shards
from vmoco.data.ingest_tasks import MadeShard, make_shard, probe_videos
from vmoco.data.listing import Footage, labelled_by_folder, list_footage
from vmoco.data.manifest import NAME, SHARDS, Manifest
from vmoco.data.manifest_writer import write_manifest
from vmoco.data.source import Listing
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
    with contextlib.closing(Catalog(settings, previous)) as catalog:
        catalog.take_listing(listing.videos, listing.rejected)
        if listing.num_hidden:
            progress(f"ingest  {listing.num_hidden} hidden videos are skipped")
        if listing.left_out:
            progress(f"ingest  {listing.left_out}")
        if previous and not catalog.num_new:
            progress(f"ingest  nothing new: all {len(listing.videos)} videos are in {output} or its ledger")
            _check_rejected(previous.counts["videos"], _reasons(output), output, settings)
            _warn_of_held_out(previous, settings, progress)
            return previous
        if catalog.num_changed:
            progress(f"ingest  {catalog.num_changed} videos changed since they were ingested: their clips are replaced")
        root = listing.root
        del listing  # the catalog has it
        return _add(catalog, previous, root=root, output=output, settings=settings, progress=progress)


def _add(
    catalog: Catalog,
    previous: Manifest | None,
    *,
    root: str,
    output: str,
    settings: IngestSettings,
    progress: Callable[[str], None],
) -> Manifest:
    """Ingests what is new."""
    by_entry = catalog.keep_old_clips()
    if by_entry:
        progress("ingest  this data set holds out each range by itself, as earlier versions did, and goes on so")
    storage.check_writable(output)
    _probe_all(catalog, by_entry=by_entry, root=root, output=output, settings=settings, progress=progress)
    catalog.reject_duplicates()
    if catalog.num_good:
        continues = previous is not None
        progress(f"ingest  {check_space(catalog.good(), output=output, settings=settings, continues=continues)}")
    _cut_all(catalog, root=root, output=output, settings=settings, progress=progress)

    ledger.write_sorted(output, catalog.rejections(), catalog.losses())
    reasons, manifest = catalog.reasons(), None
    if catalog.clips:
        shown = catalog.clips.batches(order=())
        contact_sheet.write(output, shown, frame_shape=settings.frame_shape, encoding=settings.encoding)
        manifest = write_manifest(
            output,
            catalog.clips,
            settings=settings.content(),
            frame_shape=settings.frame_shape,
            encoding=settings.encoding,
            shards=catalog.files,
            num_rejected=sum(reasons.values()),
        )
        storage.delete_folder(storage.join(output, ingest_tasks.FOLDER))
    if number := catalog.num_losses:
        progress(f"ingest  {number} videos are damaged: clips without damage are kept; see {output}/{ledger.NAME}")
    if reasons:
        progress(f"ingest  rejected {sum(reasons.values())}: {ledger.totals(reasons)}; see {output}/{ledger.NAME}")
    _check_rejected(manifest.counts["videos"] if manifest else 0, reasons, output, settings)
    assert manifest is not None, "without clips, too many videos were rejected"
    if noted := catalog.clips.note_counts():
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


def _probe_all(
    catalog: Catalog,
    *,
    by_entry: bool,
    root: str,
    output: str,
    settings: IngestSettings,
    progress: Callable[[str], None],
) -> None:
    """The first pass: probes all new videos in Ray tasks."""

    def task(plan: ProbeTask) -> list[Probed]:
        return probe_videos(plan, root=root, output=output, settings=settings, decoder=_decoder())

    report = Progress(
        progress,
        "ingest  looked at",
        total=catalog.num_new,
        unit="videos",
        counts=["rejected", "clips"],
        rate="clips",
    )
    groups = in_groups(catalog.new_videos(by_entry=by_entry), ingest_plan.VIDEOS_PER_TASK)
    plans = (ProbeTask(videos) for videos in groups)
    for each in run_tasks(task, plans, plan_type=ProbeTask, returns=Probed, num_cpus=CPUS_OF_WAITING_TASKS):
        report.add(rejected=int(each.rejection is not None), clips=each.num_clips)
        catalog.add_probed(each)


def _cut_all(
    catalog: Catalog, *, root: str, output: str, settings: IngestSettings, progress: Callable[[str], None]
) -> None:
    """The second pass: makes all shards in Ray tasks.

    A long video is decoded in one go after all if one of its parts cannot be decoded alone.
    """

    def make(videos: Callable[[], Iterator[Probed]], *, whole: bool) -> None:
        def plans() -> Iterator[ShardPlan]:
            return plan_shards(videos(), settings, whole=whole)

        _make_shards(catalog, plans, root=root, output=output, settings=settings, progress=progress)

    make(catalog.good, whole=False)
    if again := catalog.forget_unseekable():
        progress(f"ingest  {again} long videos cannot be decoded in parts: each is decoded as a whole")
        make(catalog.unseekable, whole=True)
    catalog.settle(without_clips=CUTS.format(settings.at_cuts))


def _make_shards(
    catalog: Catalog,
    plans: Callable[[], Iterator[ShardPlan]],
    *,
    root: str,
    output: str,
    settings: IngestSettings,
    progress: Callable[[str], None],
) -> None:
    """Makes the planned shards in Ray tasks."""

    def task(plan: ShardPlan) -> list[MadeShard]:
        return [make_shard(plan, root=root, output=output, settings=settings, decoder=_decoder())]

    work, videos, names = 0, 0, set[str]()
    waiting: dict[str, tuple[int, int]] = {}  # work and videos of the shards that are being made

    def amount(plan: ShardPlan) -> tuple[int, int]:  # a video of several shards counts with its first part
        return sum(unit.num_bytes for unit in plan.units), sum(unit.number == 0 for unit in plan.units)

    def planned() -> Iterator[ShardPlan]:
        for plan in plans():
            waiting[plan.name] = amount(plan)
            yield plan

    for plan in plans():
        more = amount(plan)
        work, videos = work + more[0], videos + more[1]
        names.add(plan.name)
    _remove_leftovers(output, names)
    report = Progress(
        progress,
        "ingest  cut",
        total=videos,
        unit="videos",
        counts=["rejected", "clips"],
        rate="clips",
        total_work=work,
    )
    local = storage.local_path(root) is not None and storage.local_path(output) is not None
    num_cpus = CPUS_OF_LONG_TASKS if local else CPUS_OF_WAITING_TASKS
    for made in run_tasks(task, planned(), plan_type=ShardPlan, returns=MadeShard, num_cpus=num_cpus):
        done, begun = waiting.pop(made.name)
        report.add(begun, work=done, reused=made.reused, rejected=len(made.rejected), clips=len(made.rows))
        catalog.add_shard(made)


_of_this_process: list[Decoder] = []


def _decoder() -> Decoder:
    """The decoder of this Ray worker; a worker runs one task at a time."""
    if not _of_this_process:
        _of_this_process.append(Decoder())
    return _of_this_process[0]


def _reasons(output: str) -> Counter[str]:
    """How many videos were rejected for each reason, by the ledger of an earlier run."""
    return Counter(row.reason for row in ledger.rows(output) if isinstance(row, ledger.Rejection))


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


def _remove_leftovers(output: str, names: Set[str]) -> None:
    """Removes half-written shards of a killed run, by their names; only a local file system shows them."""
    folder = storage.local_path(storage.join(output, SHARDS))
    for path in folder.glob(".*.tmp") if folder else ():
        if path.name[1:].partition(".")[0] in names:
            path.unlink(missing_ok=True)


def _check_rejected(num_accepted: int, reasons: Mapping[str, int], output: str, settings: IngestSettings) -> None:
    num_rejected = sum(reasons.values())
    percent = 100 * num_rejected / (num_accepted + num_rejected)
    if num_accepted and percent <= settings.max_rejected_percent:
        return
    todo = f"see {storage.join(output, ledger.NAME)}"
    if num_accepted:
        todo += f"; the clips of the others are kept, and --max-rejected-percent {percent:.0f} would accept this"
    total = num_accepted + num_rejected
    raise ValueError(f"{num_rejected} of {total} videos were rejected ({ledger.totals(reasons)}): {todo}")


def _warn_of_held_out(manifest: Manifest, settings: IngestSettings, progress: Callable[[str], None]) -> None:
    """Warns where an encoder cannot be scored on the held-out videos, unless none are wanted."""
    if settings.held_out_percent and (problem := scoring_problem(manifest)):
        progress(f"warning: an encoder cannot be scored on this data set: {problem}")
