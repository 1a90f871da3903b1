"""Runs in MLflow: their settings, metrics, tags and documents.

Training never waits for the tracker: a spool (`vmoco/spool.py`) stands between them. Workers use the client with a run
id and never MLflow's current run, of which there is one per process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmoco import storage
from vmoco.config import PretrainSettings
from vmoco.spool import Document, Points, RefusedError, Spool

_ASK_SECONDS = 5.0
# HTTP statuses after which sending again is of no use. Points are refused only where they are not valid: a 403 for them
# means that the rights to the tracker are wrong, which an administrator may correct during the run.
_POINTS_REFUSED = frozenset({400, 413, 422})
_DOCUMENTS_REFUSED = frozenset({400, 403, 413, 422})


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a database in $VMOCO_HOME (~/.vmoco).

    Raises:
        ValueError: it contains a password; the URI is shown in logs and kept with runs.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.join(storage.home(), 'mlflow.db')}"
    if urllib.parse.urlsplit(uri).password:
        raise ValueError(
            "MLFLOW_TRACKING_URI carries a password, which would show in logs: take it out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (PGUSER and PGPASSWORD for a PostgreSQL URI)"
        )
    return uri


def client(uri: str | None = None) -> Any:
    """An MLflow client for the tracker of this process, or the one given.

    Raises:
        ValueError: its database cannot be written.
    """
    uri = uri or tracking_uri()
    if uri.startswith("sqlite:///"):
        if importlib.util.find_spec("sqlalchemy") is None:
            raise ValueError(
                f"the tracker {uri} is a database, which the light install of vmoco cannot read: set "
                "MLFLOW_TRACKING_URI to an MLflow server, or pip install 'vmoco[cluster]'"
            )
        _check_database(uri.removeprefix("sqlite:///"))
    # MLflow's default is 7 tries over minutes: too long for a user who waits, and a spool repeats requests anyway.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # Files go through the server: by default MLflow sends clients to the store itself, which few of them can reach.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a job's log is not a terminal
    from mlflow import MlflowClient  # 4 s: only where something is tracked

    # Creating the database writes a line per table, registering an encoder one about waiting and one about its example.
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _check_database(path: str) -> None:
    # MLflow would try for 100 s, with a warning each time.
    if os.path.isdir(path):
        raise ValueError(f"the tracker's database {path} is a folder: set MLFLOW_TRACKING_URI to a file or a server")
    storage.check_writable(os.path.dirname(os.path.abspath(path)))


@dataclass(frozen=True)
class DataInput:
    """The data set of a run, as MLflow shows it beside the run's parameters."""

    uri: str
    digest: str
    """Hash of its manifest."""
    counts: Mapping[str, int]
    """Clips, videos and so on."""


def create_run(
    settings: PretrainSettings,
    *,
    tags: Mapping[str, str],
    data: Sequence[DataInput] = (),
    note: str = "",
    parent_run: str | None = None,
) -> str:
    """Creates the MLflow run of a pretraining, with all its settings, and returns its id.

    Args:
        settings: of the run.
        tags: of the run.
        data: the data sets that it trains on.
        note: Markdown that is shown above its metrics.
        parent_run: run below which it is shown.

    Raises:
        ValueError: the tracker cannot be used.
    """
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    try:
        tracker = client()
        experiment = _experiment(tracker, settings.tracking.experiment)
        own = {"mlflow.note.content": note} | ({"mlflow.parentRunId": parent_run} if parent_run else {})
        own |= {"mlflow.source.git.commit": commit} if (commit := _commit()) else {}
        run = tracker.create_run(experiment, run_name=settings.run.name, tags=own | dict(tags))
        flat = [
            Param(f"{group}.{field}", str(value))
            for group, fields in settings.model_dump(mode="json", exclude={"preset"}).items()
            for field, value in fields.items()
        ]
        for first in range(0, len(flat), 100):  # MLflow takes 100 at a time
            tracker.log_batch(run.info.run_id, params=flat[first : first + 100])
        tracker.log_text(run.info.run_id, settings.canonical_json(), "settings.json")
        if data:
            tracker.log_inputs(run.info.run_id, datasets=[_as_input(each) for each in data])
    except MlflowException as error:
        raise _unusable(error) from error
    return str(run.info.run_id)


def _as_input(data: DataInput) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scheme = data.uri.partition("://")[0] if "://" in data.uri else "local"
    entry = Dataset(
        name=data.uri.rstrip("/").rpartition("/")[2],
        digest=data.digest,
        source_type=scheme.replace("file", "local"),
        source=json.dumps({"uri": data.uri}),
        profile=json.dumps(dict(data.counts)),
    )
    return DatasetInput(dataset=entry, tags=[InputTag("mlflow.data.context", "training")])


