"""A tracker receives every point, whenever it comes back, and never delays the run."""

from __future__ import annotations

import http.server
import json
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.tracking_server import TrackingServer
from vmoco import tracking
from vmoco.presets import PRESETS

SETTINGS = PRESETS["tiny"][1]


def test_points_and_documents_arrive(vmoco_home: Path) -> None:
    """All points of a run arrive with their steps; of a document the last content; settings arrive as parameters."""
    run_id = tracking.create_run(SETTINGS, tags={"vmoco.preset": "tiny"})
    tracker = tracking.spool(tracking.tracking_uri(), run_id)
    for step in range(1200):
        tracker.points({"loss": step / 2}, step=step)
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


def test_a_tracker_that_is_down_for_a_while_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points queued while the server is away wait for it, and taking them costs the run nothing."""
    server = TrackingServer(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/server.db")  # the same database, while it is away
    run_id = tracking.create_run(SETTINGS, tags={})
    tracker = tracking.spool(server.address, run_id)
    began = time.perf_counter()
    for step in range(50):
        tracker.points({"loss": 1.0}, step=step)
    assert time.perf_counter() - began < 0.5, "handing points over does not wait for the tracker"
    time.sleep(3)  # at least one attempt has failed by now
    with server:
        assert tracker.close(timeout=90) == ""
    history = MlflowClient(f"sqlite:///{tmp_path}/server.db").get_metric_history(run_id, "loss")
    assert [point.step for point in history] == list(range(50))


def test_a_second_life_of_a_run_doubles_no_point(vmoco_home: Path) -> None:
    """What MLflow has of each metric is asked for before the first point is sent, and left out."""
    run_id = tracking.create_run(SETTINGS, tags={})
    for steps in (range(0, 40, 5), range(20, 60, 5)):
        tracker = tracking.spool(tracking.tracking_uri(), run_id)
        for step in steps:
            tracker.points({"loss": float(step), "late": 1.0} if step >= 30 else {"loss": float(step)}, step=step)
        assert tracker.close() == ""
    client = MlflowClient(tracking.tracking_uri())
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == list(range(0, 60, 5))
    assert [point.step for point in client.get_metric_history(run_id, "late")] == list(range(30, 60, 5))


def test_a_run_goes_on_without_its_tracker(vmoco_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming while the server is away gives a warning; a server that does not know the run is an error."""
    run_id = tracking.create_run(SETTINGS, tags={})
    assert tracking.resume_run(run_id) == ""
    with pytest.raises(ValueError, match="run 0123 cannot be resumed in the tracker"):
        tracking.resume_run("0123")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "cannot be resumed in the tracker http://127.0.0.1:9" in tracking.resume_run(run_id)


def test_what_a_dead_tracker_did_not_take_is_said(vmoco_home: Path) -> None:
    """close() gives up after its time, with the number of points and the reason."""
    tracker = tracking.spool("http://127.0.0.1:9", "no run")
    tracker.points({"loss": 1.0, "accuracy": 0.5}, step=1)
    assert "2 points or documents could not be sent to the tracker http://127.0.0.1:9: " in tracker.close(timeout=1)


def test_a_tracker_that_cannot_be_used_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An impossible database is an error of one line, at once."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}")  # a folder, not a database
    with pytest.raises(ValueError, match=r"the tracker's database .* is a folder"):
        tracking.create_run(SETTINGS, tags={})


def test_a_tracker_with_a_password_in_its_uri_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The URI is shown and kept, so a password in it is refused, and not repeated."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://vmoco:hidden@gateway:5443")
    with pytest.raises(ValueError, match=r"carries a password.*MLFLOW_TRACKING_PASSWORD") as raised:
        tracking.tracking_uri()
    assert "hidden" not in str(raised.value)


