"""Encoders by name in MLflow's model registry: register them, find them, pull them, and find those that saw a video.

The artifacts of a version are what `package.write_folder` wrote, a model card, and what MLflow needs to load them
without vmoco. The SHA-256 of the encoder's card is a tag in the tracker's database, and not a file beside the card:
whoever can change the files of an encoder cannot change that record with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vmoco import storage, tracking
from vmoco.data.clip_cache import CacheError, ClipCache
from vmoco.encoders import encoder_program, model_card
from vmoco.encoders.encoder_program import CARD, SHA256_TAG
from vmoco.encoders.package import VIDEOS
from vmoco.storage import file_sha256

ARTIFACT_FOLDER = "encoder"
CANDIDATE, CHAMPION = "candidate", "champion"
_PAGE = 100  # entries in one answer of the registry
_CACHE_GIB = 10.0


@dataclass(frozen=True)
class Registered:
    """A version of a registered encoder."""

    name: str
    version: str
    alias: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{self.alias}"


def attach(folder: Path, *, run_id: str, artifact_folder: str = ARTIFACT_FOLDER) -> list[str]:
    """Adds a model card and what MLflow needs to an exported encoder, and logs it as artifacts of its run.

    Args:
        folder: what `package.write_folder` wrote.
        run_id: MLflow run that trained it, or the run of its import.
        artifact_folder: folder among the run's artifacts that receives it.

    Returns:
        Names of the plots of the model card.
    """
    tracker = tracking.client()
    card = json.loads((folder / CARD).read_text())
    tracked = tracker.get_run(run_id).data.metrics
    histories = {
        name: [(point.step, point.value) for point in tracker.get_metric_history(run_id, name)]
        for name in model_card.METRICS
        if name in tracked
    }
    drawn = model_card.write(folder, card, histories=histories)
    _write_mlmodel(folder, card)
    tracker.log_artifacts(run_id, str(folder), artifact_folder)
    tracker.set_tag(run_id, f"{SHA256_TAG}.{artifact_folder}", file_sha256(str(folder / CARD)))
    return drawn


def register(
    run_id: str, *, name: str, alias: str, description: str = "", artifact_folder: str = ARTIFACT_FOLDER
) -> Registered:
    """Registers the encoder of a run as a new version of `name`, with the alias "candidate".

    Args:
        run_id: MLflow run with an encoder that `attach` logged.
        name: registered name.
        alias: a second alias for this version; "candidate" adds none.
        description: one line that MLflow and `jobs/registry.py list` show.
        artifact_folder: as for `attach`.

    Raises:
        ValueError: the alias is "champion", which only `promotion.promote` sets, or MLflow does not allow the name.
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
    """Refuses the alias "champion", which only a better score gives.

    Raises:
        ValueError: it is "champion".
    """
    if alias == CHAMPION:
        raise ValueError(
            f"alias {CHAMPION!r} cannot be set when an encoder is registered, because only a better score gives it: "
            "register the encoder under another alias, then run jobs/registry.py promote NAME"
        )


@dataclass(frozen=True)
class Located:
    """The place of an encoder's files, and the hash that the tracker's database records for its card."""

    uri: str
    """What the caller asked for, for messages."""
    source: str
    """Artifact URI of its folder."""
    card_sha256: str
    """SHA-256 of its card when the encoder was registered or attached."""


def locate(uri: str) -> Located:
    """Finds `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/ID/FOLDER`.

    Raises:
        ValueError: there is no such name, alias or version; the message lists the existing ones.
    """
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
    except (MlflowException, OSError) as error:
        raise ValueError(f"{uri} cannot be fetched from {tracking.tracking_uri()}: {error}") from error
    if record is None:
        raise ValueError(f"{uri} has no {SHA256_TAG} tag, because vmoco did not register it: it is not read")
    return Located(uri, source, str(record))


