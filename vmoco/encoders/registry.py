"""Encoders by name in MLflow's model registry; one of the few files that know MLflow.

A version's artifacts are what `export.py` wrote, with what MLflow needs to load them by itself and a model card. The
SHA-256 of the encoder's card is kept in the tracker's database, not beside the files: whoever can change the files of
an encoder cannot change that record with them.


Which encoders saw a video: for takedowns, and for whoever asks.

Every registered version carries the names of its videos; versions that were trained on one data set share a list,
which is fetched once.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vmoco import tracking
from vmoco.encoders import encoder_program, model_card
from vmoco.encoders.encoder_program import CARD, SHA256_TAG
from vmoco.encoders.package import VIDEOS, read_card
from vmoco.storage import file_sha256

ARTIFACT_FOLDER = "encoder"
CANDIDATE, CHAMPION = "candidate", "champion"
_METRICS = ("loss", "accuracy", "retrieval", "effective_rank", "embedding_std", "generator_loss")
"""Of a run, those that its model card shows, where they were tracked."""


@dataclass(frozen=True)
class Registered:
    """A version of a registered encoder."""

    name: str
    version: str
    alias: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{self.alias}"


def attach(folder: Path, *, run_id: str, artifact_folder: str = ARTIFACT_FOLDER) -> None:
    """Completes an exported encoder with a model card and what MLflow needs, and logs it with its run.

    Args:
        folder: what `export.write_encoder` wrote.
        run_id: MLflow run that trained it, or that stands for its import.
        artifact_folder: where it goes among the run's artifacts.
    """
    tracker = tracking.client()
    card = json.loads((folder / CARD).read_text())
    tracked = tracker.get_run(run_id).data.metrics
    histories = {
        name: [(point.step, point.value) for point in tracker.get_metric_history(run_id, name)]
        for name in _METRICS
        if name in tracked
    }
    model_card.write(folder, card, histories=histories)
    _write_mlmodel(folder, card)
    tracker.log_artifacts(run_id, str(folder), artifact_folder)
    tracker.set_tag(run_id, f"{SHA256_TAG}.{artifact_folder}", file_sha256(str(folder / CARD)))


def register(
    run_id: str, *, name: str, alias: str, description: str = "", artifact_folder: str = ARTIFACT_FOLDER
) -> Registered:
    """Registers an encoder that was attached to a run as a new version of `name`: the candidate.

    Args:
        run_id: MLflow run that `attach` logged an encoder with.
        name: registered name.
        alias: a further name of this version, if not "candidate".
        description: one line for a person.
        artifact_folder: as for `attach`.

    Raises:
        ValueError: the alias is "champion", which only `promotion.promote` gives, or the name is not allowed.
    """
    from mlflow.exceptions import MlflowException

    check_alias(alias)
    tracker = tracking.client()
    try:
        tracker.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise ValueError(f"an encoder cannot be registered as {name!r}: {error}") from error
    run = tracker.get_run(run_id)
    source = f"{run.info.artifact_uri}/{artifact_folder}"
    tags = {SHA256_TAG: run.data.tags[f"{SHA256_TAG}.{artifact_folder}"]}
    version = tracker.create_model_version(name, source, run_id=run_id, description=description, tags=tags)
    for given in {CANDIDATE, alias}:
        tracker.set_registered_model_alias(name, given, version.version)
    return Registered(name, str(version.version), alias)


def check_alias(alias: str) -> None:
    """Refuses the alias that has to be earned.

    Raises:
        ValueError: it is "champion".
    """
    if alias == CHAMPION:
        raise ValueError(
            f"alias {CHAMPION!r} is not given at registration, because it moves only to an encoder that scores better: "
            "register it, and then run jobs/registry.py promote NAME"
        )


def fetch(uri: str, folder: Path, *, names: Sequence[str]) -> str | None:
    """Copies files of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/ID/FOLDER` into a folder.

    Args:
        uri: which encoder.
        folder: receives the files.
        names: files of the encoder; those that it has not are left out.

    Returns:
        The SHA-256 of its card, as it was recorded when the encoder was registered or attached.

    Raises:
        ValueError: there is no such name, alias or version; what there is, is listed.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    tracker = tracking.client()
    try:
        if uri.startswith("models:/"):
            version = find_version(uri)
            source = tracker.get_model_version_download_uri(version.name, version.version)
            record = version.tags.get(SHA256_TAG)
        else:
            run_id, _, artifact_folder = uri.removeprefix("runs:/").partition("/")
            run = tracker.get_run(run_id)
            source = f"{run.info.artifact_uri}/{artifact_folder}"
            record = run.data.tags.get(f"{SHA256_TAG}.{artifact_folder}")
        if record is None:
            raise ValueError(f"{uri} has no record of its hash: it was not registered by vmoco, so it is not read")
        for name in names:
            got = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{source}/{name}", tracking_uri=tracking.tracking_uri()
            )
            shutil.copy(got, folder / name)
    except (MlflowException, OSError) as error:
        raise ValueError(f"{uri} cannot be fetched from {tracking.tracking_uri()}: {error}") from error
    return str(record)


def find_version(uri: str) -> Any:
    """MLflow's entry of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        ValueError: there is none; what there is, is listed.
    """
    from mlflow.exceptions import MlflowException

    tracker = tracking.client()
    name, _, alias = uri.removeprefix("models:/").partition("@")
    name, _, number = name.partition("/")
    try:
        return tracker.get_model_version_by_alias(name, alias) if alias else tracker.get_model_version(name, number)
    except MlflowException:
        known = [f"{model.name} ({', '.join(sorted(model.aliases)) or 'no alias'})" for model in _models(tracker)]
        raise ValueError(
            f"{uri} is not registered in {tracking.tracking_uri()}: "
            + (f"there are {'; '.join(known)}" if known else "nothing is registered there yet")
            + ". Write models:/NAME@ALIAS or models:/NAME/VERSION"
        ) from None


def find_model(name: str) -> Any:
    """MLflow's entry of a registered name.

    Raises:
        ValueError: there is none; what there is, is listed.
    """
    from mlflow.exceptions import MlflowException

    tracker = tracking.client()
    try:
        return tracker.get_registered_model(name)
    except MlflowException:
        known = ", ".join(sorted(model.name for model in _models(tracker))) or "nothing yet"
        raise ValueError(f"nothing is registered as {name!r} in {tracking.tracking_uri()}: there is {known}") from None


def find_run(run: str) -> Any:
    """MLflow's entry of a run, by its id or by its name (of several, the newest).

    Raises:
        ValueError: there is none; the newest that there are, are listed.
    """
    from mlflow.exceptions import MlflowException

    tracker = tracking.client()
    try:
        return tracker.get_run(run)
    except MlflowException:
        experiments = [experiment.experiment_id for experiment in tracker.search_experiments()]
        quoted = run.replace("'", "")
        named = tracker.search_runs(
            experiments, f"attributes.run_name = '{quoted}'", max_results=1, order_by=["attributes.start_time DESC"]
        )
        if named:
            return named[0]
        newest = tracker.search_runs(experiments, max_results=10, order_by=["attributes.start_time DESC"])
        known = ", ".join(found.info.run_name for found in newest) or "none yet"
        raise ValueError(f"run {run!r} is not in {tracking.tracking_uri()}; the newest there are {known}") from None


def read_text(run_id: str, name: str) -> str | None:
    """A text among the artifacts of a run, or None where it has none of that name."""
    from mlflow.exceptions import MlflowException

    try:
        with tempfile.TemporaryDirectory() as folder:
            return Path(tracking.client().download_artifacts(run_id, name, folder)).read_text()
    except (MlflowException, OSError):
        return None


def versions(name: str | None = None) -> list[Any]:
    """MLflow's entries of all versions, of one name or of all, the newest of a name first; with their aliases."""
    tracker = tracking.client()
    names = [name] if name else [model.name for model in _models(tracker)]
    found = []
    for each in names:
        listed = tracker.search_model_versions(f"name = '{each}'", max_results=1000)
        # The search leaves tags and aliases of some stores out; the version itself has them.
        found += [tracker.get_model_version(each, version.version) for version in listed]
    return sorted(found, key=lambda version: (version.name, -int(version.version)))


def _models(tracker: Any) -> list[Any]:
    # The search leaves aliases out; the model itself has them.
    return [tracker.get_registered_model(model.name) for model in tracker.search_registered_models(max_results=100)]


def _write_mlmodel(folder: Path, card: dict[str, Any]) -> None:
    """Adds MLmodel, its requirements and the loader, so that `mlflow.pyfunc.load_model` takes the folder."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = (-1, card["preprocessing"]["num_frames"], -1, -1, 3)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), shape)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, card["feature_dim"]))]),
    )
    loader = Path(encoder_program.__file__)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():  # MLflow wants a folder of its own
        warnings.filterwarnings("ignore", ".*input example")  # clips of noise would say no more than the signature
        mlflow.pyfunc.save_model(
            str(Path(place, "model")),
            loader_module=loader.stem,
            code_paths=[str(loader)],
            signature=signature,
            # An archive is read by the torch that wrote it and by later ones.
            pip_requirements=[f"torch>={card['versions']['torch'].partition('+')[0]}", "numpy", "pandas"],
        )
        shutil.copytree(Path(place, "model"), folder, dirs_exist_ok=True)


@dataclass(frozen=True)
class Sighting:
    """A registered encoder that has to do with a video."""

    uri: str
    """models:/NAME/VERSION."""
    aliases: tuple[str, ...]
    held_out: bool
    """Whether the video was held out: then no weight depends on it, only scores."""
    manifest_hash: str


@dataclass(frozen=True)
class Lineage:
    """The answer for one video."""

    sightings: tuple[Sighting, ...]
    unknown: tuple[str, ...]
    """Versions whose videos are not known, such as imported weights."""


def encoders_that_saw(video_id: str) -> Lineage:
    """Looks a video up in the lineage of all registered versions.

    Args:
        video_id: as the manifest of the data set names it.

    Raises:
        ValueError: an encoder's files are damaged.
    """
    sightings, unknown = [], []
    found_in: dict[str, tuple[bool, bool]] = {}  # by the hash of the list: whether it is in it, and held out
    for version in versions():
        uri = f"models:/{version.name}/{version.version}"
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            sha256 = fetch(uri, folder, names=(CARD,))
            card = json.loads(read_card(folder, uri, sha256=sha256))
            listed = card["files"].get(VIDEOS)
            if listed is None:
                unknown.append(uri)
                continue
            if listed not in found_in:
                fetch(uri, folder, names=(VIDEOS,))
                found_in[listed] = _look_up(folder / VIDEOS, video_id, sha256=listed, uri=uri)
        seen, held_out = found_in[listed]
        if seen:
            aliases = tuple(sorted(version.aliases))
            sightings.append(Sighting(uri, aliases, held_out, card["data"]["manifest_hash"]))
    return Lineage(tuple(sightings), tuple(unknown))


def _look_up(path: Path, video_id: str, *, sha256: str, uri: str) -> tuple[bool, bool]:
    if file_sha256(str(path)) != sha256:
        raise ValueError(f"encoder {uri} is damaged or was changed: its {VIDEOS} does not have the hash of its card")
    row = pq.read_table(path, filters=pc.field("video_id") == video_id)
    return row.num_rows > 0, bool(row.num_rows and row["held_out"][0].as_py())
