"""Whatever is killed, a run goes on from its last checkpoint or ends with one sentence: real jobs, real Ray nodes.

Each test starts nodes of its own (`tests/nodes.py`), because it takes some away. Where the number of workers stays the
same, the last checkpoint has the very bytes of a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests import processes
from tests.dataset import make_data_set
from tests.nodes import Nodes
from tests.waiting import wait_until
from vmoco.data.manifest import Manifest
from vmoco.train.state import STATE_TENSORS

ROOT = Path(__file__).parents[2]
STEPS = 60

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


class Runs:
    """Runs of `tiny` on some nodes, as a person starts them."""

    def __init__(self, home: Path, nodes: Nodes) -> None:
        self.home = home
        self.nodes = nodes
        make_data_set(home / "data", num_videos=16, num_held_out=4)

    def start(self, name: str, *flags: str, data: str = "data", **environment: str) -> subprocess.Popen[str]:
        """Starts a job; `follow` or `end` read what it says."""
        command = [sys.executable, "jobs/pretrain.py", "tiny", "--data.uri", str(self.home / data), "--run.name", name]
        command += ["--train.steps", str(STEPS), "--train.checkpoint-every", "10", "--train.log-every", "2"]
        command += ["--scaling.num-workers", "2", *flags]
        variables = self.nodes.environment | {"VMOCO_HOME": str(self.home)} | environment
        return subprocess.Popen(
            command, env=variables, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def folder(self, name: str) -> Path:
        return self.home / "runs" / name

    def kept(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads((self.folder(name) / "checkpoints.json").read_text())
        return rows

    def wait_for_step(self, name: str, step: int, seconds: float = 240) -> None:
        """Waits until a checkpoint is kept."""
        path = self.folder(name) / f"step-{step:08d}" / "state.json"
        wait_until(path.exists, f"{path} is there", seconds=seconds)

    def workers(self) -> list[int]:
        """Process ids of the workers on these nodes; they have the environment of the node and not of the job."""
        mark = self.nodes.environment["RAY_TMPDIR"]
        return sorted(int(line.split()[0]) for line in processes.with_mark(mark) if "ray::RayTrainWorker" in line)

    def tracker(self, name: str) -> tuple[MlflowClient, str]:
        """The tracker, and the id of a run in it."""
        run_id = json.loads((self.folder(name) / "run.json").read_text())["run_id"]
        return MlflowClient(f"sqlite:///{self.home}/mlflow.db"), run_id

    def points(self, name: str) -> list[int]:
        """Steps of the points of `loss` in the tracker, in their order."""
        client, run_id = self.tracker(name)
        return sorted(point.step for point in client.get_metric_history(run_id, "loss"))

    def machines(self, name: str) -> set[str]:
        """Nodes of whose processor and memory the tracker has points."""
        client, run_id = self.tracker(name)
        found = [metric.split("/") for metric in client.get_run(run_id).data.metrics if metric.startswith("system/")]
        assert all(len(parts) == 3 for parts in found), "on several nodes each has a name"
        kinds = {"cpu_utilization_percentage", "system_memory_usage_megabytes"}
        return {node for _, node, _ in found if kinds <= {kind for _, other, kind in found if other == node}}


EVERY_POINT = list(range(2, STEPS + 1, 2))


def end(job: subprocess.Popen[str], seconds: float = 240) -> str:
    """What a job that ends well has said."""
    said, _ = job.communicate(timeout=seconds)
    assert job.returncode == 0, said
    return said


def follow(job: subprocess.Popen[str], text: str, *, times: int = 1) -> str:
    """Reads what a job says until a text has come so often; returns the line with it."""
    said: list[str] = []
    for line in job.stdout or ():
        said.append(line)
        times -= text in line
        if not times:
            return line
    raise AssertionError(f"{text!r} never came:\n" + "".join(said[-40:]))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Two nodes of one CPU, beside the head."""
    with Nodes(cpus=[1, 1]) as nodes:
        yield Runs(tmp_path_factory.mktemp("two"), nodes)


@pytest.fixture(scope="module")
def undisturbed(two: Runs) -> str:
    """SHA-256 of the last checkpoint of a run that nobody disturbed."""
    end(two.start("undisturbed"))
    assert two.points("undisturbed") == EVERY_POINT
    sha256: str = two.kept("undisturbed")[-1]["sha256"]
    return sha256


def test_killed_workers_change_nothing(two: Runs, undisturbed: str) -> None:
    """kill -9 of one worker and, after the restart, of the other: the same bytes, and each point once.

    Both nodes are measured, and only rank 0 has a tracker; the head may be too, because a checkpoint is scored there.
    """
    job = two.start("workers")
    for step, place in ((20, 0), (40, 1)):
        two.wait_for_step("workers", step)
        os.kill(two.workers()[place], signal.SIGKILL)
    said = end(job)
    assert len(re.findall(r"2 workers on cpu, .* from step", said)) == 3
    assert two.kept("workers")[-1]["sha256"] == undisturbed
    assert two.points("workers") == EVERY_POINT
    assert len(two.machines("workers")) in (2, 3)


