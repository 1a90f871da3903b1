"""A tracker takes every point, whenever it comes back, and never holds the run up."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from vmoco import tracking
from vmoco.presets import PRESETS

SETTINGS = PRESETS["tiny"][1]


def test_points_and_documents_arrive(vmoco_home: Path) -> None:
    """All points of a run with their steps, of a document its last content, and the settings as parameters."""
    run_id = tracking.create_run(SETTINGS, tags={"vmoco.preset": "tiny"})
    tracker = tracking.Tracker(tracking.tracking_uri(), run_id)
    for step in range(1200):
        tracker.metrics({"loss": step / 2}, step=step)
    for text in ("first", "last"):
        tracker.document("list.json", text)
    pictures = [b"first", bytes(range(256))]
    for picture in pictures:
        tracker.document("pictures/deep/sheet.png", picture)
    tracker.document("flat.png", b"flat")
    assert tracker.close() == ""
    client = MlflowClient(tracking.tracking_uri())
    history = client.get_metric_history(run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(step, step / 2) for step in range(1200)]
    folder = Path(client.get_run(run_id).info.artifact_uri)
    assert (folder / "list.json").read_text() == "last"
    assert (folder / "pictures" / "deep" / "sheet.png").read_bytes() == pictures[-1]
    assert (folder / "flat.png").read_bytes() == b"flat"
    assert (folder / "settings.json").read_text() == SETTINGS.canonical_json()
    assert client.get_run(run_id).data.params["moco.queue_size"] == "64"
    assert folder.is_relative_to(vmoco_home / "mlartifacts")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]], list[str]]]:
    """Address and start command of an MLflow server that is not started yet; what is started, is stopped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    started: list[subprocess.Popen[bytes]] = []
    yield f"http://127.0.0.1:{port}", started, command
    for process in started:
        process.terminate()
        process.wait(timeout=20)


def test_a_tracker_that_is_down_for_a_while_loses_nothing(
    server: tuple[str, list[subprocess.Popen[bytes]], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points queued while the server is away wait for it, and taking them costs the run nothing."""
    address, started, command = server
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/server.db")  # the same database, while it is away
    run_id = tracking.create_run(SETTINGS, tags={})
    tracker = tracking.Tracker(address, run_id)
    began = time.perf_counter()
    for step in range(50):
        tracker.metrics({"loss": 1.0}, step=step)
    assert time.perf_counter() - began < 0.5, "handing points over does not wait for the tracker"
    time.sleep(3)  # at least one attempt has failed by now
    started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert tracker.close(timeout=90) == ""
    history = MlflowClient(f"sqlite:///{tmp_path}/server.db").get_metric_history(run_id, "loss")
    assert [point.step for point in history] == list(range(50))


def test_what_a_dead_tracker_did_not_take_is_said(vmoco_home: Path) -> None:
    """close() gives up after its time, with the number of points and the reason."""
    tracker = tracking.Tracker("http://127.0.0.1:9", "no run")
    tracker.metrics({"loss": 1.0, "accuracy": 0.5}, step=1)
    assert "2 points or documents were not taken by the tracker http://127.0.0.1:9: " in tracker.close(timeout=1)


def test_a_tracker_that_cannot_be_used_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that cannot be one gives one sentence, and at once."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}")  # a folder, not a database
    with pytest.raises(ValueError, match=r"the tracker's database .* is a folder"):
        tracking.create_run(SETTINGS, tags={})


def test_a_tracker_with_a_password_in_its_uri_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The URI is shown and kept, so a password in it is refused, and not repeated."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://vmoco:hidden@door:5443")
    with pytest.raises(ValueError, match=r"carries a password.*MLFLOW_TRACKING_PASSWORD") as raised:
        tracking.tracking_uri()
    assert "hidden" not in str(raised.value)
