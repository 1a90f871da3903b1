"""Videos -> data set: plans the shards, lets Ray Data make one per task, and writes the ledger and the manifest.

Everything is planned before it is scheduled: which videos go into which shard, and the shard's name, follow from the
list of new videos and the settings alone. So shards are the same bytes whatever the parallelism, a shard left by a
killed run is found again by its name, and adding videos touches no old shard. The manifest, written last, makes it a
data set.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from vmoco import storage
from vmoco.data import ledger, source
from vmoco.data.ingest_settings import IngestSettings
from vmoco.data.ledger import Rejection
from vmoco.data.manifest import FIELDS, NAME, SHARDS, Manifest, write_manifest
from vmoco.data.shard import ShardFile
from vmoco.data.shard_task import ShardPlan, frame_shape, make_shard, plan_shards


def ingest(settings: IngestSettings, progress: Callable[[str], None] = print) -> Manifest:
    """Makes or continues the data set `settings.output`; needs an initialised Ray.

    A video that was accounted for by an earlier run is left alone while it keeps its size; one whose size changed
    replaces its clips. Videos that are gone from the folder stay in the data set.

    Args:
        settings: What to do.
        progress: Takes the progress lines.

    Raises:
        ValueError: no videos, no permission, other settings than those of the data set, or too many rejected.
    """
    videos = storage.require_absolute(settings.videos, "--videos")
    output = storage.require_absolute(settings.output, "--output")
    listing = source.list_videos(videos)
    previous = _previous(output, settings)
    # Rows of shards that no manifest names are from a run that was killed between ledger and manifest.
    old_ledger = [row for row in ledger.read(output) if row.shard in previous.shards] if previous else []
    known = _known_sizes(previous, old_ledger)
    new = [found for found in listing.videos if known.get(found.video_id) != found.num_bytes]
    plans = plan_shards(new, content=settings.content(), videos_per_shard=settings.videos_per_shard)
    if listing.num_hidden:
        progress(f"ingest  {listing.num_hidden} hidden videos are left out")
    if previous and not plans:
        progress(f"ingest  nothing new: all {len(listing.videos)} videos are accounted for in {output}")
        _check_rejected(previous.counts["videos"], ledger.read(output), output, settings)
        return previous
    storage.check_writable(output)
    _remove_leftovers(output, plans)

    report = _Progress(progress, num_videos=len(new), num_changed=sum(found.video_id in known for found in new))
    rows, rejected, files = [], [], dict(previous.shards) if previous else {}
    for made in _run(plans, videos=videos, output=output, settings=settings):
        rows += made["rows"]
        files[made["shard"]] = ShardFile(**made["file"])
        rejected += [Rejection(**{**row, "shard": made["shard"]}) for row in made["rejected"]]
        report.add(made)
    report.finish()

    replaced = {found.video_id for found in new}
    table = pa.Table.from_pylist(rows, schema=pa.schema(FIELDS))
    if previous:
        kept = [row["video_id"] not in replaced for row in previous.table.select(["video_id"]).to_pylist()]
        table = pa.concat_tables([previous.table.filter(pa.array(kept, pa.bool_())), table])
    whole_ledger = [row for row in old_ledger if row.video_id not in replaced] + rejected + list(listing.rejected)
    ledger.write(output, whole_ledger)
    if table.num_rows:
        manifest = write_manifest(
            output,
            table,
            settings=settings.content(),
            frame_shape=frame_shape(settings),
            encoding=settings.encoding,
            shards=files,
            num_rejected=len(whole_ledger),
        )
    _check_rejected(manifest.counts["videos"] if table.num_rows else 0, whole_ledger, output, settings)
    return manifest


def _run(plans: list[ShardPlan], *, videos: str, output: str, settings: IngestSettings) -> Iterator[dict[str, Any]]:
    """Makes the shards in Ray tasks, one per shard, and yields them in the order in which they are done."""
    import ray.data

    def task(item: dict[str, Any]) -> dict[str, Any]:
        # Rows travel as JSON: Ray would turn them into its own column types. An error travels as a value, because an
        # exception in a task would end the job with Ray's stack trace around it.
        plan = ShardPlan(item["name"], tuple(source.Found(**found) for found in json.loads(item["videos"])))
        try:
            return {"made": json.dumps(make_shard(plan, videos=videos, output=output, settings=settings)), "error": ""}
        except ValueError as error:
            return {"made": "", "error": str(error)}

    items = [
        {"name": plan.name, "videos": json.dumps([dataclasses.asdict(found) for found in plan.videos])}
        for plan in plans
    ]
    if not items:
        return
    context = ray.data.DataContext.get_current()
    log = logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that bars are off
    try:
        # One block per shard is one task per shard; blocks come back as they are done.
        shards = ray.data.from_items(items, override_num_blocks=len(items)).map(task, num_cpus=1)
        for row in shards.iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            yield json.loads(row["made"])
    finally:
        context.enable_progress_bars = bars
        log.setLevel(level)


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


def _known_sizes(previous: Manifest | None, old_ledger: list[Rejection]) -> dict[str, int]:
    """Size of every video that is accounted for; a transient rejection is no account."""
    if previous is None:
        return {}
    columns = previous.table.select(["video_id", "video_bytes"]).to_pydict()
    known = dict(zip(columns["video_id"], columns["video_bytes"], strict=True))
    return known | {row.video_id: row.num_bytes for row in old_ledger if not row.transient}


def _check_rejected(num_accepted: int, rejected: list[Rejection], output: str, settings: IngestSettings) -> None:
    total = num_accepted + len(rejected)
    percent = 100 * len(rejected) / total
    if num_accepted and percent <= settings.max_rejected_percent:
        return
    reason, count = ledger.most_common_reason(rejected)
    what = f"{len(rejected)} of {total} videos were rejected, {count} of them as {reason}: "
    todo = f"see {storage.join(output, ledger.NAME)}"
    if num_accepted:
        todo += f"; the clips of the others are kept, and --max-rejected-percent {percent:.0f} would accept this"
    raise ValueError(what + todo)


class _Progress:
    """Prints how far it is, at most once a second, and once at the end."""

    def __init__(self, progress: Callable[[str], None], *, num_videos: int, num_changed: int) -> None:
        self._print = progress
        self._total = num_videos
        self._videos = self._clips = self._rejected = 0
        self._fresh_videos = self._fresh_clips = 0  # made now: what the rate counts
        self._start = self._printed = time.monotonic()
        if num_changed:
            progress(f"ingest  {num_changed} videos changed since they were ingested: their clips are replaced")

    def add(self, made: dict[str, Any]) -> None:
        self._videos += made["num_videos"]
        self._clips += len(made["rows"])
        self._rejected += len(made["rejected"])
        if not made["reused"]:
            self._fresh_videos += made["num_videos"]
            self._fresh_clips += len(made["rows"])
        if time.monotonic() - self._printed >= 1 and self._videos < self._total:
            self.finish()

    def finish(self) -> None:
        self._printed = time.monotonic()
        elapsed = max(self._printed - self._start, 1e-9)
        left = elapsed / self._fresh_videos * (self._total - self._videos) if self._fresh_videos else 0.0
        self._print(
            f"ingest  videos {self._videos}/{self._total}  rejected {self._rejected}  clips {self._clips}  "
            f"{self._fresh_clips / elapsed:.1f} clips/s  {int(left) // 60}:{int(left) % 60:02d} left"
        )