def test_a_killed_driver_is_followed_by_the_same_command(two: Runs, undisturbed: str) -> None:
    """kill -9 of the job: the command again goes on at once from the last checkpoint, and ends with the same bytes."""
    job = two.start("driver")
    two.wait_for_step("driver", 20)
    job.kill()
    job.communicate()
    said = end(two.start("driver"))
    (step,) = re.findall(r"workers on .* from step (\d+)", said)
    assert int(step) >= 20
    assert two.kept("driver")[-1]["sha256"] == undisturbed
    assert two.points("driver") == EVERY_POINT


def test_a_second_job_of_a_run_is_refused(two: Runs, undisturbed: str) -> None:
    """While the first trains, the second ends with one sentence, and the first is not disturbed."""
    job = two.start("both")
    two.wait_for_step("both", 10)
    second = two.start("both")
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 1
    assert said.strip().splitlines()[-1].startswith("error: this --run.name is being trained by process")
    end(job)
    assert two.kept("both")[-1]["sha256"] == undisturbed


def test_sigterm_keeps_the_state(two: Runs, undisturbed: str) -> None:
    """A stopped job writes a checkpoint between two others; the same command ends with the same bytes."""
    job = two.start("stopped")
    two.wait_for_step("stopped", 10)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 143, said
    step = two.kept("stopped")[-1]["step"]
    assert 10 < step < STEPS
    assert f"from step {step}" in end(two.start("stopped"))
    assert two.kept("stopped")[-1]["sha256"] == undisturbed
    assert two.points("stopped") == EVERY_POINT


def test_a_damaged_checkpoint_falls_back(two: Runs, undisturbed: str) -> None:
    """The newest one with a flipped byte: said, the one before is taken, and the same bytes come out."""
    job = two.start("damaged")
    two.wait_for_step("damaged", 30)
    job.kill()
    job.communicate()
    newest = sorted(path.parent for path in two.folder("damaged").glob("step-*/state.json"))[-1]
    content = bytearray((newest / STATE_TENSORS).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / STATE_TENSORS).write_bytes(content)
    said = end(two.start("damaged"))
    assert f"warning: {newest}/{STATE_TENSORS} is damaged" in said
    assert f"from step {int(newest.name.removeprefix('step-')) - 10}" in said
    assert two.kept("damaged")[-1]["sha256"] == undisturbed


def test_a_full_disk_stops_no_run(two: Runs, undisturbed: str) -> None:
    """While the run's folder takes no more than a few kilobytes, checkpoints fail and are said; then it goes on.

    The limit on the size of files stands for the full disk: the write of a checkpoint breaks off in the middle.
    """
    job = two.start("full")
    two.wait_for_step("full", 10)
    first = two.workers()[0]
    for worker in two.workers():
        subprocess.run(["prlimit", f"--pid={worker}", "--fsize=100000:unlimited"], check=True)
    follow(job, "warning: a checkpoint was not kept")
    for worker in two.workers():
        subprocess.run(["prlimit", f"--pid={worker}", "--fsize=unlimited:unlimited"], check=True)
    end(job)
    assert first not in two.workers()
    assert two.kept("full")[-1]["sha256"] == undisturbed


@pytest.mark.parametrize("harm", ["delete", "flip"])
def test_a_harmed_shard_ends_the_run_with_one_sentence(two: Runs, harm: str) -> None:
    """A shard that is deleted, or of which one byte is flipped, ends it at once, with shard and clip; no restarts."""
    shutil.copytree(two.home / "data", two.home / harm)
    job = two.start(harm, data=harm, **{"PYTHONHASHSEED": "0"})
    shard = two.home / harm / "shards" / "0000.arrow"
    if harm == "delete":
        shard.unlink()
    else:
        rows = Manifest.load(str(two.home / harm)).table.to_pylist()
        place = next(row["offset"] for row in rows if row["shard"] == "0000" and not row["held_out"])
        content = bytearray(shard.read_bytes())
        content[place] ^= 1
        shard.write_bytes(content)
    said, _ = job.communicate(timeout=150)
    assert job.returncode == 1, said
    (line,) = {line for line in said.splitlines() if line.startswith("error: ")}
    assert "0000.arrow" in line
    assert ("missing" if harm == "delete" else "is damaged") in line, line
    assert said.count("workers on cpu") <= 1


def test_a_loss_that_is_not_finite_ends_the_run_with_one_sentence(two: Runs) -> None:
    """The step is not taken, nothing is kept of it, and no restart is tried: it would only come again.

    At such a rate the weights may leave what a float can hold while the losses, which see them normalised, are finite.
    """
    job = two.start("nan", "--train.learning-rate", "1e18", "--train.checkpoint-every", "1")
    said, _ = job.communicate(timeout=150)
    assert job.returncode == 1, said
    (line,) = {line for line in said.splitlines() if line.startswith("error: ")}
    ((what, number),) = re.findall(r"(a loss or gradient of|the state after) step (\d+) is not finite", line)
    whole = int(number) - (what == "the state after")
    assert [row["step"] for row in two.kept("nan")][-1:] in ([whole], [])
    assert said.count("workers on cpu") == 1


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Runs]:
    """Two nodes that a test may take away."""
    with Nodes(cpus=[1, 1]) as nodes:
        yield Runs(tmp_path, nodes)


