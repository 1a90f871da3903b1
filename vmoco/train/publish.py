"""Registers encoders: of a run, of one of its kept checkpoints, or from a file of weights of another project.

Everything is read, checked and scored in a local folder first, so a failure leaves nothing in the registry.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vmoco import storage, tracking
from vmoco.clip_settings import DataSettings
from vmoco.data.manifest import Manifest
from vmoco.data.mixture import Mixture
from vmoco.data.training_clips import Selection
from vmoco.encoders import foreign, model_page, registry
from vmoco.encoders.encoder import Encoder, Preprocessing
from vmoco.encoders.encoder_program import CARD
from vmoco.encoders.package import NO_LICENCE, SETTINGS, VIDEO_FIELDS, VIDEOS, add_scores, write_folder
from vmoco.encoders.promotion import Score, record
from vmoco.encoders.registry import ARTIFACT_FOLDER, Registered
from vmoco.evaluate.mixture_score import joined_score, score_mixture
from vmoco.evaluate.score import TooFewVideosError
from vmoco.job_settings import RegisterSettings
from vmoco.model.backbone import build_backbone
from vmoco.train import state
from vmoco.train.run_folder import CHECKPOINTS, Checkpoint, checkpoints_from_json, local_copy

_ORIGIN = {
    "torchvision": {
        "description": "Kinetics-400, with its labels, by the authors of torchvision.",
        "licence": "the weights come under torchvision's licence (BSD-3-Clause); the rights to the videos of "
        "Kinetics stay with those who uploaded them",
    },
    "released": {
        "description": "Kinetics-400, without labels, by the authors of VideoMoCo.",
        "licence": "the released code and its weights carry no licence: ask their authors; the rights to the videos "
        "of Kinetics stay with those who uploaded them",
    },
    "other": {"description": "not recorded: ask whoever trained these weights.", "licence": NO_LICENCE},
}


def encoder_in(checkpoint: Path, *, data: Manifest | Mixture) -> Encoder:
    """The query encoder's backbone of a checkpoint, in evaluation mode and without a card.

    Args:
        checkpoint: folder that `TrainState.save` wrote.
        data: data set that it was trained on, or several.

    Raises:
        ValueError: the checkpoint is damaged or not one.
    """
    record, mixture = state.Record.read(checkpoint), Mixture.of(data)
    assert record.manifest_hash == mixture.hash, "an encoder's lineage names the data that it was trained on"
    settings = state.read_settings(checkpoint)
    prefix = "query.backbone."
    tensors = state.read_tensors(checkpoint, record)
    backbone = build_backbone(settings.model.backbone, num_frames=settings.data.num_frames, size=settings.augment.size)
    backbone.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )
    preprocessing = Preprocessing(
        num_frames=settings.data.num_frames,
        fps=mixture.fps / settings.data.stride,
        size=settings.augment.size,
        standardise=settings.augment.standardise,
    )
    return Encoder(backbone, preprocessing, {}).eval()


def write_encoder(
    checkpoint: Path, folder: Path, *, data: Manifest | Mixture, onnx: bool = False, data_licence: str = ""
) -> dict[str, Any]:
    """Writes the backbone of a checkpoint's query encoder as a folder of an encoder.

    Args:
        checkpoint: folder that `TrainState.save` wrote.
        folder: where the files of the encoder go.
        data: data set that it was trained on, or several.
        onnx: also write encoder.onnx.
        data_licence: note on the videos. Default: that of the run's settings.

    Returns:
        The card: what encoder.json says.

    Raises:
        ValueError: the checkpoint is damaged or not one, or ONNX is not installed.
    """
    mixture = Mixture.of(data)
    encoder = encoder_in(checkpoint, data=mixture)
    record, settings = state.Record.read(checkpoint), state.read_settings(checkpoint)
    lineage = {
        "step": record.step,
        "run_id": record.run_id,
        "settings_hash": record.settings_hash,
        "checkpoint_sha256": record.sha256,
        "data": {
            "manifest_hash": record.manifest_hash,
            "uri": mixture.uri,
            "counts": mixture.counts,
            "licence": data_licence or settings.tracking.data_licence or NO_LICENCE,
            **({} if mixture.is_one else {"sets": _sets(mixture)}),
        },
    }
    if began := settings.run.fork or settings.model.init:
        lineage["began_from"] = began
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_bytes((checkpoint / state.STATE_SETTINGS).read_bytes())
    pq.write_table(_videos(mixture, settings.data), folder / VIDEOS, compression="zstd")
    backbone, preprocessing = encoder.backbone, encoder.preprocessing
    return write_folder(folder, backbone, settings.model.backbone, preprocessing, lineage=lineage, onnx=onnx)


def publish(
    folder: Path,
    *,
    run_id: str,
    name: str | None,
    alias: str,
    description: str,
    score: Score | None = None,
    artifact_folder: str = ARTIFACT_FOLDER,
) -> Registered | None:
    """Logs an encoder with its run and, where it has a name, registers it.

    Args:
        folder: what `write_encoder` or `package.write_folder` wrote.
        run_id: MLflow run that trained it, or the run of its import.
        name: registered name; None to log the encoder and not register it.
        alias: alias of the version.
        description: of the version, one line.
        score: of the encoder, for its card and the version.
        artifact_folder: folder among the run's artifacts.

    Raises:
        ValueError: the name or the alias is not allowed.
    """
    if score is not None:
        add_scores(folder, {score.protocol: score.row()})
    plots = registry.attach(folder, run_id=run_id, artifact_folder=artifact_folder)
    if name is None:
        return None
    registered = registry.register(
        run_id, name=name, alias=alias, description=description, artifact_folder=artifact_folder
    )
    record(f"models:/{registered.name}/{registered.version}", [score] if score else [])
    model_page.describe_version(
        name,
        registered.version,
        json.loads((folder / CARD).read_text()),
        summary=description,
        plots=plots,
        artifact_page=tracking.artifact_page(run_id, artifact_folder),
    )
    return registered


def publish_run(
    run: str, options: RegisterSettings, *, step: int | None = None, note: str = "", show: Callable[[str], None] = print
) -> Registered:
    """Registers the encoder of a kept checkpoint of a run, with its score from training.

    Args:
        run: MLflow id or name of the run.
        options: see `RegisterSettings`.
        step: of the checkpoint. Default: the last one.
        note: why it is registered; stands in front of its description.
        show: prints a line.

    Raises:
        ValueError: the run, the checkpoint or its data is missing, or something is damaged.
    """
    registry.check_alias(options.alias)
    found = registry.find_run(run)
    run_id, run_name = found.info.run_id, found.info.run_name
    rows = {row.step: row for row in checkpoints_from_json(registry.read_text(run_id, CHECKPOINTS) or "[]")}
    if not rows:
        raise ValueError(f"run {run_name} has no checkpoint yet, so it has no encoder to register")
    wanted = max(rows) if step is None else step
    if wanted not in rows:
        steps = ", ".join(map(str, sorted(rows)))
        raise ValueError(f"run {run_name} has no checkpoint of step {wanted}: it has kept those of step {steps}")
    try:
        return _publish_kept(rows[wanted], run_id, f"{note}run {run_name}", options, show)
    except state.DamagedCheckpointError as error:
        others = ", ".join(str(at) for at in sorted(rows) if at != wanted) or "no other step"
        raise ValueError(
            f"{error}, although the run lists it: restore it, or give another --step; the run has also kept {others}"
        ) from None


def _publish_kept(
    kept: Checkpoint, run_id: str, what: str, options: RegisterSettings, show: Callable[[str], None]
) -> Registered:
    score = None
    with local_copy(kept.uri) as checkpoint, tempfile.TemporaryDirectory() as place:
        if state.Record.read(checkpoint).sha256 != kept.sha256:
            raise ValueError(
                f"checkpoint {kept.uri} is not the one that the run tracked: its SHA-256 is another. Restore it from a "
                "backup, or register another step"
            )
        mixture, folder = _data_of(checkpoint), Path(place)
        write_encoder(checkpoint, folder, data=mixture, onnx=options.onnx, data_licence=options.data_licence)
        if options.score and (score := kept.score or _score(checkpoint, mixture, show)) is not None:
            show(str(score))
        registered = publish(
            folder,
            run_id=run_id,
            name=options.name,
            alias=options.alias,
            description=f"{what}, step {kept.step}, data {mixture.hash}",
            score=score,
            artifact_folder=f"{ARTIFACT_FOLDER}-{kept.step:08d}",
        )
    assert registered is not None, "it has a name"
    return registered


def publish_file(path: Path, options: RegisterSettings, *, show: Callable[[str], None] = print) -> Registered:
    """Registers weights of another project; their keys tell of which, as in `foreign.read`.

    Args:
        path: local file, as downloaded.
        options: see `RegisterSettings`.
        show: prints a line.

    Raises:
        ValueError: it cannot be read as weights, or they are of an unknown network.
    """
    registry.check_alias(options.alias)
    kind, encoder, found = foreign.read(path)
    if found:
        show(found)
    name = encoder.card["backbone"]
    sha256 = storage.file_sha256(str(path))
    run_id = tracking.create_import(f"{kind}-{name}-{sha256[:8]}", tags={"vmoco.imported_sha256": sha256})
    data = dict(_ORIGIN[kind]) | ({"licence": options.data_licence} if options.data_licence else {})
    lineage = {
        "step": None,
        "run_id": run_id,
        "imported": {"file": path.name, "format": kind, "sha256": sha256, **({"found": found} if found else {})},
        "data": {"manifest_hash": None, "uri": None, "counts": None, **data},
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folder(folder, encoder.backbone, name, encoder.preprocessing, lineage=lineage, onnx=options.onnx)
        registered = publish(
            folder,
            run_id=run_id,
            name=options.name,
            alias=options.alias,
            description=f"{kind} weights of {path.name}",
        )
    assert registered is not None, "it has a name"
    return registered


def _data_of(checkpoint: Path) -> Mixture:
    """The data sets that a checkpoint was trained on, unchanged since.

    Raises:
        ValueError: it has changed.
    """
    wanted = state.Record.read(checkpoint).manifest_hash
    mixture = Mixture.load(state.read_settings(checkpoint).data)
    if mixture.hash != wanted:
        raise ValueError(
            f"data set {mixture.uri} is {mixture.hash} now, the run was trained on {wanted}: videos were added or "
            "removed since, so nobody can say what the encoder saw. Restore the data set as it was"
        )
    return mixture


def _score(checkpoint: Path, mixture: Mixture, show: Callable[[str], None]) -> Score | None:
    """The label-free score, on the clips of the run's own evaluation; None where there are too few videos for it."""
    max_videos = state.read_settings(checkpoint).evaluation.max_videos
    try:
        return joined_score(score_mixture(encoder_in(checkpoint, data=mixture), mixture, max_videos=max_videos))
    except TooFewVideosError as error:
        show(f"the encoder is not scored: {error}")
        return None


