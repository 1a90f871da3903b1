"""The room that a run has in the cluster: looked for before it begins, and kept right in Ray's books while it runs.

Ray's autoscaling coordinator writes down what each run of Ray Train asks for, and an elastic run gets as many workers
as fit beside what was asked for before. Two things are wrong in these books. What a killed run has asked for stands in
them for three minutes, so an elastic run on the same nodes gets no workers until then: the next run strikes it out.
And the evaluation is not in them, so a run that has lost a node would wait for ever for workers that find no room
beside it: it is written down. (A run of a fixed size does not ask: Ray starts its workers as soon as they fit.)


How many trials a cluster holds at once: Ray would wait for ever for the workers of one more.
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
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from vmoco.config import EvaluationSettings, PretrainSettings

NAMESPACE = "vmoco"
"""Ray's namespace of our actors with a name, and of our notes in Ray's store."""
_KEPT_SECONDS = 60.0  # so long the coordinator remembers the evaluation
_RENEW_SECONDS = 15.0
_ANSWER_SECONDS = 5.0
# The evaluation's resources are there within this time, or never: `check_room` has counted them.
_RESERVE_SECONDS = 60.0
_NODES_SECONDS = 3600.0  # where an autoscaler has to bring the node first


def resources(settings: EvaluationSettings) -> dict[str, float]:
    """What the task needs of the cluster; empty where it shares what the workers have."""
    wanted = {"CPU": float(settings.num_cpus), "GPU": float(settings.use_gpu)}
    return {name: number for name, number in wanted.items() if number and settings.enabled}


def reserve(settings: EvaluationSettings, *, timeout: float) -> PlacementGroup | None:
    """Sets the task's resources aside for the whole run, so that workers, also elastic ones, never take them.

    Raises:
        ValueError: the cluster does not have them free.
    """
    wanted = resources(settings)
    if not wanted:
        return None
    group = placement_group([wanted])
    if not group.wait(timeout):
        ray.util.remove_placement_group(group)
        raise ValueError(
            f"no node has {wanted} free for the evaluation of checkpoints: lower evaluation.num-cpus (0 shares those "
            "of the workers), set evaluation.no-enabled, or add nodes"
        )
    return group


class Room:
    """What a run takes of the cluster and asks for; a context manager, which gives it back.

    Args:
        settings: of the run.

    Attributes:
        holder: name, in `NAMESPACE`, that an actor of the run must have for as long as the run lives.
        evaluation: resources set aside for it, from entering on; None where it shares those of the workers.

    Raises:
        ValueError: on entering: the cluster does not have the evaluation's resources free.
    """

    def __init__(self, settings: PretrainSettings) -> None:
        self.holder = f"run-{uuid.uuid4().hex}"
        self.evaluation: PlacementGroup | None = None
        self._settings = settings
        self._noted: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="room", daemon=True)

    def __enter__(self) -> Room:
        strike_out_dead()
        waits = self._settings.scaling.wait_for_nodes
        self.evaluation = reserve(self._settings.evaluation, timeout=_NODES_SECONDS if waits else _RESERVE_SECONDS)
        if self.evaluation is not None:
            self.note(self._evaluation_name)
            self._ask()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        for requester in self._noted:
            _strike_out(requester)
        if self.evaluation is not None:
            ray.util.remove_placement_group(self.evaluation)

    def note(self, requester: str) -> None:
        """Notes, where a later run finds it, by which name this run asks the coordinator."""
        self._noted.append(requester)
        internal_kv._internal_kv_put(requester, self.holder, namespace=NAMESPACE)

    @property
    def _evaluation_name(self) -> str:
        return f"evaluation-{self.holder}"

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError):  # a head that is away for a moment: the next one counts
                self._ask()

    def _ask(self) -> None:
        """Asks for what the evaluation has already, so that nobody counts on it."""
        assert self.evaluation is not None, "there is none without"
        get_or_create_autoscaling_coordinator().request_resources.remote(
            requester_id=self._evaluation_name,
            resources=[self.evaluation.bundle_specs[0] | _place_of(self.evaluation)],
            expire_after_s=_KEPT_SECONDS,
            priority=ResourceRequestPriority.HIGH,  # as Ray Train's; of two that are alike the earlier one counts
        )


def strike_out_dead() -> None:
    """Strikes out what runs have asked for that are no more, and could not do it themselves."""
    alive = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    for key in internal_kv._internal_kv_list("", namespace=NAMESPACE):
        holder = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        if holder is not None and holder.decode() not in alive:
            _strike_out(key.decode())


def _strike_out(requester: str) -> None:
    coordinator = get_or_create_autoscaling_coordinator()
    with contextlib.suppress(ray.exceptions.RayError):  # it then stands until it is forgotten, as without us
        ray.get(coordinator.cancel_request.remote(requester), timeout=_ANSWER_SECONDS)
        # After it: what is not struck out because this process dies here, the next one finds.
        internal_kv._internal_kv_del(requester, namespace=NAMESPACE)


def _place_of(group: PlacementGroup) -> dict[str, float]:
    """A little of the resource that the group's node alone has: without it Ray would count on the largest node."""
    place = placement_group_table(group)["bundles_to_node_id"].get(0)
    found = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] == place]
    return {f"node:{node['NodeManagerAddress']}": 0.001 for node in found}


def check_room(settings: PretrainSettings) -> None:
    """Checks that the cluster can hold the workers and the evaluation, because Ray would wait for them for ever.

    Raises:
        ValueError: it cannot.
    """
    if settings.scaling.wait_for_nodes:
        return
    if problem := lacking(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
        raise ValueError(problem)


def lacking(settings: PretrainSettings, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """What empty nodes lack to hold the fewest workers that a run goes on with, and its evaluation; None if nothing.

    Args:
        settings: of the run.
        nodes: resources of each, such as {"CPU": 8.0, "GPU": 1.0}.
    """
    scaling, beside = settings.scaling, resources(settings.evaluation)
    worker = {"CPU": float(scaling.cpus_per_worker)} | ({"GPU": 1.0} if scaling.use_gpu else {})
    wanted = scaling.min_workers or scaling.num_workers
    if _most_workers(nodes, worker, beside) >= wanted:
        return None
    extra = f" and its evaluation {_said(beside)}" if beside else ""
    there = ", ".join(_said({name: node.get(name, 0.0) for name in worker | beside}) for node in nodes) or "none"
    return (
        f"a run of {wanted} workers, which need {_said(worker)} each{extra}, does not fit on the nodes of the cluster "
        f"({there}): lower scaling.num-workers, scaling.cpus-per-worker or evaluation.num-cpus, add nodes, or set "
        "scaling.wait-for-nodes where an autoscaler adds them"
    )


def _most_workers(
    nodes: Sequence[Mapping[str, float]], worker: Mapping[str, float], beside: Mapping[str, float]
) -> int:
    """The most workers that fit where the evaluation has the best node for it; -1 where it has none."""
    counts = [_count(node, worker) for node in nodes]
    if not beside:
        return sum(counts)
    left = [{name: node.get(name, 0.0) - beside.get(name, 0.0) for name in {*node, *beside}} for node in nodes]
    fits = [at for at, node in enumerate(left) if min(node.values()) >= 0]
    return max((sum(counts) - counts[at] + _count(left[at], worker) for at in fits), default=-1)


def _count(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    return int(min(node.get(name, 0.0) // number for name, number in worker.items()))


def _said(wanted: Mapping[str, float]) -> str:
    return " + ".join(f"{number:.0f} {name}" for name, number in wanted.items())


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
