"""What a run reserves in the cluster: checked before the run begins, and kept up to date in Ray's coordinator.

Ray's autoscaling coordinator keeps the request of each run of Ray Train. An elastic run gets as many workers as fit
beside the earlier requests. Two things would go wrong without this file:

- The coordinator keeps the request of a killed run for three minutes. Until then, an elastic run on the same nodes
  would get no workers. So the next run cancels the request.
- The coordinator does not know the evaluation. A run that has lost a node would wait for ever for workers that do not
  fit beside the evaluation. So this file requests the evaluation's resources too.

A run of a fixed size sends no request: Ray starts its workers as soon as they fit.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType

import ray
import ray.exceptions
import ray.util
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from vmoco import ray_internals
from vmoco.config import PretrainSettings
from vmoco.places import GPU_SHARE, EvaluationSettings, ScoringDevice

NAMESPACE = "vmoco"
"""Ray's namespace of our named actors, and of our records in the store of Ray's head."""
_REQUEST_SECONDS = 60.0  # the coordinator forgets a request after this time
_RENEW_SECONDS = 15.0
_ANSWER_SECONDS = 5.0
# `check_capacity` has counted the evaluation's resources: they become free within this time or never.
_RESERVE_SECONDS = 60.0
_NODES_SECONDS = 3600.0  # if an autoscaler has to add the node first


def resources(settings: EvaluationSettings) -> dict[str, float]:
    """Resources that the evaluation needs; empty if it shares those of the workers."""
    gpus = {"gpu": 1.0, "shared-gpu": GPU_SHARE}
    wanted = {"CPU": float(settings.num_cpus), "GPU": gpus.get(settings.device, 0.0)}
    return {name: number for name, number in wanted.items() if number and settings.enabled}


def worker_resources(settings: PretrainSettings) -> dict[str, float]:
    """Resources that Ray gives to each worker: it leaves the evaluation its part of a GPU that both use."""
    worker = _worker(settings)
    if "GPU" in worker and settings.evaluation.enabled and settings.evaluation.device == "shared-gpu":
        worker["GPU"] -= GPU_SHARE
    return worker


def reserve(settings: EvaluationSettings, *, timeout: float) -> PlacementGroup | None:
    """Reserves the evaluation's resources for the run's lifetime, so that no worker, also no elastic one, takes them.

    Raises:
        ValueError: no node has them free within `timeout` seconds.
    """
    wanted = resources(settings)
    if not wanted:
        return None
    group = placement_group([wanted])
    if not group.wait(timeout):
        ray.util.remove_placement_group(group)
        raise ValueError(
            f"no node has {_as_text(wanted)} free for the evaluation of checkpoints (--evaluation.num-cpus "
            f"{settings.num_cpus}, --evaluation.device {settings.device}): lower --evaluation.num-cpus (0 shares the "
            "CPUs of the workers), choose another --evaluation.device, set --evaluation.no-enabled, or add nodes"
        )
    return group


class Reservation:
    """The resources that a run holds and requests in the cluster; a context manager that releases them.

    Args:
        settings: of the run.

    Attributes:
        holder: name, in `NAMESPACE`, of an actor that must live as long as the run does.
        evaluation: resources reserved for the evaluation, from entering on; None if it shares those of the workers.

    Raises:
        ValueError: on entering: no node has the evaluation's resources free.
    """

    def __init__(self, settings: PretrainSettings) -> None:
        self.holder = f"run-{uuid.uuid4().hex}"
        self.evaluation: PlacementGroup | None = None
        self._settings = settings
        self._recorded: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="reservation", daemon=True)

    def __enter__(self) -> Reservation:
        cancel_dead()
        waits = self._settings.scaling.wait_for_nodes
        self.evaluation = reserve(self._settings.evaluation, timeout=_NODES_SECONDS if waits else _RESERVE_SECONDS)
        if self.evaluation is not None:
            self.record(self._evaluation_name)
            self._ask()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        for requester in self._recorded:
            _cancel(requester)
        if self.evaluation is not None:
            ray.util.remove_placement_group(self.evaluation)

    def record(self, requester: str) -> None:
        """Records the name under which this run sends requests to the coordinator, so that a later run finds it."""
        self._recorded.append(requester)
        ray_internals.put_record(requester, self.holder, namespace=NAMESPACE)

    @property
    def _evaluation_name(self) -> str:
        return f"evaluation-{self.holder}"

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError):  # the head does not answer: try again next time
                self._ask()

    def _ask(self) -> None:
        """Requests what the evaluation already has, so that the coordinator gives it to no elastic run."""
        assert self.evaluation is not None, "the evaluation has its own resources"
        bundle = self.evaluation.bundle_specs[0] | _node_of(self.evaluation)
        ray_internals.request_resources(self._evaluation_name, bundle, seconds=_REQUEST_SECONDS)


def cancel_dead() -> None:
    """Cancels the requests of runs that have ended and could not cancel them."""
    alive = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    for requester, holder in ray_internals.records(namespace=NAMESPACE).items():
        if holder not in alive:
            _cancel(requester)


def _cancel(requester: str) -> None:
    with contextlib.suppress(ray.exceptions.RayError):  # then the coordinator forgets the request after its own time
        ray_internals.cancel_request(requester, timeout=_ANSWER_SECONDS)
        # After the request: if this process dies in between, the next run still finds the record.
        ray_internals.delete_record(requester, namespace=NAMESPACE)


def _node_of(group: PlacementGroup) -> dict[str, float]:
    """A little of the resource that only the group's node has: without it, Ray would assume the largest node."""
    place = placement_group_table(group)["bundles_to_node_id"].get(0)
    found = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] == place]
    return {f"node:{node['NodeManagerAddress']}": 0.001 for node in found}


