"""How many trials a cluster holds at once: Ray would wait for ever for the workers of one more."""

from __future__ import annotations

from collections.abc import Sequence

from vmoco.config import PretrainSettings
from vmoco.train.evaluation import resources
from vmoco.train.room import lacking


def capacity(settings: Sequence[PretrainSettings], nodes: Sequence[dict[str, float]]) -> int:
    """Trials that the nodes hold at once, counting the largest trial with all its workers; at least one.

    Args:
        settings: of the trials.
        nodes: resources of each node.

    Raises:
        ValueError: they do not hold one, and it does not wait for more.
    """
    for each in settings:
        if not each.scaling.wait_for_nodes and (problem := lacking(each, nodes)):
            raise ValueError(problem)
    return max(1, min(_capacity(each, nodes) for each in settings))


def _capacity(settings: PretrainSettings, nodes: Sequence[dict[str, float]]) -> int:
    scaling = settings.scaling
    worker = {"CPU": float(scaling.cpus_per_worker)} | ({"GPU": 1.0} if scaling.use_gpu else {})
    bundles = [worker] * scaling.num_workers + [each for each in [resources(settings.evaluation)] if each]
    free = [dict(node) for node in nodes]
    count = 0
    while all(_take(bundle, free) for bundle in bundles):
        count += 1
    return count


def _take(bundle: dict[str, float], free: list[dict[str, float]]) -> bool:
    for node in free:
        if all(node.get(name, 0.0) >= number for name, number in bundle.items()):
            for name, number in bundle.items():
                node[name] -= number
            return True
    return False