def pull(located: Located, name: str, *, sha256: str) -> bytes:
    """The content of one file of an encoder, from the cache in $VMOCO_HOME/encoders or from the artifact store.

    A file of the cache is named by its SHA-256, which is checked on each load: a damaged one is downloaded again. The
    cache holds at most 10 GiB, or VMOCO_ENCODER_CACHE_GIB; the least recently read files are removed first.

    Args:
        located: the encoder.
        name: name of the file.
        sha256: the file's recorded hash.

    Raises:
        ValueError: the file is missing, damaged or was changed, or VMOCO_ENCODER_CACHE_GIB is not a number.
    """
    fetched: list[bytes] = []

    def fetch() -> bytes:
        fetched.append(_download(located, name, sha256))
        return fetched[0]

    try:
        content = bytes(_cache().read(sha256, fetch=fetch))
    except CacheError:  # the folder cannot be written, or the bound is too small: load without the cache
        return fetched[0] if fetched else fetch()
    if hashlib.sha256(content).hexdigest() == sha256:
        return content
    _cache().drop(sha256)  # damaged on this disk; the artifact store has the original
    return fetch()


def _cache() -> ClipCache:
    typed = os.environ.get("VMOCO_ENCODER_CACHE_GIB") or str(_CACHE_GIB)
    try:
        max_bytes = int(float(typed) * 2**30)
    except (ValueError, OverflowError):
        raise ValueError(f"VMOCO_ENCODER_CACHE_GIB is {typed!r}: give a number of GiB, such as 10 or 0.5") from None
    place = Path(storage.home(), "encoders")
    return ClipCache(place, max_bytes=max_bytes, setting="VMOCO_ENCODER_CACHE_GIB")


