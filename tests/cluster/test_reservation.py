"""A run that does not fit is refused before it begins, and its requests to Ray end with it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.train.test_step import changed
from vmoco import ray_internals
from vmoco.cluster.local import LocalCluster
from vmoco.presets import PRESETS

pytestmark = pytest.mark.cluster

SETTINGS = PRESETS["tiny"][1]


@pytest.mark.parametrize(
    ("scaling", "evaluation_cpus", "nodes", "fits"),
    [
        ({"num_workers": 2}, 0, [1, 1], True),
        ({"num_workers": 2}, 0, [1], False),
        ({"num_workers": 2, "min_workers": 1}, 0, [1], True),
        ({"num_workers": 2, "cpus_per_worker": 3}, 0, [4, 2], False),  # six CPUs, of which no node has two times three
        ({"num_workers": 2}, 1, [1, 1], False),
        ({"num_workers": 2, "min_workers": 1}, 1, [1, 1], True),
        ({"num_workers": 1, "cpus_per_worker": 4}, 2, [4, 2], True),  # the evaluation goes to the smaller node
        ({"num_workers": 1, "cpus_per_worker": 4}, 3, [4, 2], False),
        ({"num_workers": 1}, 3, [2, 2], False),  # no node can hold the evaluation
        ({"num_workers": 1, "device": "gpu"}, 0, [4], False),
        ({"num_workers": 1}, 0, [], False),
    ],
)
def test_a_run_fits_node_by_node(scaling: dict[str, Any], evaluation_cpus: int, nodes: list[int], fits: bool) -> None:
    """Sums do not decide: each worker, and the evaluation, needs one node that has everything it needs."""
    from vmoco.cluster.reservation import shortage

    settings = changed(SETTINGS, scaling=scaling, evaluation={"num_cpus": evaluation_cpus})
    problem = shortage(settings, [{"CPU": float(cpus), "memory": 1e9} for cpus in nodes])
    assert (problem is None) == fits, problem


def test_the_message_says_what_does_not_fit() -> None:
    """The message has the workers and their needs, the evaluation, the nodes, and what to change."""
    from vmoco.cluster.reservation import shortage

    settings = changed(SETTINGS, scaling={"num_workers": 2, "cpus_per_worker": 3}, evaluation={"num_cpus": 1})
    assert shortage(settings, [{"CPU": 4.0}, {"CPU": 2.0}]) == (
        "a run of 2 workers, which need 3 CPU each and its evaluation 1 CPU, does not fit on the nodes of the cluster "
        "(4 CPU, 2 CPU): lower --scaling.num-workers, --scaling.cpus-per-worker or --evaluation.num-cpus, add nodes, "
        "or set --scaling.wait-for-nodes where an autoscaler adds them"
    )


GPUS = [{"CPU": 16.0, "GPU": 8.0}, {"CPU": 4.0}]


@pytest.mark.parametrize(
    ("scaling", "evaluation_cpus", "nodes", "device", "workers"),
    [
        ({}, 0, [{"CPU": 2.0}], "cpu", 2),
        ({}, 1, [{"CPU": 2.0}], "cpu", 1),  # the evaluation takes a core
        ({}, 0, [{"CPU": 64.0}], "cpu", 8),  # as many as there are micro-batches
        ({"cpus_per_worker": 3}, 0, [{"CPU": 4.0}, {"CPU": 7.0}], "cpu", 3),
        ({}, 4, [{"CPU": 1.0}], "cpu", 1),  # too small: refused later, with what is missing
        ({}, 4, GPUS, "gpu", 8),
        ({"device": "cpu"}, 4, GPUS[1:], "cpu", 1),
        ({"device": "gpu"}, 0, [{"CPU": 4.0}], "gpu", 1),
        ({"num_workers": 3}, 0, GPUS, "gpu", 3),
        ({"min_workers": 2}, 0, [{"CPU": 1.0}], "cpu", 2),
    ],
)
def test_a_run_takes_what_the_cluster_has(
    scaling: dict[str, Any], evaluation_cpus: int, nodes: list[dict[str, float]], device: str, workers: int
) -> None:
    """GPUs if there are any, as many workers as fit, and a line that says so; fitted twice it is the same."""
    from vmoco.cluster.reservation import fit_to_cluster

    settings = changed(PRESETS["recommended"][1], scaling=scaling, evaluation={"num_cpus": evaluation_cpus})
    fitted, (line, *_) = fit_to_cluster(settings, nodes)
    assert (fitted.scaling.device, fitted.scaling.num_workers) == (device, workers)
    assert f"--scaling.num-workers {workers}" in line
    assert ("of 64 that fit: a smaller --train.micro-batch 32 allows more" in line) == (nodes == [{"CPU": 64.0}])
    assert line.startswith(f"--scaling.device {device}: workers compute on") == ("device" not in scaling)
    assert fit_to_cluster(fitted, nodes) == (fitted, [])


@pytest.mark.parametrize(
    ("scaling", "given", "nodes", "device", "workers"),
    [
        ({}, {}, GPUS, "shared-gpu", 8),  # all GPUs train
        ({"num_workers": 7}, {}, GPUS, "gpu", 7),
        ({"num_workers": 8}, {}, [*GPUS, {"CPU": 4.0, "GPU": 1.0}], "gpu", 8),
        ({"num_workers": 8, "min_workers": 4, "device": "gpu"}, {}, GPUS, "shared-gpu", 8),
        ({"num_workers": 8, "device": "gpu", "wait_for_nodes": True}, {}, [], "shared-gpu", 8),
        ({"num_workers": 7}, {"device": "cpu"}, GPUS, "cpu", 7),
        ({}, {"device": "gpu"}, GPUS, "gpu", 7),
        ({"device": "cpu"}, {}, [{"CPU": 8.0}], "cpu", 7),
    ],
)
def test_scores_use_a_gpu_that_is_free_or_share_one(
    scaling: dict[str, Any], given: dict[str, Any], nodes: list[dict[str, float]], device: str, workers: int
) -> None:
    """No worker loses its GPU to the scores, which take a free one, unless it was asked for; a line says so."""
    from vmoco.cluster.reservation import fit_to_cluster, resources, shortage, worker_resources

    settings = changed(PRESETS["recommended"][1], scaling=scaling, evaluation={"num_cpus": 1, **given})
    fitted, lines = fit_to_cluster(settings, nodes)
    assert (fitted.evaluation.device, fitted.scaling.num_workers) == (device, workers)
    assert any(line.startswith(f"--evaluation.device {device}") for line in lines) == (not given and device != "cpu")
    assert shortage(fitted, nodes or GPUS) is None
    shares = [worker_resources(fitted).get("GPU", 0.0), resources(fitted.evaluation).get("GPU", 0.0)]
    assert (
        shares == {"cpu": [float(fitted.scaling.use_gpu), 0.0], "gpu": [1.0, 1.0], "shared-gpu": [0.98, 0.02]}[device]
    )


def test_a_share_of_a_gpu_needs_a_worker_with_one() -> None:
    """On CPUs there is nothing to share, and a node without a GPU cannot hold the evaluation."""
    from vmoco.cluster.reservation import fit_to_cluster, shortage, trials_at_once

    settings = changed(SETTINGS, evaluation={"num_cpus": 1, "device": "shared-gpu"})
    with pytest.raises(
        ValueError, match=r"--evaluation\.device shared-gpu is the GPU of a worker, and workers compute on"
    ):
        fit_to_cluster(settings, [{"CPU": 4.0}])
    shared = changed(settings, scaling={"device": "gpu", "num_workers": 2})
    assert shortage(shared, [{"CPU": 2.0, "GPU": 2.0}, {"CPU": 8.0}]) is not None  # no CPU beside the GPUs
    assert shortage(shared, [{"CPU": 3.0, "GPU": 2.0}]) is None
    assert trials_at_once([shared], [{"CPU": 64.0, "GPU": 8.0}]) == 4


_SHARES = """
import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Within