def _commit() -> str:
    """Commit of this code, where it runs from a repository; with a plus if files differ from it."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return os.environ.get("VMOCO_COMMIT", "")
    try:
        ask = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or a repository of another user
        return ""


def create_import(name: str, *, tags: Mapping[str, str]) -> str:
    """Creates the MLflow run whose artifacts are imported weights, and returns its id.

    Raises:
        ValueError: the tracker cannot be used.
    """
    from mlflow.exceptions import MlflowException

    try:
        tracker = client()
        run = tracker.create_run(_experiment(tracker, "vmoco-imports"), run_name=name, tags=dict(tags))
        tracker.set_terminated(run.info.run_id, "FINISHED")
    except MlflowException as error:
        raise _unusable(error) from error
    return str(run.info.run_id)


def create_parent(name: str, *, experiment: str, params: Mapping[str, str]) -> str:
    """Creates the MLflow run of a sweep, the parent of its trials' runs, and returns its id.

    Raises:
        ValueError: the tracker cannot be used.
    """
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    try:
        tracker = client()
        run = tracker.create_run(_experiment(tracker, experiment), run_name=name, tags={"vmoco.sweep": name})
        tracker.log_batch(run.info.run_id, params=[Param(key, value) for key, value in params.items()])
    except MlflowException as error:
        raise _unusable(error) from error
    return str(run.info.run_id)


def await_answer(*, timeout: float, show: Callable[[str], None]) -> None:
    """Waits up to `timeout` seconds until the tracker answers; `show` receives a warning if it does not at once.

    Raises:
        ValueError: it does not answer, or cannot be used.
    """
    from mlflow.exceptions import MlflowException

    end, warned = time.monotonic() + timeout, False
    while True:
        try:
            client().search_experiments(max_results=1)
            return
        except MlflowException as error:
            unusable = _unusable(error)
            if time.monotonic() > end:
                raise unusable from error
        if not warned:
            show(f"warning: {unusable}; waiting for it, up to {timeout / 60:.0f} min")
            warned = True
        time.sleep(_ASK_SECONDS)


def scores(run_id: str) -> dict[str, float]:
    """The last scores of a run, by name, as in `score/retrieval`."""
    metrics = client().get_run(run_id).data.metrics
    return {name: value for name, value in metrics.items() if name.startswith("score/")}


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    """Step and value of each point of a metric."""
    return [(point.step, point.value) for point in client().get_metric_history(run_id, name)]


def artifact_page(run_id: str, path: str) -> str:
    """Where MLflow's interface shows an artifact of a run, relative to the interface's own address."""
    experiment = client().get_run(run_id).info.experiment_id
    return f"#/experiments/{experiment}/runs/{run_id}/artifacts/{urllib.parse.quote(path)}"


def note_run(run_id: str, *, tags: Mapping[str, str], documents: Mapping[str, Document] | None = None) -> str:
    """Adds tags, and documents as artifacts by name, to a run.

    Returns:
        An error message; empty when the tracker has them.
    """
    from mlflow.exceptions import MlflowException

    try:
        tracker = client()
        for key, value in tags.items():
            tracker.set_tag(run_id, key, value)
        RunTracker(tracking_uri(), run_id).send([], documents or {})
    except (MlflowException, RefusedError) as error:
        return f"the tracker {tracking_uri()} cannot add tags or documents to run {run_id}: {error}"
    return ""


def _experiment(tracker: Any, name: str) -> str:
    """The id of an experiment, which is created if it does not exist.

    Raises:
        ValueError: it was deleted, or its artifacts would lie on the disk of the server.
    """
    found = tracker.get_experiment_by_name(name)
    if found is None:
        # A server decides where artifacts go; the embedded database would put them into the working directory.
        embedded = tracking_uri().startswith("sqlite:")
        location = storage.join(storage.home(), "mlartifacts") if embedded else None
        found = tracker.get_experiment(tracker.create_experiment(name, artifact_location=location))
    _check_experiment(found, other="choose another --tracking.experiment")
    return str(found.experiment_id)


def _check_experiment(found: Any, *, other: str) -> None:
    """Checks that an experiment can take a run's metrics and artifacts.

    Args:
        found: the experiment.
        other: what to do to use another experiment, for the error message.

    Raises:
        ValueError: it was deleted, or its artifacts would lie on the disk of the server.
    """
    name, place = found.name, found.artifact_location
    if found.lifecycle_stage == "deleted":
        raise ValueError(
            f"the experiment {name!r} was deleted in the tracker {tracking_uri()}: restore it with `mlflow experiments "
            f"restore --experiment-id {found.experiment_id}`, or {other}"
        )
    # MLflow's clients write artifacts themselves, so the path would be one of this machine's disk.
    on_a_disk = place.startswith("file:") or ":/" not in place
    if tracking_uri().startswith(("http://", "https://")) and on_a_disk:
        raise ValueError(
            f"the tracker {tracking_uri()} keeps artifacts of experiment {name!r} in {place}, a path of the server's "
            f"own disk that other machines do not reach: start the server with --artifacts-destination {place} (and "
            f"without --default-artifact-root and --no-serve-artifacts), and {other}"
        )


def _unusable(error: Exception) -> ValueError:
    """The error about a tracker that cannot be used, with what to do about it where that is known."""
    hint = ""
    if "Invalid Host header" in str(error):
        host = urllib.parse.urlsplit(tracking_uri()).netloc
        hint = (
            f". The server does not know this host name: start it with --allowed-hosts {host} (and each other name "
            "that it is reached by)"
        )
    return ValueError(f"the tracker {tracking_uri()} cannot be used: {error}{hint}")


@contextlib.contextmanager
def _refusals(statuses: frozenset[int]) -> Iterator[None]:
    """Turns answers with one of these HTTP statuses into RefusedError; other errors pass unchanged."""
    try:
        yield
    except Exception as error:
        if _status(error) in statuses:
            raise RefusedError(" ".join(str(error).split())[:300]) from error
        raise


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of MLflow, or of the HTTP library below it, stands for."""
    if (response := getattr(error, "response", None)) is not None:
        return int(response.status_code)
    codes = {"INVALID_PARAMETER_VALUE": 400, "BAD_REQUEST": 400, "PERMISSION_DENIED": 403}
    return codes.get(getattr(error, "error_code", ""))


