"""A sweep whose driver, node or tracker goes away: real jobs, real nodes, a real MLflow server."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests import processes
from tests.dataset import make_data_set
from tests.nodes import Nodes
from tests.test_pretrain import ROOT, wait_for
from tests.tracking_server import TrackingServer
from tests.waiting import wait_until
from vmoco.cluster.local import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


class Sweeps:
    """Sweeps as a user starts them, without the job server, so that a test can kill them.

    Args:
        home: for data, space and runs.
        environment: of a cluster.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home = home
        self.environment = environment | {"VMOCO_HOME": str(home)}
        make_data_set(home / "data", num_videos=16, num_held_out=4)

    def start(self, name: str, space: dict[str, Any], *flags: str, **environment: str) -> subprocess.Popen[str]:
        path = self.home / f"{name}.yaml"
        path.write_text(json.dumps(space))  # which is YAML
        command = [sys.executable, "jobs/sweep.py", "tiny", "--data.uri", str(self.home / "data"), "--run.name", name,
                   "--space", str(path), "--train.checkpoint-every", "6", "--train.keep-checkpoints", "20",
                   *flags]  # fmt: skip
        return subprocess.Popen(
            command,
            env=self.environment | environment,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def wait_for_step(self, name: str, place: int, step: int) -> None:
        """Waits until a trial has kept a checkpoint."""
        trial = self.home / "runs" / name / "trials" / f"{name}-{place:03d}"
        wait_for(trial / f"step-{step:08d}" / "state.json", seconds=300)

    def workers(self) -> list[str]:
        """The live workers of Ray Train that belong to these sweeps, as `ps` shows them."""
        marked = processes.with_mark(self.environment["RAY_AUTH_TOKEN_PATH"])
        return [line for line in marked if "ray::RayTrainWorker" in line]

    def record(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "runs" / name / "sweep.json").read_text())
        return found


def finished(job: subprocess.Popen[str]) -> str:
    """The output of a job that ended well."""
    said, _ = job.communicate(timeout=500)
    assert job.returncode == 0, said
    return said


def runs_of(client: MlflowClient, parent: str) -> dict[str, tuple[str, list[int]]]:
    """State, and steps of the points of `loss`, of the runs below a parent, by name."""
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len({run.info.run_name for run in found}) == len(found), "a trial has one run"
    return {
        run.info.run_name: (
            run.info.status,
            [point.step for point in client.get_metric_history(run.info.run_id, "loss")],
        )
        for run in found
    }


@pytest.fixture(scope="module")
def sweeps(local_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    """Sweeps on a cluster with two CPUs."""
    return Sweeps(
        tmp_path_factory.mktemp("home"), local_cluster.environment | {"RAY_ADDRESS": local_cluster.gcs_address}
    )


SPACE = {"generator.drop_ratio": [0.0, 0.5]}
# One trial after the other; all checkpoints stay.
SHORT = ("--scaling.num-workers", "2", "--train.steps", "60", "--train.checkpoint-every", "6")
SHORT_POINTS = list(range(5, 61, 5))


def test_a_killed_driver_is_followed_by_the_same_command(sweeps: Sweeps) -> None:
    """Kill -9 of the driver while the second trial trains: again, the first is not repeated, the second resumes.

    While it lives, a second driver of the same sweep is refused, and changes nothing.
    """
    start = functools.partial(sweeps.start, "killed", SPACE | {"moco.decay": [0.99, 1]}, *SHORT)
    job = start()
    sweeps.wait_for_step("killed", 0, 6)
    other = start()
    refused, _ = other.communicate(timeout=120)
    assert other.returncode != 0
    assert "is being trained by process" in refused
    sweeps.wait_for_step("killed", 1, 12)
    job.kill()
    job.communicate(timeout=60)
    before = sweeps.record("killed")
    assert [trial["status"] for trial in before["trials"]] == ["finished", "running", "waiting", "waiting"]
    said = finished(start())
    after = sweeps.record("killed")
    assert [trial["status"] for trial in after["trials"]] == ["finished"] * 4
    assert after["trials"][0] == before["trials"][0]
    assert after["parent_run"] == before["parent_run"]
    assert "4 trials, 1 have ended before" in said
    runs = runs_of(MlflowClient(f"sqlite:///{sweeps.home}/mlflow.db"), after["parent_run"])
    assert {name: steps for name, (_, steps) in runs.items()} == {
        trial["name"]: SHORT_POINTS for trial in after["trials"]
    }, "one run each, without gaps or doubled steps"


def test_a_lost_node_costs_a_trial_what_followed_its_checkpoint(tmp_path: Path) -> None:
    """kill -9 of the raylet of one of two nodes: its trial goes on when the other has ended, and both are complete."""
    with Nodes(cpus=[1, 1]) as nodes:
        sweeps = Sweeps(tmp_path, nodes.environment)
        job = sweeps.start("node", SPACE, "--train.steps", "400", "--train.checkpoint-every", "20")
        for place in (0, 1):
            sweeps.wait_for_step("node", place, 40)
        nodes.kill(0)
        said = finished(job)
    kept = sweeps.record("node")
    assert [trial["status"] for trial in kept["trials"]] == ["finished", "finished"], said
    runs = runs_of(MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), kept["parent_run"])
    assert runs == {trial["name"]: ("FINISHED", list(range(5, 401, 5))) for trial in kept["trials"]}


def test_a_tracker_that_is_away_fails_no_trial_and_a_stop_is_noted(sweeps: Sweeps, tmp_path: Path) -> None:
    """It is away when the first trial ends: all points arrive later, and the second trial begins. Then SIGTERM."""
    with TrackingServer(tmp_path) as server:
        start = functools.partial(sweeps.start, "away", SPACE, *SHORT, MLFLOW_TRACKING_URI=server.address)
        job = start()
        sweeps.wait_for_step("away", 0, 12)
        server.stop()
        sweeps.wait_for_step("away", 0, 60)
        # The workers wait 30 s for the tracker, then leave their points on disk and end.
        wait_until(lambda: not sweeps.workers(), "the workers of the first trial end")
        assert sweeps.record("away")["trials"][0]["status"] == "running"
        server.start()
        sweeps.wait_for_step("away", 1, 12)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=120)
        assert job.returncode == 143, said
        client = MlflowClient(f"sqlite:///{tmp_path}/server.db")
        kept = sweeps.record("away")
        first, second = (trial["name"] for trial in kept["trials"])
        stopped = runs_of(client, kept["parent_run"])
        assert stopped[first] == ("FINISHED", SHORT_POINTS)
        assert stopped[second][0] == "KILLED"
        assert client.get_run(kept["parent_run"]).info.status == "KILLED"
        finished(start())
        assert runs_of(client, kept["parent_run"]) == dict.fromkeys((first, second), ("FINISHED", SHORT_POINTS))
        assert client.get_run(kept["parent_run"]).info.status == "FINISHED"
