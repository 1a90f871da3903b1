"""Encoders by name in MLflow's model registry; one of the two files that know MLflow.

A version's artifacts are what `vmoco.export` wrote, files that cannot run code.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmoco import tracking

ARTIFACT_FOLDER = "encoder"


@dataclass(frozen=True)
class Registered:
    """A version of a registered encoder."""

    name: str
    version: str
    alias: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{self.alias}"


def attach(folder: Path, *, run_id: str) -> None:
    """Logs an exported encoder with its run.

    Args:
        folder: what `export.write_encoder` wrote.
        run_id: MLflow run that trained it.
    """
    tracking.client().log_artifacts(run_id, str(folder), ARTIFACT_FOLDER)


def register(run_id: str, *, name: str, alias: str, description: str = "") -> Registered:
    """Registers the encoder of a run as a new version of `name` and gives it the alias.

    Args:
        run_id: MLflow run that `attach` logged an encoder with.
        name: registered name.
        alias: name of this version among all, such as "candidate".
        description: one line for a person.
    """
    from mlflow.exceptions import MlflowException

    tracker = tracking.client()
    try:
        tracker.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{tracker.get_run(run_id).info.artifact_uri}/{ARTIFACT_FOLDER}"
    version = tracker.create_model_version(name, source, run_id=run_id, description=description)
    tracker.set_registered_model_alias(name, alias, version.version)
    return Registered(name, str(version.version), alias)


def fetch(uri: str, folder: Path) -> None:
    """Copies the files of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/ID/PATH` into a folder.

    Raises:
        ValueError: there is no such name, alias or version; what there is, is listed.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    tracker = tracking.client()
    try:
        if uri.startswith("models:/"):
            version = _version(tracker, uri)
            source = tracker.get_model_version_download_uri(version.name, version.version)
        else:
            source = uri
        got = mlflow.artifacts.download_artifacts(artifact_uri=source, tracking_uri=tracking.tracking_uri())
        shutil.copytree(got, folder, dirs_exist_ok=True)
    except (MlflowException, OSError) as error:
        raise ValueError(f"{uri} cannot be fetched from {tracking.tracking_uri()}: {error}") from error


def _version(tracker: Any, uri: str) -> Any:
    from mlflow.exceptions import MlflowException

    name, _, alias = uri.removeprefix("models:/").partition("@")
    name, _, number = name.partition("/")
    try:
        return tracker.get_model_version_by_alias(name, alias) if alias else tracker.get_model_version(name, number)
    except MlflowException:
        known = [f"{model.name} ({', '.join(model.aliases) or 'no alias'})" for model in _models(tracker)]
        raise ValueError(
            f"{uri} is not registered in {tracking.tracking_uri()}: "
            + (f"there are {'; '.join(known)}" if known else "nothing is registered there yet")
            + ". Write models:/NAME@ALIAS or models:/NAME/VERSION"
        ) from None


def _models(tracker: Any) -> list[Any]:
    # The search leaves aliases out; the model itself has them.
    return [tracker.get_registered_model(model.name) for model in tracker.search_registered_models(max_results=20)]
