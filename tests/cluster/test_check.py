"""What differs or fails on a cluster gives a message with the node, the value and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.test_step import changed
from vmoco.cluster.check import NodeReport, estimate, find_problems, skew
from vmoco.cluster.gpus import Gpu
from vmoco.cluster.local import LocalCluster
from vmoco.model.cost import GPU_PROCESS_BYTES, Speed
from vmoco.presets import PRESETS

ROOT = Path(__file__).parents[2]
SERVER = "https://gateway:5443"
VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.14.1", "vmoco": "aaaa"}
GOOD = NodeReport(
    address="192.0.2.10",
    versions=VERSIONS,
    num_cpus=8,
    memory_bytes=2**35,
    gpus=(),
    clock=1000.0,
    asked=1000.0,
    answered=1000.0,
    shared_memory_bytes=2**32,
)
OTHER = replace(GOOD, address="192.0.2.11", clock=1000.3, asked=1000.2, answered=1000.4)


def test_equal_nodes_have_no_problem() -> None:
    """Nodes that agree, with a server as tracker, have no problem; one node may use a database file."""
    settings = PRESETS["tiny"][1]
    assert find_problems(settings, [GOOD, OTHER], tracker=SERVER) == []
    assert find_problems(settings, [GOOD], tracker="sqlite:////home/mlflow.db") == []


def test_a_slow_start_is_no_wrong_clock() -> None:
    """A clock is wrong only if the time between question and answer cannot explain the difference."""
    slow = replace(OTHER, clock=1008.0, asked=1000.2, answered=1009.0)  # its worker took 8 s to start
    assert find_problems(PRESETS["tiny"][1], [GOOD, slow], tracker=SERVER) == []
    assert find_problems(PRESETS["tiny"][1], [slow, GOOD], tracker=SERVER) == []
    assert skew(replace(slow, clock=1099.0), GOOD) == pytest.approx(90.0)
    assert skew(GOOD, replace(slow, clock=1099.0)) == pytest.approx(-90.0)
    assert skew(replace(slow, clock=910.2), GOOD) == pytest.approx(-90.0)


@pytest.mark.parametrize(
    ("node", "tracker", "message"),
    [
        (
            {"versions": VERSIONS | {"torch": "2.13.0"}},
            SERVER,
            "node 192.0.2.11 has torch 2.13.0, node 192.0.2.10 has 2.14.1: install requirements.lock on both",
        ),
        (
            {"versions": VERSIONS | {"vmoco": "bbbb"}},
            SERVER,
            "node 192.0.2.11 has vmoco bbbb, node 192.0.2.10 has aaaa",
        ),
        (
            {"clock": 1090.0},
            SERVER,
            "the clock of node 192.0.2.11 differs by +90 s from that of node 192.0.2.10: set both",
        ),
        (
            {"shared_memory_bytes": 64 * 2**20},
            SERVER,
            "node 192.0.2.11 has 64 MiB of /dev/shm, and Ray's object store needs",
        ),
        (
            {"problems": {"data.uri": "there is no s3://vmoco/data"}},
            SERVER,
            "node 192.0.2.11: data.uri: there is no s3://vmoco/data",
        ),
        (
            {},
            "sqlite:////home/mlflow.db",
            "is a file of one machine, and the cluster has 2 nodes: set MLFLOW_TRACKING_URI",
        ),
    ],
)
def test_what_is_wrong_with_a_node_is_one_message(node: dict[str, object], tracker: str, message: str) -> None:
    """The message has the node, the value and what to do, on one line."""
    (problem,) = find_problems(PRESETS["tiny"][1], [GOOD, replace(OTHER, **node)], tracker=tracker)  # type: ignore[arg-type]
    assert message in problem
    assert "\n" not in problem


def test_time_follows_the_measured_speed_and_memory_the_smallest_gpu() -> None:
    """Twice the speed halves the time; for a GPU that is too small, the message names what to lower."""
    settings = PRESETS["paper"][1]
    slow, _ = estimate(settings, Speed(40e12, bf16=True), gpu_bytes=80 * 2**30)
    fast, _ = estimate(settings, Speed(80e12, bf16=True), gpu_bytes=80 * 2**30)
    # 187,500 steps of 256 clips, half of them with 4 forwards and half with 6, of 162 GFLOP each, on 8 workers.
    hours = 187_500 * 256 * 5 * 162.1e9 / 8 / 40e12 / 3600
    assert f"about {hours / 24:.0f} days" in slow[-1] or f"about {hours:.1f} hours" in slow[-1]
    assert slow[-1] != fast[-1]
    lines, problems = estimate(settings, None, gpu_bytes=8 * 2**30)
    assert "of each worker's GPU with CUDA, NCCL and cuDNN, and" in lines[2]
    assert len(problems) == 1
    assert "the smallest GPU has 8.0: lower --train.micro-batch 32" in problems[0]
    _, problems = estimate(changed(settings, train={"micro_batch": 8}), None, gpu_bytes=8 * 2**30)
    assert problems == []


def test_an_evaluation_on_a_workers_gpu_counts_its_memory() -> None:
    """It is a second process on that GPU, with a CUDA context of its own."""
    alone = changed(PRESETS["paper"][1], evaluation={"device": "gpu"})
    shared = changed(alone, evaluation={"device": "shared-gpu"})
    needed = []
    for settings in (alone, shared):
        (problem,) = estimate(settings, None, gpu_bytes=2**30)[1]
        needed.append(float(problem.split("about ")[1].split(" GiB")[0]))
    assert needed[1] - needed[0] == pytest.approx(GPU_PROCESS_BYTES / 2**30, abs=0.11)


def test_a_node_that_cannot_compile_is_named_where_the_run_compiles() -> None:
    """Torch compiles kernels with the C compiler of the node; nodes without GPUs do not train a run on GPUs."""
    gpu = Gpu("H100", 80 * 2**30, "GPU-1")
    bare = replace(OTHER, has_compiler=False)
    compiled = changed(PRESETS["tiny"][1], train={"compile": True})
    assert find_problems(PRESETS["tiny"][1], [GOOD, bare], tracker=SERVER) == []
    (problem,) = find_problems(compiled, [GOOD, bare], tracker=SERVER)
    assert problem.startswith(
        "node 192.0.2.11 has no C compiler, which --train.compile needs: install gcc in its image"
    )
    on_gpus = changed(compiled, scaling={"device": "gpu"})
    assert find_problems(on_gpus, [GOOD, bare], tracker=SERVER) == []
    assert len(find_problems(on_gpus, [GOOD, replace(bare, gpus=(gpu,))], tracker=SERVER)) == 1


def test_a_gpu_that_two_nodes_see_is_a_problem() -> None:
    """Its UUID is the same on both."""
    gpu = Gpu("H100", 80 * 2**30, "GPU-1")
    (problem,) = find_problems(
        PRESETS["tiny"][1], [replace(GOOD, gpus=(gpu,)), replace(OTHER, gpus=(gpu,))], tracker=SERVER
    )
    assert "both see the GPU H100 GPU-1" in problem


@pytest.mark.cluster
def test_a_real_cluster_is_checked(
    local_cluster: LocalCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The check passes for `tiny` on one node, shows a measured time, and leaves nothing in the storage."""
    place = tmp_path / "runs"
    flags = ["--run.storage", str(place), "--scaling.num-workers", "2"]
    assert local_cluster.submit(["python", "jobs/check.py", "cluster", "tiny", *flags], ROOT) == 0
    said = capfd.readouterr().out
    assert "storage and tracker reached" in said
    assert "time: about 0.0 hours for 20 steps; on 2 workers" in said
    assert "the cluster is ready for this run" in said
    assert list(place.iterdir()) == []


@pytest.mark.cluster
def test_a_gpu_preset_on_a_cpu_cluster_is_answered(
    local_cluster: LocalCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A preset for GPUs, on a cluster without, ends with exit code 1 and says what to do."""
    flags = ["--run.storage", str(tmp_path), "--data.uri", str(tmp_path / "none")]
    assert local_cluster.submit(["python", "jobs/check.py", "cluster", "paper", *flags], ROOT) == 1
    said = capfd.readouterr().out
    assert "problem: preset paper needs 8 GPUs and the cluster has none: add GPU nodes" in said
    assert f"data.uri: there is no {tmp_path}/none" in said
    assert os.listdir(tmp_path) == []


def test_a_missing_token_is_answered(tmp_path: Path) -> None:
    """A job that has no token for the cluster of RAY_ADDRESS says so in its last line, and where the token belongs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "jobs/check.py", "cluster", "tiny", "--run.storage", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot connect to the Ray cluster at RAY_ADDRESS 127.0.0.1:1: Token authentication")
    assert "no authentication token was found" in last
    assert "RAY_AUTH_TOKEN_PATH" in last