from tests.cluster.test_reservation import SETTINGS, changed
from vmoco.cluster.reservation import resources, worker_resources

settings = changed(SETTINGS, evaluation={"device": "shared-gpu"}, scaling={"device": "gpu", "num_workers": 2})
ray.init(num_cpus=8, num_gpus=2, include_dashboard=False)
scores, workers = placement_group([resources(settings.evaluation)]), placement_group([worker_resources(settings)] * 2)
ray.get([scores.ready(), workers.ready()], timeout=60)
ids = ray.remote(lambda: ray.get_runtime_context().get_accelerator_ids()["GPU"])
asked = [
    ids.options(
        num_cpus=bundle.get("CPU", 0), num_gpus=bundle["GPU"], scheduling_strategy=Within(group, at)
    ).remote()
    for group, at, bundle in [
        (scores, 0, resources(settings.evaluation)), *((workers, at, worker_resources(settings)) for at in range(2))
    ]
]
print("ids", *(gpu for (gpu,) in ray.get(asked, timeout=60)))
third = placement_group([worker_resources(settings)])
print("third", third.wait(3))
"""


@pytest.mark.slow
def test_ray_gives_each_worker_a_gpu_and_the_evaluation_a_part_of_one() -> None:
    """On two GPUs that Ray only counts: no two workers share one, and there is no place for a third worker."""
    done = subprocess.run(
        [sys.executable, "-c", _SHARES],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "0,1", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("ids", "third"))]
    (scores, *workers), (third,) = lines
    assert sorted(workers) == ["0", "1"]
    assert scores in workers
    assert third == "False"


def test_nodes_that_are_to_come_are_not_guessed() -> None:
    """An autoscaler may add any node."""
    from vmoco.cluster.reservation import fit_to_cluster

    waiting = changed(PRESETS["recommended"][1], scaling={"wait_for_nodes": True})
    with pytest.raises(ValueError, match=r"--scaling\.wait-for-nodes .*: give --scaling\.device and --scaling\.num-w"):
        fit_to_cluster(waiting, [{"CPU": 1.0}])


@pytest.mark.parametrize(
    ("scaling", "evaluation_cpus", "nodes", "expected"),
    [
        ({"num_workers": 2}, 0, [2], 1),
        ({"num_workers": 2}, 0, [8], 4),
        ({"num_workers": 2}, 1, [8], 2),
        ({"num_workers": 2, "cpus_per_worker": 3}, 0, [4, 4, 4], 1),
        ({"num_workers": 2, "min_workers": 1}, 0, [1], 1),
        ({"num_workers": 2, "wait_for_nodes": True}, 0, [], 1),
    ],
)
def test_trials_at_once(scaling: dict[str, object], evaluation_cpus: int, nodes: list[int], expected: int) -> None:
    """Workers and evaluation each fit a node; elastic trials and those that wait for nodes get their turn alone."""
    from vmoco.cluster.reservation import trials_at_once

    settings = changed(SETTINGS, scaling=scaling, evaluation={"num_cpus": evaluation_cpus})
    assert trials_at_once([settings], [{"CPU": float(cpus)} for cpus in nodes]) == expected


def test_a_trial_that_fits_nowhere_is_refused() -> None:
    """Four cores on one node are asked for, and there are two and two."""
    from vmoco.cluster.reservation import trials_at_once

    settings = changed(SETTINGS, scaling={"cpus_per_worker": 4})
    with pytest.raises(ValueError, match="a run of 1 workers, which need 4 CPU each"):
        trials_at_once([settings], [{"CPU": 2.0}, {"CPU": 2.0}])


def reserved(requester: str) -> float:
    """CPUs that Ray's coordinator has reserved for a requester."""
    found = ray_internals.reserved_resources(requester, timeout=20)
    return sum(float(node.get("CPU", 0.0)) for node in found.values())


