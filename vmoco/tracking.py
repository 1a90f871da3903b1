"""Metrics, parameters and checkpoints of a run in MLflow; one of the two files that know MLflow.

The tracker is never waited for: points go through a queue to a thread, which tries again until they are taken, and
what is not taken in the end is said. Workers use the client with a run id and never MLflow's current run, of which
there is one per process.
"""

from __future__ import annotations

import collections
import logging
import os
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmoco import storage
from vmoco.config import PretrainSettings

_RETRY_SECONDS = 2.0
_BATCH = 500  # points in one request; MLflow takes at most 1,000


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a database in $VMOCO_HOME (~/.vmoco).

    Raises:
        ValueError: it carries a password: the URI is shown to people and kept with runs.
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
        _check_database(uri.removeprefix("sqlite:///"))
    # MLflow tries 7 times for minutes; a person waits for the first answer, and `Tracker` tries again by itself.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # Files through the server: by default MLflow sends its clients to the store itself, which few of them may reach.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    from mlflow import MlflowClient  # 4 s: only where something is tracked

    logging.getLogger("alembic").setLevel(logging.WARNING)  # creating the database writes a line per table
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _check_database(path: str) -> None:
    # MLflow would try for 100 s, with a warning each time.
    if os.path.isdir(path):
        raise ValueError(f"the tracker's database {path} is a folder: set MLFLOW_TRACKING_URI to a file or a server")
    storage.check_writable(os.path.dirname(os.path.abspath(path)))


def create_run(settings: PretrainSettings, *, tags: Mapping[str, str]) -> str:
    """Creates the MLflow run of a pretraining, with all its settings, and returns its id.

    Raises:
        ValueError: the tracker cannot be used.
    """
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    try:
        tracker = client()
        experiment = _experiment(tracker, settings.tracking.experiment)
        run = tracker.create_run(experiment, run_name=settings.run.name, tags=dict(tags))
        flat = [
            Param(f"{group}.{field}", str(value))
            for group, fields in settings.model_dump(mode="json", exclude={"preset"}).items()
            for field, value in fields.items()
        ]
        for first in range(0, len(flat), 100):  # MLflow takes 100 at a time
            tracker.log_batch(run.info.run_id, params=flat[first : first + 100])
        tracker.log_text(run.info.run_id, settings.canonical_json(), "settings.json")
    except MlflowException as error:
        raise ValueError(f"the tracker {tracking_uri()} cannot be used: {error}") from error
    return str(run.info.run_id)


def create_import(name: str, *, tags: Mapping[str, str]) -> str:
    """Creates the MLflow run that stands for weights of others, and returns its id: it holds them as its artifacts.

    Raises:
        ValueError: the tracker cannot be used.
    """
    from mlflow.exceptions import MlflowException

    try:
        tracker = client()
        run = tracker.create_run(_experiment(tracker, "vmoco-imports"), run_name=name, tags=dict(tags))
        tracker.set_terminated(run.info.run_id, "FINISHED")
    except MlflowException as error:
        raise ValueError(f"the tracker {tracking_uri()} cannot be used: {error}") from error
    return str(run.info.run_id)


def _experiment(tracker: Any, name: str) -> str:
    found = tracker.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # A server decides itself where artifacts go; the embedded database would put them into the working directory.
    embedded = tracking_uri().startswith("sqlite:")
    location = storage.join(storage.home(), "mlartifacts") if embedded else None
    return str(tracker.create_experiment(name, artifact_location=location))


class Tracker:
    """Sends the points of one run, in the background.

    Args:
        uri: of the tracker.
        run_id: MLflow run.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri = uri
        self._run_id = run_id
        self._points: collections.deque[tuple[str, float, int, int]] = collections.deque()
        self._documents: dict[str, str | bytes] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._last_error = ""
        self._thread = threading.Thread(target=self._send, name="tracker", daemon=True)
        self._thread.start()

    def metrics(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Queues one point per name."""
        now = int(time.time() * 1000)
        with self._wake:
            self._points.extend((name, value, now, step) for name, value in numbers.items())
            self._wake.notify()

    def document(self, name: str, content: str | bytes) -> None:
        """Queues an artifact, a text or the bytes of a file; of two under one name the later counts."""
        with self._wake:
            self._documents[name] = content
            self._wake.notify()

    def close(self, *, timeout: float = 30.0) -> str:
        """Sends what is queued, for at most `timeout` seconds.

        Returns:
            What could not be sent and why, as a sentence; empty where all was.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        left = len(self._points) + len(self._documents)
        if not left:
            return ""
        return f"{left} points or documents were not taken by the tracker {self._uri}: {self._last_error}"

    def _send(self) -> None:
        tracker = None
        while True:
            with self._wake:
                while not (self._points or self._documents or self._closing):
                    self._wake.wait()
                if self._closing and not (self._points or self._documents):
                    return
                points = [self._points[i] for i in range(min(len(self._points), _BATCH))]
                documents = dict(self._documents)
            try:
                tracker = tracker or client(self._uri)
                self._deliver(tracker, points, documents)
            except Exception as error:  # whatever the tracker does, training goes on and the points stay queued
                self._last_error = f"{type(error).__name__}: {error}".splitlines()[0]
                time.sleep(_RETRY_SECONDS)
                continue
            with self._wake:
                for _ in points:
                    self._points.popleft()
                for name, content in documents.items():
                    if self._documents.get(name) == content:
                        del self._documents[name]

    def _deliver(
        self, tracker: Any, points: list[tuple[str, float, int, int]], documents: dict[str, str | bytes]
    ) -> None:
        from mlflow.entities import Metric

        if points:
            tracker.log_batch(self._run_id, metrics=[Metric(*point) for point in points])
        for name, content in documents.items():
            if isinstance(content, str):
                tracker.log_text(self._run_id, content, name)
                continue
            folder, _, file_name = name.rpartition("/")
            with tempfile.TemporaryDirectory() as place:  # MLflow takes bytes only from a file
                path = Path(place, file_name)
                path.write_bytes(content)
                tracker.log_artifact(self._run_id, str(path), folder or None)


def resume_run(run_id: str) -> None:
    """Takes a run up again that had ended.

    Raises:
        ValueError: the tracker does not know it, or cannot be used.
    """
    from mlflow.exceptions import MlflowException

    try:
        client().update_run(run_id, "RUNNING")
    except MlflowException as error:
        raise ValueError(f"run {run_id} cannot be resumed in the tracker {tracking_uri()}: {error}") from error


def finish_run(run_id: str, status: str) -> str:
    """Sets how a run ended: FINISHED, FAILED or KILLED (stopped on request).

    Returns:
        Why the tracker did not take it, as a sentence; empty where it did.
    """
    from mlflow.exceptions import MlflowException

    try:
        client().set_terminated(run_id, status)
    except MlflowException as error:  # the run itself has ended well or badly already: this must not hide how
        return f"the tracker {tracking_uri()} was not told that the run is {status}: {error}"
    return ""
