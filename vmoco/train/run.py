"""A pretraining run before any worker starts: checked, and tied to its folder and its MLflow run.

The run's folder (storage/name) belongs to this run alone: `run.json` ties it to its settings and its MLflow run, so
submitting the same name again resumes, and another run can never continue somebody else's checkpoints.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch

from vmoco import storage, tracking
from vmoco.config import PretrainSettings
from vmoco.data.loader import check_fits
from vmoco.data.manifest import Manifest
from vmoco.encoders import package
from vmoco.model.queue import decay_at, oldest_key_weight
from vmoco.train import metrics
from vmoco.train.fork import check_fork
from vmoco.train.state import differences

RECORD = "run.json"
INIT = "init.safetensors"
"""Backbone that the run starts from, in the run's folder: a copy, because an alias may move."""


@dataclass(frozen=True)
class PreparedRun:
    """A run that has been checked and not begun."""

    settings: PretrainSettings
    """With name, storage and data URI resolved."""
    manifest: Manifest
    folder: str
    """URI of the run's folder."""
    finished: str | None
    """Where its encoder is, if this run has already ended well: a URI of MLflow, or of a trial's last checkpoint."""


@dataclass(frozen=True)
class Run(PreparedRun):
    """A run that is tied to its folder and its MLflow run."""

    run_id: str
    is_new: bool
    warning: str = ""
    """What is wrong with the tracker, where the run goes on all the same."""


def prepare(settings: PretrainSettings) -> PreparedRun:
    """Checks all that can be checked without Ray, and begins nothing.

    Raises:
        ValueError: data or storage cannot be used, or the name belongs to a run with other settings.
    """
    if not settings.data.uri:
        raise ValueError("data.uri is missing: give --data.uri the data set that jobs/ingest.py made")
    storage.require_absolute(settings.data.uri, "data.uri")
    place = settings.run.storage or storage.join(storage.home(), "runs")
    storage.require_absolute(place, "run.storage")
    now = datetime.datetime.now(tz=datetime.UTC)
    name = settings.run.name or f"{settings.preset}-{now:%Y%m%d-%H%M%S}"
    if "/" in name or name.startswith("."):
        raise ValueError(f"run.name {name!r} is not allowed: it names a folder, so no slash and no dot in front")
    begin = storage.absolute_uri(settings.run.fork) if settings.run.fork else None
    resolved = settings.model_copy(
        update={
            "run": settings.run.model_copy(
                update={"name": name, "storage": storage.absolute_uri(place), "fork": begin}
            ),
            "data": settings.data.model_copy(update={"uri": storage.absolute_uri(settings.data.uri)}),
        }
    )
    manifest = Manifest.load(resolved.data.uri)
    check_fits(manifest, resolved)
    folder = storage.join(storage.absolute_uri(place), name)
    storage.check_writable(folder)
    record = _read_record(folder)
    if resolved.run.fork and not record:
        check_fork(resolved, manifest.hash)
    if record:
        before = PretrainSettings.model_validate(record["settings"])
        if changed := differences(before, resolved):
            raise ValueError(
                f"run.name {name!r} belongs to a run with other settings ({changed}): set them as they were to resume "
                "it, or give another run.name"
            )
        if record["manifest_hash"] != manifest.hash:
            raise ValueError(
                f"run.name {name!r} belongs to a run on data set {record['manifest_hash']}, {manifest.uri} is "
                f"{manifest.hash}: give data.uri as it was to resume it, or another run.name"
            )
    # A run that ended where it was told to goes on when it is told to end later.
    ended = record is not None and record.get("finished_step", resolved.train.steps) >= resolved.last_step
    return PreparedRun(resolved, manifest, folder, record["finished"] if record and ended else None)


def open_run(prepared: PreparedRun, *, parent_run: str | None = None) -> Run:
    """Ties the run to an MLflow run: a new one, or the one that it had before it stopped.

    Args:
        prepared: what `prepare` returned.
        parent_run: MLflow run of the sweep that this run is a trial of.

    Raises:
        ValueError: the tracker cannot be used.
    """
    if record := _read_record(prepared.folder):
        problem = tracking.resume_run(record["run_id"])
        return Run(**vars(prepared), run_id=record["run_id"], is_new=False, warning=problem)
    settings, manifest = prepared.settings, prepared.manifest
    assert settings.run.name is not None, "resolved"
    tags = {"folder": prepared.folder, "manifest_hash": manifest.hash, "preset": settings.preset}
    if settings.model.init:
        tags |= {"init": settings.model.init, "init_sha256": _copy_encoder(settings, prepared.folder)}
    run_id = tracking.create_run(
        settings, tags={f"vmoco.{key}": value for key, value in tags.items()}, note=metrics.NOTE, parent_run=parent_run
    )
    record = {
        "run_id": run_id,
        "manifest_hash": manifest.hash,
        "settings": settings.model_dump(mode="json"),
        "finished": None,
    }
    _write_record(prepared.folder, record)
    return Run(**vars(prepared), run_id=run_id, is_new=True)