def fit_to_cluster(
    settings: PretrainSettings, nodes: Sequence[Mapping[str, float]]
) -> tuple[PretrainSettings, list[str]]:
    """The settings with devices and a number of workers, where these depend on the cluster; and lines that say them.

    Args:
        settings: of the run.
        nodes: resources of each, such as {"CPU": 8.0, "GPU": 1.0}.

    Raises:
        ValueError: the nodes that an autoscaler will add are not known; or a number that does not fit was chosen.
    """
    fitted, lines = _fit_workers(settings, nodes)
    if fitted.evaluation.enabled and fitted.evaluation.device == "shared-gpu" and not fitted.scaling.use_gpu:
        raise ValueError(
            "--evaluation.device shared-gpu is the GPU of a worker, and workers compute on CPUs: choose "
            "--evaluation.device cpu or gpu, or --scaling.device gpu"
        )
    if fitted.evaluation.device != "auto" or not fitted.evaluation.enabled:
        return fitted, lines
    if not fitted.scaling.use_gpu:
        return _scored_on(fitted, "cpu"), lines
    alone = _scored_on(fitted, "gpu")
    fits = _most_workers(nodes, _worker(alone), resources(alone.evaluation))
    if not fitted.scaling.wait_for_nodes and fits >= fitted.scaling.num_workers:
        return alone, [*lines, "--evaluation.device gpu: checkpoints are scored on a GPU that no worker uses"]
    return _scored_on(fitted, "shared-gpu"), [
        *lines,
        "--evaluation.device shared-gpu: checkpoints are scored on a worker's GPU, which slows the workers meanwhile",
    ]


def _fit_workers(
    settings: PretrainSettings, nodes: Sequence[Mapping[str, float]]
) -> tuple[PretrainSettings, list[str]]:
    """A device and a number of workers. The evaluation takes no GPU from the workers unless it was told to."""
    scaling = settings.scaling
    if scaling.device != "auto" and scaling.num_workers:
        return settings, []
    if scaling.wait_for_nodes:
        raise ValueError(
            "--scaling.wait-for-nodes does not know which nodes will come: give --scaling.device and "
            "--scaling.num-workers"
        )
    device, idle = scaling.device, ""
    if device == "auto":
        device = "gpu" if any(node.get("GPU", 0.0) >= 1 for node in nodes) else "cpu"
    chosen = settings.model_copy(update={"scaling": scaling.model_copy(update={"device": device})})
    number = scaling.num_workers
    if not number:
        fits = _most_workers(nodes, _worker(chosen), resources(settings.evaluation))
        number = max(1, min(fits, settings.num_micro_batches), scaling.min_workers or 1)
        if fits > number:
            idle = f" of {fits} that fit: a smaller --train.micro-batch {settings.train.micro_batch} allows more"
    values = chosen.model_dump()
    values["scaling"]["num_workers"] = number
    what = "GPUs of the cluster" if device == "gpu" else "CPUs, because the cluster has no GPU"
    given = "" if device == scaling.device else f"--scaling.device {device}: workers compute on the {what}; "
    return PretrainSettings(**values), [f"{given}--scaling.num-workers {number}{idle}"]


