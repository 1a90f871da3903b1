"""How each machine of a run does: processor, memory, disk, network and GPUs, as MLflow's system metrics.

One reporter a node measures, whatever the number of ranks there. The channel takes its samples to the first rank, whose
spool sends them with the points of the run. So a tracker that is away loses none of them, and no other node needs the
tracker. MLflow's own thread would end for good when the tracker fails to answer once; its monitors are used here.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vmoco.mlflow_internals import machine_monitors
from vmoco.spool import Spool
from vmoco.train.system_metrics import Gauges

_SECONDS = 10.0  # as in MLflow
_SECONDS_PER_NODE = 0.5
_FIRST_SECONDS = 2.0
_TAKE_SECONDS = 2.0
_EVALUATION_SECONDS = 300.0  # longer than a few samples of a worker are apart, in any cluster


class Sample(NamedTuple):
    """What a node measured."""

    node: str
    """Name for the metrics, as `node_name` gives it."""
    time_ms: int
    """When it arrived in the channel, whose clock is the same for all nodes; milliseconds since 1970."""
    numbers: dict[str, float]
    """By MLflow's names, such as cpu_utilization_percentage."""


class Samples:
    """Collects the samples of all nodes until the first rank takes them; the channel holds it.

    Where a worker and an evaluation share a node, the worker's samples count, and the others do not.
    """

    def __init__(self) -> None:
        self._waiting: list[Sample] = []
        self._by_worker: dict[str, int] = {}  # time of the last sample, by node

    def add(self, sample: Sample, *, by_worker: bool) -> None:
        """Adds a sample of a node."""
        if by_worker:
            self._by_worker[sample.node] = sample.time_ms
        elif sample.time_ms - self._by_worker.get(sample.node, 0) < 1000 * _EVALUATION_SECONDS:
            return
        self._waiting.append(sample)

    def take(self) -> list[Sample]:
        """All samples since the last call."""
        taken, self._waiting = self._waiting, []
        return taken


class SystemMetrics:
    """Processor, memory, disk, network and GPUs of this machine, by the names that MLflow gives them."""

    def __init__(self) -> None:
        self._monitors = machine_monitors()

    def numbers(self) -> dict[str, float]:
        """Values of now: the load of processors since the last call, the traffic of the network since the first."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= {name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return found


def metric_of(node: str, name: str) -> str:
    """The tracked name of a number of a node. MLflow's page System metrics has a section for each node."""
    return f"system/{node}/{name}" if node else f"system/{name}"


def node_name(nodes: Sequence[Mapping[str, Any]], node_id: str) -> str:
    """The name of a node: empty on a cluster of one node, else its host name, as far as metrics may be called so.

    Nodes that share a host name get a part of their id too.

    Args:
        nodes: what `ray.nodes()` returns.
        node_id: of the node.
    """
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes if node["Alive"]}
    if len(hosts) < 2 or node_id not in hosts:
        return ""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", hosts[node_id])
    return name if list(hosts.values()).count(hosts[node_id]) == 1 else f"{name}-{node_id[:8]}"


def seconds_between(num_nodes: int) -> float:
    """Seconds between two samples of a node: 10, and more in clusters of more than 20, to spare the tracker."""
    return max(_SECONDS, _SECONDS_PER_NODE * num_nodes)


class Reporter:
    """Measures this machine in a thread.

    Args:
        send: receives each sample.
        seconds: between two samples.
        warn: receives a warning if the machine cannot be measured.
    """

    def __init__(
        self, send: Callable[[dict[str, float]], None], *, seconds: float, warn: Callable[[str], None]
    ) -> None:
        self._send = send
        self._seconds = seconds
        self._warn = warn
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="machine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            system = SystemMetrics()
            system.numbers()  # the load of processors has no beginning yet
            seconds = min(self._seconds, _FIRST_SECONDS)  # a short run shows something too
            while not self._closing.wait(seconds):
                self._send(system.numbers())
                seconds = self._seconds
            self._send(system.numbers())
        except Exception as error:  # such as a GPU that no longer answers: training goes on
            self._warn(f"warning: this machine is no longer measured: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Sends a last sample and ends."""
        self._closing.set()
        self._thread.join(timeout=5)


@contextlib.contextmanager
def reported(channel: Any, *, run: str, by_worker: bool) -> Iterator[None]:
    """In a process of a run: reports this machine to the channel, a worker also to Prometheus, inside the block.

    Args:
        channel: a `Channel`.
        run: name of the run.
        by_worker: True in a worker, False in an evaluation.
    """
    import ray  # not at the top: Ray reads its token when it is imported

    nodes, node_id = ray.nodes(), ray.get_runtime_context().get_node_id()
    name, gauges = node_name(nodes, node_id), Gauges(run)

    def send(numbers: dict[str, float]) -> None:
        channel.measured.remote(name, numbers, by_worker)
        if by_worker:
            gauges.show({metric_of("", each): value for each, value in numbers.items()})  # Prometheus adds the node

    seconds = seconds_between(sum(node["Alive"] for node in nodes))
    reporter = Reporter(send, seconds=seconds, warn=lambda line: channel.say.remote(f"{line} (node {name or node_id})"))
    try:
        yield
    finally:
        reporter.close()


class Collector:
    """On the first rank: takes the samples from the channel into the spool, in a thread.

    Args:
        take: returns the samples since its last call.
        spool: of the run.

    Attributes:
        step: training step of now, under which samples are tracked.
    """

    def __init__(self, take: Callable[[], list[Sample]], spool: Spool) -> None:
        self.step = 0
        self._take = take
        self._spool = spool
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="machines", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.wait(_TAKE_SECONDS):
            self._collect()
        self._collect()

    def _collect(self) -> None:
        with contextlib.suppress(Exception):  # the driver has ended or does not answer: training must not end by that
            for node, time_ms, numbers in self._take():
                named = {metric_of(node, name): value for name, value in numbers.items()}
                self._spool.points(named, step=self.step, time_ms=time_ms, once=True)

    def close(self) -> None:
        """Takes what is there, and ends."""
        self._closing.set()
        self._thread.join(timeout=5)