def run_id_of(prepared: PreparedRun) -> str | None:
    """The MLflow run of a run; None where it has not begun."""
    record = _read_record(prepared.folder)
    return record["run_id"] if record else None


def _copy_encoder(settings: PretrainSettings, folder: str) -> str:
    """Copies the backbone to start from into the run's folder; returns the SHA-256 of its weights.

    Raises:
        ValueError: there is none, it is damaged, or of another backbone.
    """
    assert settings.model.init is not None, "asked before"
    encoder = package.load_encoder(settings.model.init)
    if encoder.card["backbone"] != settings.model.backbone:
        raise ValueError(
            f"--init {settings.model.init} is a {encoder.card['backbone']}, model.backbone is "
            f"{settings.model.backbone}: set the backbone to that of the encoder"
        )
    content = safetensors.torch.save(encoder.backbone.state_dict())
    storage.write_atomic(storage.join(folder, INIT), content)
    return hashlib.sha256(content).hexdigest()


def close_run(run: Run, encoder: str) -> None:
    """Notes that a run has ended well, and where its encoder is: submitted again, it has nothing left to do."""
    record = _read_record(run.folder)
    assert record is not None, "opened before"
    _write_record(run.folder, record | {"finished": encoder, "finished_step": run.settings.last_step})


def _write_record(folder: str, record: dict[str, Any]) -> None:
    storage.write_atomic(storage.join(folder, RECORD), json.dumps(record, indent=1).encode())


def _read_record(folder: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, RECORD)))
    except FileNotFoundError:
        return None
    return record


def introduce(run: Run) -> list[str]:
    """What a person wants to read before the first step."""
    settings, counts = run.settings, run.manifest.counts
    moco, train = settings.moco, settings.train
    epoch = (counts["videos"] - counts["held_out"]) * settings.data.draws_per_video
    lines = [
        f"run {settings.run.name}: {'new' if run.is_new else 'resumed'}, folder {run.folder}",
        f"tracked as {run.run_id} in {tracking.tracking_uri()}",
        f"data {run.manifest.uri}: {counts['clips']} clips of {counts['videos']} videos, {counts['held_out']} videos "
        f"held out, hash {run.manifest.hash}",
        f"{settings.last_step} steps of {train.global_batch} clips, "
        f"{settings.last_step * train.global_batch / epoch:.1f} epochs; "
        f"the generator drops {settings.num_dropped} of {settings.data.num_frames} frames from step "
        f"{settings.generator_start}; the oldest of {moco.queue_size} keys weighs {_oldest_key(settings)}",
    ]
    if settings.model.init:
        lines.append(f"starts from the encoder {settings.model.init}")
    if settings.run.fork:
        lines.append(f"begins from the training state {settings.run.fork}")
    if run.warning:
        lines.append(f"warning: {run.warning}")
    if settings.num_micro_batches == 1:
        lines.append(
            "warning: train.micro-batch is the whole train.global-batch, so a key is normalised beside the very clips "
            "of its query, which lets the encoder cheat (MoCo, section 3.3): lower train.micro-batch"
        )
    if moco.queue_size > epoch:
        lines.append(
            f"warning: the queue holds {moco.queue_size / epoch:.1f} epochs, so each video several times over; keys of "
            "the query's own video never count, but a queue below an epoch is cheaper"
        )
    return lines


def _oldest_key(settings: PretrainSettings) -> str:
    """What the oldest key of a full queue weighs at the first and at the last step."""
    moco, train = settings.moco, settings.train
    first, last = (
        oldest_key_weight(
            decay_at(step, moco, total_steps=train.steps, difference=0.0),
            queue_size=moco.queue_size,
            global_batch=train.global_batch,
            age_unit=moco.age_unit,
        )
        for step in (0, train.steps - 1)
    )
    if moco.decay_schedule == "adversarial":
        return f"{first:.3f} at first, and less the more the generator's choice changes the embeddings"
    return f"{first:.3f}" if moco.decay_schedule == "constant" else f"{first:.3f} at first and {last:.3f} at the end"
