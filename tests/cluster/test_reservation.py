"""A run that does not fit is refused before it begins, and its requests to Ray end with it."""

from __future__ import annotations

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
    fitted, (line,) = fit_to_cluster(settings, nodes)
    assert (fitted.scaling.device, fitted.scaling.num_workers) == (device, workers)
    assert f"--scaling.num-workers {workers}" in line
    assert ("of 64 that fit: a smaller --train.micro-batch 32 allows more" in line) == (nodes == [{"CPU": 64.0}])
    assert line.startswith(f"--scaling.device {device}: workers compute on") == ("device" not in scaling)
    assert fit_to_cluster(fitted, nodes) == (fitted, [])


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