def test_a_tracker_that_comes_back_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that starts while the tracker is away warns and waits; a tracker that stays away is an error."""
    said: list[str] = []
    with TrackingServer(tmp_path) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        tracking.await_answer(timeout=0, show=said.append)
        assert not said
        server.stop()
        with pytest.raises(ValueError, match="cannot be used"):
            tracking.await_answer(timeout=0, show=said.append)
        said.clear()
        back = threading.Timer(3, server.start)
        back.start()
        tracking.await_answer(timeout=120, show=said.append)
        back.join()
    (line,) = said
    assert line.endswith("waiting for it, up to 2 min")


def test_a_number_that_mlflow_never_takes_does_not_stop_the_others(vmoco_home: Path) -> None:
    """A name of 300 characters is refused with 400: it is set aside, and the number beside it arrives."""
    run_id = tracking.create_run(SETTINGS, tags={})
    spool = tracking.spool(tracking.tracking_uri(), run_id)
    spool.points({"x" * 300: 1.0, "loss": 2.0}, step=1)
    assert spool.close() == ""
    (message,) = spool.set_aside.values()
    assert "exceeds the maximum length" in message
    assert MlflowClient(tracking.tracking_uri()).get_run(run_id).data.metrics == {"loss": 2.0}


class TooLarge(http.server.BaseHTTPRequestHandler):
    """A tracker behind a gateway with a size limit: it answers questions about runs, and uploads with 413."""

    def do_GET(self) -> None:
        run = {"info": {"run_id": "a", "artifact_uri": "mlflow-artifacts:/0/a/artifacts"}, "data": {}}
        body = json.dumps({"run": run}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(413)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *words: object) -> None:
        """Nothing."""


def test_a_document_that_a_gateway_never_lets_through_is_set_aside(vmoco_home: Path) -> None:
    """413 is permanent: the document is not sent again."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), TooLarge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        spool = tracking.spool(f"http://127.0.0.1:{server.server_port}", "a")
        spool.document("report.html", "large")
        assert spool.close(timeout=60) == ""
        server.shutdown()
    (message,) = spool.set_aside.values()
    assert "refuses the document report.html for good" in message


def test_a_deleted_experiment_says_how_to_bring_it_back(vmoco_home: Path) -> None:
    """A new run and a run that resumes get the command with the experiment's id; a deleted run gets its own."""
    run_id = tracking.create_run(SETTINGS, tags={})
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name(SETTINGS.tracking.experiment)
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    restore = f"restore --experiment-id {experiment.experiment_id}`, or choose another --tracking.experiment"
    with pytest.raises(ValueError, match=restore):
        tracking.create_run(SETTINGS, tags={})
    restore = f"restore --experiment-id {experiment.experiment_id}`, or begin a new run with another --run.name and"
    with pytest.raises(ValueError, match=restore):
        tracking.resume_run(run_id)
    client.restore_experiment(experiment.experiment_id)
    client.delete_run(run_id)
    with pytest.raises(ValueError, match=f"was deleted in the tracker .* `mlflow runs restore --run-id {run_id}`"):
        tracking.resume_run(run_id)
    client.restore_run(run_id)
    assert tracking.resume_run(run_id) == ""


def test_a_server_that_no_other_machine_can_use_is_refused(
    tmp_path: Path, vmoco_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artifacts on the server's own disk, or a host name that it does not know: each says what to start it with.

    Artifacts on its disk also stop a run that resumes.
    """
    with TrackingServer(tmp_path, "--no-serve-artifacts", "--default-artifact-root", str(tmp_path / "own")) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        with pytest.raises(ValueError, match=r"the server's own disk .*: start the server with --artifacts-"):
            tracking.create_run(SETTINGS, tags={})
        experiment = MlflowClient(server.address).get_experiment_by_name(SETTINGS.tracking.experiment)
        assert experiment is not None
        begun = MlflowClient(server.address).create_run(experiment.experiment_id).info.run_id
        with pytest.raises(ValueError, match=r"the server's own disk .*, and begin a new run with another --run\.name"):
            tracking.resume_run(begun)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address.replace("127.0.0.1", "[::ffff:127.0.0.1]"))
        with pytest.raises(ValueError, match=r"does not know this host name: start it with --allowed-hosts \[::ffff"):
            tracking.create_run(SETTINGS, tags={})