def _scored_on(settings: PretrainSettings, device: ScoringDevice) -> PretrainSettings:
    return settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"device": device})})


def alive_nodes() -> list[dict[str, float]]:
    """Resources of each node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_capacity(settings: PretrainSettings) -> None:
    """Checks that the cluster can hold the workers and the evaluation, because Ray would wait for them without end.

    Raises:
        ValueError: the cluster cannot hold them.
    """
    if settings.scaling.wait_for_nodes:
        return
    if problem := shortage(settings, alive_nodes()):
        raise ValueError(problem)


def shortage(settings: PretrainSettings, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why empty nodes cannot hold a run's fewest workers and its evaluation, as an error message; None if they can.

    Args:
        settings: of the run.
        nodes: resources of each, such as {"CPU": 8.0, "GPU": 1.0}.
    """
    scaling, beside = settings.scaling, resources(settings.evaluation)
    worker = _worker(settings)
    wanted = scaling.min_workers or scaling.num_workers
    if _most_workers(nodes, worker, beside) >= wanted:
        return None
    extra = f" and its evaluation {_as_text(beside)}" if beside else ""
    there = ", ".join(_as_text({name: node.get(name, 0.0) for name in worker | beside}) for node in nodes) or "none"
    return (
        f"a run of {wanted} workers, which need {_as_text(worker)} each{extra}, does not fit on the nodes of the "
        f"cluster ({there}): lower --scaling.num-workers, --scaling.cpus-per-worker or --evaluation.num-cpus, add "
        "nodes, or set --scaling.wait-for-nodes where an autoscaler adds them"
    )


def trials_at_once(settings: Sequence[PretrainSettings], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials the nodes hold at once, counting the largest trial with all its workers; at least one.

    With one trial more, Ray would wait for ever for its workers.

    Args:
        settings: of the trials.
        nodes: resources of each node.

    Raises:
        ValueError: the nodes cannot hold one trial, and it does not wait for more nodes.
    """
    for each in settings:
        if not each.scaling.wait_for_nodes and (problem := shortage(each, nodes)):
            raise ValueError(problem)
    return max(1, min(_copies(each, nodes) for each in settings))


def _worker(settings: PretrainSettings) -> dict[str, float]:
    scaling = settings.scaling
    return {"CPU": float(scaling.cpus_per_worker)} | ({"GPU": 1.0} if scaling.use_gpu else {})


def _most_workers(
    nodes: Sequence[Mapping[str, float]], worker: Mapping[str, float], beside: Mapping[str, float]
) -> int:
    """Most workers that fit if the evaluation gets the best node for it; -1 if the evaluation fits on no node."""
    counts = [_count(node, worker) for node in nodes]
    if not beside:
        return sum(counts)
    left = [_left(node, beside) for node in nodes]
    return max((sum(counts) - counts[at] + _count(rest, worker) for at, rest in enumerate(left) if rest), default=-1)


def _count(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    return int(min(node.get(name, 0.0) // number for name, number in worker.items()))


def _copies(settings: PretrainSettings, nodes: Sequence[Mapping[str, float]]) -> int:
    """How often all workers and the evaluation of one trial fit on the nodes."""
    # The evaluation first: a share of a GPU is on one that a worker takes afterwards.
    bundles = [each for each in [resources(settings.evaluation)] if each]
    bundles += [_worker(settings)] * settings.scaling.num_workers
    free = [dict(node) for node in nodes]
    count = 0
    while all(_take(bundle, free) for bundle in bundles):
        count += 1
    return count


def _take(bundle: Mapping[str, float], free: list[dict[str, float]]) -> bool:
    for at, node in enumerate(free):
        if rest := _left(node, bundle):
            free[at] = rest
            return True
    return False


def _left(node: Mapping[str, float], bundle: Mapping[str, float]) -> dict[str, float] | None:
    """What is left of a node's resources beside a bundle; None if the bundle does not fit.

    A share of a GPU is on a GPU that a worker takes: the node must have one, and keeps it.
    """
    if any(node.get(name, 0.0) < (1.0 if number == GPU_SHARE else number) for name, number in bundle.items()):
        return None
    taken = {name: number for name, number in bundle.items() if number != GPU_SHARE}
    return {name: number - taken.get(name, 0.0) for name, number in node.items()}


def _as_text(wanted: Mapping[str, float]) -> str:
    return " + ".join(f"{number:g} {name}" for name, number in wanted.items())
