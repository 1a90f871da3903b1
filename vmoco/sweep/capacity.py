"""How many trials a cluster holds at once: Ray would wait for ever for the workers of one more."""

from __future__ import annotations

from collections.abc import Sequence

from vmoco.config import PretrainSettings
from vmoco.train.evaluation import resources


def capacity(settings: Sequence[PretrainSettings], nodes: Sequence[dict[str, float]]) -> int:
    """Trials that the nodes hold at once, counting the largest trial.

    Args:
        settings: of the trials.
        nodes: resources of each node.

    Raises:
        ValueError: they do not hold one.
    """
    return min(_capacity(each, nodes) for each in settings)


def _capacity(settings: PretrainSettings, nodes: Sequence[dict[str, float]]) -> int:
    scaling = settings.scaling
    worker = {"CPU": float(scaling.cpus_per_worker)} | ({"GPU": 1.0} if scaling.use_gpu else {})
    bundles = [worker] * scaling.num_workers + [each for each in [resources(settings.evaluation)] if each]
    free = [dict(node) for node in nodes]
    count = 0
    while all(_take(bundle, free) for bundle in bundles):
        count += 1
    if count == 0:
        largest = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")}
        raise ValueError(
            f"a trial needs {scaling.num_workers} workers of {_words(worker)} each"
            + (f" and {_words(bundles[-1])} for the evaluation" if len(bundles) > scaling.num_workers else "")
            + f", and {len(nodes)} nodes of at most {_words(largest)} do not hold it: lower scaling.num-workers, "
            "scaling.cpus-per-worker or evaluation.num-cpus, or add nodes"
        )
    return count


def _take(bundle: dict[str, float], free: list[dict[str, float]]) -> bool:
    for node in free:
        if all(node.get(name, 0.0) >= number for name, number in bundle.items()):
            for name, number in bundle.items():
                node[name] -= number
            return True
    return False


def _words(bundle: dict[str, float]) -> str:
    return " and ".join(f"{number:g} {name}" for name, number in bundle.items())