class RunTracker:
    """The tracker of one run, for `vmoco.spool`.

    Args:
        uri: of the tracker.
        run_id: MLflow run.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri = uri
        self._run_id = run_id
        self._made: Any = None

    def latest_steps(self) -> dict[str, int]:
        """Of each metric, the latest step that has arrived."""
        return {metric.key: metric.step for metric in self._client().get_run(self._run_id).data.to_proto().metrics}

    def send(self, points: list[Points], documents: Mapping[str, Document]) -> None:
        """Sends metrics in one request, and documents as artifacts.

        MLflow keeps a metric of the same step, time and value only once.

        Raises:
            RefusedError: the tracker refuses them for good.
        """
        from mlflow.entities import Metric

        metrics = [Metric(name, value, row.time_ms, row.step) for row in points for name, value in row.numbers.items()]
        with _refusals(_POINTS_REFUSED):
            if metrics:
                self._client().log_batch(self._run_id, metrics=metrics)
        with _refusals(_DOCUMENTS_REFUSED), tempfile.TemporaryDirectory() as place:
            for name, content in documents.items():
                folder, _, file_name = name.rpartition("/")
                path = Path(place, file_name)  # MLflow takes bytes only from a file
                path.write_bytes(content.encode() if isinstance(content, str) else content)
                self._client().log_artifact(self._run_id, str(path), folder or None)

    def _client(self) -> Any:
        self._made = self._made or client(self._uri)  # 4 s at first, in the spool's thread
        return self._made


def spool(
    uri: str,
    run_id: str,
    *,
    file: str | None = None,
    may_send: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda message: None,
) -> Spool:
    """A spool to an MLflow run; see `vmoco.spool.Spool` for `file`, `may_send` and `warn`."""
    return Spool(RunTracker(uri, run_id), name=uri, uri=file, may_send=may_send, warn=warn)


def resume_run(run_id: str) -> str:
    """Marks a run that had ended as running again.

    Returns:
        An error message; empty when the tracker has the change.

    Raises:
        ValueError: the tracker answers, and does not know the run, or cannot take its metrics and artifacts: the run
            or its experiment was deleted, or its artifacts would lie on the disk of the server.
    """
    from mlflow.exceptions import MlflowException

    other = "begin a new run with another --run.name and another --tracking.experiment"
    try:
        tracker = client()
        run = tracker.get_run(run_id)
        _check_experiment(tracker.get_experiment(run.info.experiment_id), other=other)
        if run.info.lifecycle_stage == "deleted":
            raise ValueError(
                f"run {run_id} was deleted in the tracker {tracking_uri()}: restore it with `mlflow runs restore "
                f"--run-id {run_id}`, or begin a new run with another --run.name"
            )
        tracker.update_run(run_id, "RUNNING")
    except MlflowException as error:
        message = f"run {run_id} cannot be resumed in the tracker {tracking_uri()}: {error}"
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise ValueError(message) from error
        return message  # the tracker is away for now: the run goes on, and its points wait
    return ""


def finish_run(run_id: str, status: str) -> str:
    """Sets how a run ended: FINISHED, FAILED or KILLED (stopped on request).

    Returns:
        An error message; empty when the tracker has the change.
    """
    from mlflow.exceptions import MlflowException

    try:
        client().set_terminated(run_id, status)
    except MlflowException as error:  # the run has ended already: this must not hide how it ended
        return f"the tracker {tracking_uri()} does not show yet that the run is {status}: {error}"
    return ""