ELASTIC = ("--scaling.min-workers", "1", "--scaling.resize-seconds", "5")


def test_a_lost_node_leaves_a_smaller_run_that_grows_again(growing: Runs) -> None:
    """kill -9 of a raylet: on with one worker; a new node: on with two. No point is missing, and none is double."""
    job = growing.start("elastic", *ELASTIC, "--train.steps", "3000", "--train.checkpoint-every", "50")
    growing.wait_for_step("elastic", 50)
    growing.nodes.kill(0)
    lines = [follow(job, "2 workers on cpu"), follow(job, "1 workers on cpu")]
    growing.nodes.add(1)
    lines.append(follow(job, "2 workers on cpu"))
    job.send_signal(signal.SIGTERM)
    rest, _ = job.communicate(timeout=120)
    assert job.returncode == 143, rest
    starts = [int(step) for line in lines for step in re.findall(r"workers on cpu, .* from step (\d+)", line)]
    assert starts == sorted(starts)
    assert starts[1] >= 50
    steps = growing.points("elastic")
    assert steps == list(range(2, steps[-1] + 1, 2))


def test_an_elastic_run_does_not_wait_for_what_a_killed_one_had(growing: Runs) -> None:
    """After kill -9 of a run that had all nodes another gets them at once; Ray alone would keep them for 180 s."""
    job = growing.start("killed", "--train.steps", "100000")
    growing.wait_for_step("killed", 10)
    job.kill()
    job.communicate()
    job, started = growing.start("next", *ELASTIC, "--train.steps", "100000"), time.monotonic()
    follow(job, "2 workers on cpu")
    assert time.monotonic() - started < 90
    job.kill()
    job.communicate()


def test_an_elastic_run_keeps_room_for_its_evaluation(tmp_path: Path) -> None:
    """On three nodes, one of them for the evaluation: a lost node leaves one worker, and scores go on."""
    with Nodes(cpus=[1, 1, 1]) as nodes:
        runs = Runs(tmp_path, nodes)
        job = runs.start("beside", *ELASTIC, "--train.steps", "100000", "--evaluation.num-cpus", "1")
        follow(job, "2 workers on cpu")
        follow(job, " scores ")
        nodes.kill(0)
        from_step = re.findall(r"from step (\d+)", follow(job, "1 workers on cpu"))
        scored = re.findall(r"step (\d+) scores", follow(job, " scores ", times=2))
        assert int(scored[0]) > int(from_step[0])
        job.kill()
        job.communicate()


def test_a_node_that_will_be_taken_away_is_answered_with_a_checkpoint(growing: Runs) -> None:
    """Drained with 20 s to go, a run of rare checkpoints keeps one within them, and goes on from it with one worker."""
    flags = (*ELASTIC, "--train.steps", "5000", "--train.checkpoint-every", "2500")
    job = growing.start("drained", *flags, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5")
    assert job.stdout is not None
    said: list[str] = []
    for line in job.stdout:
        said.append(line)
        if line.startswith("step 20/"):
            growing.nodes.drain(0, seconds=20)
        if line.startswith("checkpoint of step"):
            growing.nodes.kill(0)  # as announced
        if line.startswith("1 workers on cpu"):
            break
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=120)
    text = "".join(said)
    assert "will be taken away: keeping a checkpoint now" in text, text
    kept = [int(step) for step in re.findall(r"checkpoint of step (\d+) kept", text)]
    assert kept, text  # more than one if Ray starts two workers again before it knows that the node is gone
    assert 20 <= kept[0] <= kept[-1] < 2500
    assert f"from step {kept[-1]}" in said[-1], text


def test_a_tracker_that_is_down_for_a_minute_loses_nothing(two: Runs, tmp_path: Path) -> None:
    """An MLflow server that is killed during the run and comes back after it began anew: all points, each once."""
    from tests.tracking_server import TrackingServer

    with TrackingServer(tmp_path) as server:
        job = two.start("tracked", MLFLOW_TRACKING_URI=server.address)
        two.wait_for_step("tracked", 10)
        server.stop()
        two.wait_for_step("tracked", 30)
        os.kill(two.workers()[0], signal.SIGKILL)  # what was queued in memory is lost with it
        two.wait_for_step("tracked", 50)
        server.start()
        said, _ = job.communicate(timeout=240)
        assert job.returncode == 0, said
        run_id = json.loads((two.folder("tracked") / "run.json").read_text())["run_id"]
        history = MlflowClient(f"sqlite:///{tmp_path}/server.db").get_metric_history(run_id, "loss")
    assert sorted(point.step for point in history) == EVERY_POINT