def _sets(mixture: Mixture) -> list[dict[str, Any]]:
    """What the card says of each of several data sets."""
    rows = zip(mixture.names, mixture.weights, mixture.manifests, strict=True)
    return [
        {"name": name, "weight": round(weight, 6), "manifest_hash": each.hash, "uri": each.uri, "counts": each.counts}
        for name, weight, each in rows
    ]


def _videos(mixture: Mixture, data: DataSettings) -> pa.Table:
    """The videos that training took, and those that were held out; not those of which all clips were left out.

    A name that one data set holds out and another trains on counts as trained on.
    """
    tables = []
    for manifest in mixture.manifests:
        selection = Selection(manifest, data, mixture.others(manifest))
        for piece in manifest.batches(list(dict.fromkeys([*VIDEO_FIELDS.names, *selection.columns, "clip_id"]))):
            named = piece.filter(pc.or_(pa.array(selection.keep(piece)), piece["held_out"])).select(VIDEO_FIELDS.names)
            tables.append(named.group_by(VIDEO_FIELDS.names).aggregate([]))
        selection.check()
    table = pa.concat_tables(tables)
    grouped = table.group_by("video_id").aggregate([("held_out", "min")]).sort_by("video_id")
    return grouped.rename_columns({"held_out_min": "held_out"}).select(VIDEO_FIELDS.names).cast(VIDEO_FIELDS)