def test_the_request_of_a_dead_run_is_cancelled(ray_cluster: LocalCluster) -> None:
    """A request stays while its holder lives. When the holder is dead, the next run cancels the request."""
    import ray

    from vmoco.cluster.reservation import NAMESPACE, Reservation
    from vmoco.train.channel import Channel

    dead = Reservation(SETTINGS)  # never left, as by a process that is killed
    channel = Channel.options(name=dead.holder, namespace=NAMESPACE).remote()  # type: ignore[attr-defined]
    ray.get(channel.error.remote())
    ray_internals.request_resources("train-dead", {"CPU": 1}, seconds=600)
    dead.record("train-dead")
    with Reservation(SETTINGS):
        assert reserved("train-dead") == 1
    ray.kill(channel)
    end = time.monotonic() + 20
    while reserved("train-dead") and time.monotonic() < end:
        with Reservation(SETTINGS):
            time.sleep(0.2)
    assert reserved("train-dead") == 0


def test_the_evaluation_is_counted_while_the_run_lasts(ray_cluster: LocalCluster) -> None:
    """Ray's coordinator reserves its CPU while the context is open, so no elastic run plans with it."""
    from vmoco.cluster.reservation import Reservation

    with Reservation(changed(SETTINGS, evaluation={"num_cpus": 1})) as reservation:
        assert reservation.evaluation is not None
        assert reserved(f"evaluation-{reservation.holder}") == 1
    assert reserved(f"evaluation-{reservation.holder}") == 0
