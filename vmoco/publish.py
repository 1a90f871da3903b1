"""From a run, one of its kept checkpoints, or a file of somebody else's weights to a registered encoder.

Everything is read, checked and scored in a folder of this machine first: what fails leaves nothing in the registry.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from vmoco import foreign, registry, storage, tracking
from vmoco.data.manifest import Manifest
from vmoco.evaluate.score import TooFewVideosError, score_encoder
from vmoco.export import add_scores, read_encoder, write_encoder, write_folder
from vmoco.promotion import Score, label_free_score, record
from vmoco.publish_options import Options
from vmoco.registry import Registered
from vmoco.train import state

CHECKPOINTS = "checkpoints.json"  # `train.checkpoints` lists a run's kept checkpoints under this name

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
}


def publish_run(
    run: str, options: Options, *, step: int | None = None, note: str = "", show: Callable[[str], None] = print
) -> Registered:
    """Registers the encoder of one of a run's kept checkpoints.

    Args:
        run: MLflow id or name of the run.
        options: see `Options`.
        step: of the checkpoint; the last one when left out.
        note: why it is registered, as a sentence in front of its description.
        show: takes a line for a person.

    Raises:
        ValueError: the run, the checkpoint or its data is not there, or something is damaged.
    """
    registry.check_alias(options.alias)
    found = registry.find_run(run)
    run_id, run_name = found.info.run_id, found.info.run_name
    kept = json.loads(registry.read_text(run_id, CHECKPOINTS) or "[]")
    if not kept:
        raise ValueError(f"run {run_name} has kept no checkpoint yet, so it has no encoder to register")
    rows = {row["step"]: row for row in kept}
    wanted = max(rows) if step is None else step
    if wanted not in rows:
        steps = ", ".join(map(str, sorted(rows)))
        raise ValueError(f"run {run_name} has no checkpoint of step {wanted}: it has kept those of step {steps}")
    with tempfile.TemporaryDirectory() as place:
        checkpoint, folder = Path(place, "checkpoint"), Path(place, "encoder")
        _copy(rows[wanted]["uri"], checkpoint)
        if state.Record.read(checkpoint).sha256 != rows[wanted]["sha256"]:
            raise ValueError(f"checkpoint {rows[wanted]['uri']} is not the one that was tracked: it was changed since")
        manifest = _manifest(checkpoint)
        write_encoder(checkpoint, folder, manifest=manifest, onnx=options.onnx, data_licence=options.data_licence)
        scores = _scores(folder, manifest, show) if options.score else []
        description = f"{note}run {run_name}, step {wanted}, data {manifest.hash}"
        return _register(folder, run_id, options, scores, artifact_folder=f"encoder-{wanted:08d}", text=description)


def publish_file(path: Path, options: Options) -> Registered:
    """Registers weights of torchvision, or of the released VideoMoCo code; whose they are is told by their keys.

    Args:
        path: local file, as it was downloaded.
        options: see `Options`.

    Raises:
        ValueError: it cannot be read as weights, or they are of no network that is known.
    """
    registry.check_alias(options.alias)
    kind, encoder = foreign.read(path)
    name = encoder.card["backbone"]
    sha256 = state.file_sha256(path)
    run_id = tracking.create_import(f"{kind}-{name}-{sha256[:8]}", tags={"vmoco.imported_sha256": sha256})
    data = dict(_ORIGIN[kind]) | ({"licence": options.data_licence} if options.data_licence else {})
    lineage = {
        "step": None,
        "run_id": run_id,
        "imported": {"file": path.name, "format": kind, "sha256": sha256},
        "data": {"manifest_hash": None, "uri": None, "counts": None, **data},
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folder(folder, encoder.backbone, name, encoder.preprocessing, lineage=lineage, onnx=options.onnx)
        return _register(folder, run_id, options, [], text=f"{kind} weights of {path.name}")


def _register(
    folder: Path,
    run_id: str,
    options: Options,
    scores: list[Score],
    *,
    text: str,
    artifact_folder: str = registry.ARTIFACT_FOLDER,
) -> Registered:
    registry.attach(folder, run_id=run_id, artifact_folder=artifact_folder)
    registered = registry.register(
        run_id, name=options.name, alias=options.alias, description=text, artifact_folder=artifact_folder
    )
    record(f"models:/{registered.name}/{registered.version}", scores)
    return registered


def _copy(uri: str, folder: Path) -> None:
    """Copies the files of a checkpoint to this machine."""
    folder.mkdir()
    for name in (state.RECORD, state.SETTINGS, state.TENSORS):
        try:
            content = storage.read_bytes(storage.join(uri, name))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"checkpoint {uri} is gone: it has no {name}, though the run tracked it") from None
        (folder / name).write_bytes(content)


def _manifest(checkpoint: Path) -> Manifest:
    """The data set that a checkpoint was trained on, as it was then."""
    wanted, uri = state.Record.read(checkpoint).manifest_hash, state.read_settings(checkpoint).data.uri
    manifest = Manifest.load(uri)
    if manifest.hash != wanted:
        raise ValueError(
            f"data set {uri} is {manifest.hash} now, the run was trained on {wanted}: videos were added or removed "
            "since, so it cannot be said what the encoder saw. Put the data set back as it was"
        )
    return manifest


def _scores(folder: Path, manifest: Manifest, show: Callable[[str], None]) -> list[Score]:
    """The label-free score, noted in the card; none, and the reason said, where the data set has too little for it."""
    try:
        found = score_encoder(read_encoder(folder, str(folder)), manifest)
    except TooFewVideosError as error:
        show(f"not scored: {error}")
        return []
    show(str(found))
    score = label_free_score(found)
    add_scores(folder, {score.protocol: score.row()})
    return [score]
