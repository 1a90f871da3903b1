"""A run that finds no room is refused before it begins, and what it has asked Ray for does not outlive it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.train.test_step import changed
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
        ({"num_workers": 1, "use_gpu": True}, 0, [4], False),
        ({"num_workers": 1}, 0, [], False),
    ],
)
def test_a_run_fits_node_by_node(scaling: dict[str, Any], evaluation_cpus: int, nodes: list[int], fits: bool) -> None:
    """Not by sums alone: a worker, and the evaluation, need all that they need on one node."""
    from vmoco.cluster.reservation import lacking

    settings = changed(SETTINGS, scaling=scaling, evaluation={"num_cpus": evaluation_cpus})
    problem = lacking(settings, [{"CPU": float(cpus), "memory": 1e9} for cpus in nodes])
    assert (problem is None) == fits, problem


def test_what_does_not_fit_is_said() -> None:
    """How many workers of what, beside what, on which nodes, and what to change."""
    from vmoco.cluster.reservation import lacking

    settings = changed(SETTINGS, scaling={"num_workers": 2, "cpus_per_worker": 3}, evaluation={"num_cpus": 1})
    assert lacking(settings, [{"CPU": 4.0}, {"CPU": 2.0}]) == (
        "a run of 2 workers, which need 3 CPU each and its evaluation 1 CPU, does not fit on the nodes of the cluster "
        "(4 CPU, 2 CPU): lower scaling.num-workers, scaling.cpus-per-worker or evaluation.num-cpus, add nodes, or set "
        "scaling.wait-for-nodes where an autoscaler adds them"
    )


def reserved(requester: str) -> float:
    """CPUs that Ray's coordinator has set aside for a requester."""
    import ray

    coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    found = ray.get(coordinator.get_reserved_resources.remote(requester))
    return sum(float(node.get("CPU", 0.0)) for node in found.values())


def test_what_a_dead_run_has_asked_for_is_struck_out(ray_cluster: LocalCluster) -> None:
    """While its holder lives it stands, also when others come and go; when the holder is dead the next one ends it."""
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    from vmoco.cluster.reservation import NAMESPACE, Room
    from vmoco.train.channel import Channel

    dead = Room(SETTINGS)  # never left, as by a process that is killed
    channel = Channel.options(name=dead.holder, namespace=NAMESPACE).remote()  # type: ignore[attr-defined]
    ray.get(channel.error.remote())
    ask = get_or_create_autoscaling_coordinator().request_resources
    ray.get(ask.remote(requester_id="train-dead", resources=[{"CPU": 1}], expire_after_s=600))
    dead.note("train-dead")
    with Room(SETTINGS):
        assert reserved("train-dead") == 1
    ray.kill(channel)
    end = time.monotonic() + 20
    while reserved("train-dead") and time.monotonic() < end:
        with Room(SETTINGS):
            time.sleep(0.2)
    assert reserved("train-dead") == 0


def test_the_evaluation_is_counted_while_the_run_lasts(ray_cluster: LocalCluster) -> None:
    """Its CPU is set aside in Ray's books from entering to leaving, so no elastic run counts on it."""
    from vmoco.cluster.reservation import Room

    with Room(changed(SETTINGS, evaluation={"num_cpus": 1})) as room:
        assert room.evaluation is not None
        assert reserved(f"evaluation-{room.holder}") == 1
    assert reserved(f"evaluation-{room.holder}") == 0