def _download(located: Located, name: str, sha256: str) -> bytes:
    import mlflow
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{located.source}/{name}", dst_path=folder, tracking_uri=tracking.tracking_uri()
            )
            content = Path(path).read_bytes()
        except (MlflowException, OSError) as error:
            raise ValueError(f"{located.uri} cannot be fetched from {tracking.tracking_uri()}: {error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        record = "the one that was registered" if sha256 == located.card_sha256 else f"the one that its {CARD} records"
        raise ValueError(f"encoder {located.uri} is damaged or was changed: its {name} is not {record}")
    return content


def find_version(uri: str) -> Any:
    """MLflow's entry of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        ValueError: there is no such version; the message lists what is registered.
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
        ValueError: the name is not registered; the message lists the registered names.
    """
    from mlflow.exceptions import MlflowException

    tracker = tracking.client()
    try:
        return tracker.get_registered_model(name)
    except MlflowException:
        known = ", ".join(sorted(model.name for model in _models(tracker))) or "nothing yet"
        raise ValueError(f"nothing is registered as {name!r} in {tracking.tracking_uri()}: there is {known}") from None


def find_run(run: str) -> Any:
    """MLflow's entry of a run, by its id or by its name; the newest of several with one name.

    Raises:
        ValueError: there is no such run; the message lists the newest runs.
    """
    from mlflow.exceptions import MlflowException

    tracker = tracking.client()
    try:
        return tracker.get_run(run)
    except MlflowException:
        experiments = [experiment.experiment_id for experiment in _paged(tracker.search_experiments)]
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
    """A text among the artifacts of a run; None when there is no artifact of that name."""
    from mlflow.exceptions import MlflowException

    try:
        with tempfile.TemporaryDirectory() as folder:
            return Path(tracking.client().download_artifacts(run_id, name, folder)).read_text()
    except (MlflowException, OSError):
        return None


def versions(name: str | None = None) -> list[Any]:
    """MLflow's entries of all versions of one name, or of all names; the newest version of a name comes first."""
    tracker = tracking.client()
    names = [name] if name else [model.name for model in _models(tracker)]
    found = []
    for each in names:
        listed = _paged(tracker.search_model_versions, f"name = '{each}'")
        # In some stores the search leaves out tags and aliases; the version itself has them.
        found += [tracker.get_model_version(each, version.version) for version in listed]
    return sorted(found, key=lambda version: (version.name, -int(version.version)))


def _models(tracker: Any) -> list[Any]:
    # The search leaves out aliases; the model itself has them.
    return [tracker.get_registered_model(model.name) for model in _paged(tracker.search_registered_models)]


def _paged(search: Callable[..., Any], filter_string: str | None = None) -> list[Any]:
    """All entries of a search of MLflow, which returns them page by page."""
    found, token = [], None
    while True:
        page = search(filter_string=filter_string, max_results=_PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _write_mlmodel(folder: Path, card: dict[str, Any]) -> None:
    """Adds MLmodel, its requirements and the loader, so that `mlflow.pyfunc.load_model` can load the folder."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = (-1, card["preprocessing"]["num_frames"], -1, -1, 3)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), shape)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, card["feature_dim"]))]),
    )
    loader = Path(encoder_program.__file__)
    with tempfile.TemporaryDirectory() as place:  # MLflow needs an empty folder
        mlflow.pyfunc.save_model(
            str(Path(place, "model")),
            loader_module=loader.stem,
            code_paths=[str(loader)],
            signature=signature,
            input_example=example_clip(card["preprocessing"]["num_frames"]),
            # An archive is read by the torch that wrote it and by later ones.
            pip_requirements=[f"torch>={card['versions']['torch'].partition('+')[0]}", "numpy", "pandas"],
        )
        shutil.copytree(Path(place, "model"), folder, dirs_exist_ok=True)


def example_clip(num_frames: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The input example of an encoder: a bright square that moves over a grey ramp, uint8 (1, T, 12, 16, 3).

    It is drawn, because a real clip would carry somebody's video into the registry, and small, because MLflow stores it
    as JSON. The encoder scales frames of any size.
    """
    height, width, side = 12, 16, 4
    ramp = np.linspace(32, 160, width, dtype=np.uint8)
    clip = np.broadcast_to(ramp[None, None, None, :, None], (1, num_frames, height, width, 3)).copy()
    for frame in range(num_frames):
        left = frame % (width - side + 1)
        clip[0, frame, side : 2 * side, left : left + side] = (255, 224, 64)
    return clip


@dataclass(frozen=True)
class Sighting:
    """A registered encoder whose data set contains a video."""

    uri: str
    """models:/NAME/VERSION."""
    aliases: tuple[str, ...]
    held_out: bool
    """Whether the video was held out: then scores depend on it, but no weights."""
    manifest_hash: str


@dataclass(frozen=True)
class Lineage:
    """Which registered encoders saw one video."""

    sightings: tuple[Sighting, ...]
    unknown: tuple[str, ...]
    """Versions without a list of videos, such as imported weights."""


def encoders_that_saw(video_id: str) -> Lineage:
    """Finds every registered version whose list of videos contains a video.

    Versions that were trained on the same data set share one list, which is read once.

    Args:
        video_id: name of the video in the manifest of the data set.

    Raises:
        ValueError: an encoder's files are damaged.
    """
    sightings, unknown = [], []
    found_in: dict[str, tuple[bool, bool]] = {}  # by the hash of the list: is the video in it, and is it held out
    for version in versions():
        uri = f"models:/{version.name}/{version.version}"
        located = locate(uri)
        card = json.loads(pull(located, CARD, sha256=located.card_sha256))
        listed = card["files"].get(VIDEOS)
        if listed is None:
            unknown.append(uri)
            continue
        if listed not in found_in:
            found_in[listed] = _look_up(pull(located, VIDEOS, sha256=listed), video_id)
        seen, held_out = found_in[listed]
        if seen:
            aliases = tuple(sorted(version.aliases))
            sightings.append(Sighting(uri, aliases, held_out, card["data"]["manifest_hash"]))
    return Lineage(tuple(sightings), tuple(unknown))


def _look_up(videos: bytes, video_id: str) -> tuple[bool, bool]:
    row = pq.read_table(pa.BufferReader(videos), filters=pc.field("video_id") == video_id)
    return row.num_rows > 0, bool(row.num_rows and row["held_out"][0].as_py())
