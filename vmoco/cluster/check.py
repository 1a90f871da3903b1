"""Checks whether the nodes of a cluster agree and reach what a job needs, before the job begins.

`check_nodes` runs before each run and ingest. Without it, a path that is on one machine's own disk, or that one machine
cannot reach, would fail much later with a less clear message. `check_cluster` is the complete check of `jobs/check.py
cluster`, which also estimates the time and the memory of a run. Both ask all nodes at once, by tasks that are pinned to
them and need no CPU, so a busy cluster answers too. Each question gets a value or a message, so that one broken node
does not hide the others. Only the speed measurement waits for free CPUs or a GPU, and not for long.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from vmoco import storage, tracking
from vmoco.cluster.gpus import Gpu, gpus_here, shared_gpus
from vmoco.config import PretrainSettings
from vmoco.data.fit import fit_to_data
from vmoco.data.mixture import Mixture, absolute
from vmoco.model.cost import GPU_PROCESS_BYTES, Speed, StepCost, measure_speed, step_cost

_PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "numpy", "av", "mlflow")
_OWN_DISK = (
    "a path on one machine's own disk does not work for several nodes: give a folder that all share, or s3:// or gs://"
)
_NODES_SECONDS = 30.0  # how long `check_nodes` waits for answers
_CLUSTER_SECONDS = 40.0  # how long `check_cluster` waits
_SPEED_SECONDS = 25.0
_MOST_SKEW_SECONDS = 2.0
_LEAST_SHARED_MEMORY = 2**30


@dataclass(frozen=True)
class NodeReport:
    """The answers of one node."""

    address: str
    """IP address."""
    versions: dict[str, str]
    """Versions of Python and of the packages that must agree, and a hash of vmoco's own sources."""
    num_cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    clock: float
    """Seconds since 1970 by the clock of this node."""
    asked: float
    """When it was asked, by the clock of the driver."""
    answered: float
    """When its answer arrived, by the clock of the driver. The node read its own clock between the two."""
    shared_memory_bytes: int
    """Size of /dev/shm, where Ray keeps its objects."""
    problems: dict[str, str] = field(default_factory=dict)
    """Error messages, by the setting that did not work."""
    unseen: frozenset[str] = frozenset()
    """Settings whose value is a local path that this node does not have."""
    has_compiler: bool = True
    """Whether there is a C compiler, without which torch.compile makes no kernel."""


def skew(one: NodeReport, other: NodeReport) -> float:
    """Fewest seconds by which the clock of one node must be ahead of another's; 0 if they may agree."""
    ahead = (one.clock - one.answered) - (other.clock - other.asked)
    behind = (one.clock - one.asked) - (other.clock - other.answered)
    return max(ahead, 0.0) + min(behind, 0.0)


def ask_places(address: str, *, places: dict[str, str], writes: str, mark: str) -> NodeReport:
    """Runs on a node: reads the versions, and checks whether this node reaches places. Takes little time.

    Args:
        address: of this node.
        places: URIs, by the setting that names each.
        writes: setting of the place that is written to.
        mark: URI of a file in that place. The driver has written it, and this node must see it. May be empty.
    """
    clock = time.time()
    problems, unseen = {}, set()
    for setting, uri in places.items():
        seen = mark if setting == writes else uri
        try:
            if seen and not storage.exists(seen):
                written = f"this node does not see what the driver's node writes to {uri}"
                problems[setting] = written if setting == writes else f"there is no {uri}"
                if storage.local_path(uri) is not None:
                    unseen.add(setting)
            elif setting == writes:
                storage.check_writable(uri)
        except (ValueError, OSError) as error:
            problems[setting] = f"{uri} cannot be used: {' '.join(str(error).split())}"
    return NodeReport(
        address=address,
        versions=_versions(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=(),
        clock=clock,
        asked=clock,
        answered=clock,
        shared_memory_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        problems=problems,
        unseen=frozenset(unseen),
    )


def ask_all(address: str, *, places: dict[str, str], writes: str, mark: str, tracker: str) -> NodeReport:
    """Runs on a node: as `ask_places`, and also finds its GPUs and whether it reaches the tracker.

    Args:
        address: of this node.
        places: URIs, by the setting that names each.
        writes: setting of the place that is written to.
        mark: URI of a file in that place that this node must see.
        tracker: URI of the tracker.
    """
    found = ask_places(address, places=places, writes=writes, mark=mark)
    problem = _tracker_problem(tracker)
    problems = found.problems | ({"tracker": problem} if problem else {})
    gpus, problem = gpus_here()
    problems |= {"GPU": problem} if problem else {}
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    return dataclasses.replace(found, gpus=gpus, problems=problems, has_compiler=has_compiler)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}
    sources = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        sources.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return versions | {"vmoco": sources.hexdigest()[:12]}


def _tracker_problem(uri: str) -> str:
    try:
        tracking.client(uri).search_experiments(max_results=1)
    except Exception as error:  # of any kind: a run would meet it too
        return f"the tracker {uri} cannot be used: {' '.join(str(error).split())[:300]}"
    return ""


def check_nodes(
    places: Mapping[str, str], *, writes: str, tracker: str | None = None, show: Callable[[str], None] = print
) -> None:
    """Checks that every node reaches the given places, if the cluster has several machines. `ray.init` has been called.

    Args:
        places: URIs, by the setting that names each.
        writes: the setting whose place is written to.
        tracker: URI of the tracker, if one is used.
        show: prints a warning about nodes that do not answer.

    Raises:
        ValueError: a node does not reach one of them, or has other versions than another node.
    """
    import ray  # in each function: Ray reads how to authenticate when it is imported, and a job connects first

    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(machines) < 2:
        return
    reports, silent = ask_nodes(ask_places, places, writes=writes, seconds=_NODES_SECONDS)
    for address in silent:
        show(f"warning: node {address} did not answer within {_NODES_SECONDS:.0f} s")
    problems = [*place_problems(reports), *version_problems(reports), *tracker_problems(tracker, machines)]
    if problems:
        more = f" (and {len(problems) - 1} more: jobs/check.py cluster names all)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)


def ask_nodes(
    question: Callable[..., NodeReport], places: Mapping[str, str], *, writes: str, seconds: float, **more: object
) -> tuple[list[NodeReport], list[str]]:
    """Asks all nodes; returns their reports, sorted by address, and the addresses of those that did not answer in time.

    Args:
        question: `ask_places` or `ask_all`.
        places: URIs, by the setting that names each.
        writes: setting of the place that is written to.
        seconds: how long to wait for answers.
        more: further arguments for `question`.

    Raises:
        ValueError: no node answers.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = storage.join(places[writes], f".check-{uuid.uuid4().hex[:8]}")
    mark = storage.join(probe, "driver")
    problem = _attempt(lambda: storage.write_atomic(mark, b""))
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(question).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
            answer = task.remote(
                node["NodeManagerAddress"], places=dict(places), writes=writes, mark="" if problem else mark, **more
            )
            asked[answer] = (node["NodeManagerAddress"], time.time())
    try:
        late, lost, reports, end = list(asked), [], [], time.monotonic() + seconds
        while late and (left := end - time.monotonic()) > 0:
            ready, late = ray.wait(late, timeout=left)  # one at a time, for the time of each
            for answer in ready:
                try:
                    now = time.time()
                    reports.append(dataclasses.replace(ray.get(answer), asked=asked[answer][1], answered=now))
                except ray.exceptions.RayError:  # the node was lost meanwhile
                    lost.append(answer)
    finally:
        _attempt(lambda: storage.delete_folder(probe))
    if not reports:
        raise ValueError(f"no node of the cluster answered within {seconds:.0f} s: see `ray status`")
    reports.sort(key=lambda each: each.address)
    if problem and not any(writes in each.problems for each in reports):
        here = ray.util.get_node_ip_address()
        at = next((at for at, each in enumerate(reports) if each.address == here), 0)
        reports[at] = dataclasses.replace(reports[at], problems={**reports[at].problems, writes: problem})
    return reports, [asked[answer][0] for answer in (*late, *lost)]


def place_problems(reports: Sequence[NodeReport]) -> list[str]:
    """One message for each place that a node does not reach."""
    own = len({each.address for each in reports}) > 1
    return [
        f"node {each.address}: {what}: {problem}" + (f"; {_OWN_DISK}" if own and what in each.unseen else "")
        for each in reports
        for what, problem in each.problems.items()
    ]


def version_problems(reports: Sequence[NodeReport]) -> list[str]:
    """One message for each version in which a node differs from the first node."""
    first, problems = reports[0], []
    for each in reports:
        for package, version in each.versions.items():
            # The part after a plus names the build: torch for CPUs on a head and for GPUs on workers is one version.
            if version.partition("+")[0] != first.versions[package].partition("+")[0]:
                problems.append(
                    f"node {each.address} has {package} {version}, node {first.address} has {first.versions[package]}: "
                    "install requirements.lock on both (or start both from one image), and restart the nodes"
                )
    return problems


def tracker_problems(tracker: str | None, machines: set[str]) -> list[str]:
    """Why several machines cannot use a tracker; empty where they can."""
    if len(machines) < 2 or tracker is None or not tracker.startswith("sqlite:"):
        return []
    return [
        f"the tracker {tracker} is a file of one machine, and the cluster has {len(machines)} nodes: set "
        "MLFLOW_TRACKING_URI to a server before the nodes start"
    ]


def _attempt(action: Callable[[], object]) -> str:
    """Runs an action; returns the error message if it failed, or an empty text."""
    try:
        action()
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    return ""


def check_cluster(settings: PretrainSettings, *, show: Callable[[str], None] = print) -> list[str]:
    """Asks every node, prints what was found, and returns the problems, one message each. `ray.init` has been called.

    Args:
        settings: of the planned run; `data.uri` may be empty.
        show: prints a line.
    """
    place = storage.require_absolute(settings.run.storage or storage.join(storage.home(), "runs"), "--run.storage")
    places = {"--run.storage": place}
    if settings.data.uri:
        settings = settings.model_copy(update={"data": absolute(settings.data)})
    data = settings.data.places
    places |= data
    from vmoco.cluster.reservation import alive_nodes, fit_to_cluster

    settings, chosen = fit_to_cluster(settings, alive_nodes())
    reports, silent = ask_nodes(
        ask_all, places, writes="--run.storage", seconds=_CLUSTER_SECONDS, tracker=tracking.tracking_uri()
    )
    problems = [
        f"node {address} did not answer within {_CLUSTER_SECONDS:.0f} s: repair it, or remove it" for address in silent
    ]
    problems += find_problems(settings, reports, tracker=tracking.tracking_uri())
    if data and not any(data.keys() & each.problems.keys() for each in reports):
        settings, fitted = fit_to_data(settings, Mixture.load(settings.data))
        chosen += fitted
    problems += _resource_problems(settings)
    for each in sorted(reports, key=lambda each: each.address):
        gpus = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in each.gpus) or "no GPU"
        show(
            f"node {each.address}: {each.num_cpus} CPUs, {each.memory_bytes / 2**30:.0f} GiB, {gpus}, /dev/shm "
            f"{each.shared_memory_bytes / 2**30:.1f} GiB, "
            + (", ".join(f"{what} FAILS" for what in each.problems) or "storage and tracker reached")
        )
    for line in chosen:
        show(line)
    if not any("GPU" in problem for problem in problems):
        speed = _measure(settings)
        gpu_bytes = min((gpu.memory_bytes for each in reports for gpu in each.gpus), default=0)
        lines, more = estimate(settings, speed, gpu_bytes=gpu_bytes)
        problems += more
        for line in lines:
            show(line)
    return problems


def find_problems(settings: PretrainSettings, reports: list[NodeReport], *, tracker: str) -> list[str]:
    """One message for each problem of a node, or between nodes.

    Args:
        settings: of the run.
        reports: of all nodes; the others are compared with the first.
        tracker: URI of the tracker.
    """
    first, problems = reports[0], [*place_problems(reports), *version_problems(reports)]
    for each in reports:
        if abs(ahead := skew(each, first)) > _MOST_SKEW_SECONDS:
            problems.append(
                f"the clock of node {each.address} differs by {ahead:+.0f} s from that of node {first.address}: set "
                "both by chrony or systemd-timesyncd; S3 refuses requests whose time is 15 minutes off"
            )
        if each.shared_memory_bytes < _LEAST_SHARED_MEMORY:
            problems.append(
                f"node {each.address} has {each.shared_memory_bytes / 2**20:.0f} MiB of /dev/shm, and Ray's object "
                "store needs 1 GiB or more: start its container with --shm-size 2g, or mount memory there"
            )
    problems += [*shared_gpus({each.address: each.gpus for each in reports}), *_compiler_problems(settings, reports)]
    problems += tracker_problems(tracker, {each.address for each in reports})
    return problems


def _compiler_problems(settings: PretrainSettings, reports: list[NodeReport]) -> list[str]:
    """One message for each node that cannot compile what the run compiles there."""
    if not settings.train.speeds_up_by("compile"):
        return []
    return [
        f"node {each.address} has no C compiler, which --train.compile needs: install gcc in its image, or set "
        "--train.no-compile"
        for each in reports
        if not each.has_compiler and (each.gpus or not settings.scaling.use_gpu)
    ]


def estimate(settings: PretrainSettings, speed: Speed | None, *, gpu_bytes: int) -> tuple[list[str], list[str]]:
    """How long a run takes and what it needs, as lines to print; and the problems, one message each.

    Args:
        settings: of the run.
        speed: as measured; None where the cluster was too busy.
        gpu_bytes: memory of the smallest GPU; 0 without GPUs.
    """
    cost = step_cost(settings, bf16=speed.bf16 if speed else settings.scaling.use_gpu)
    lines = [
        f"memory: about {cost.rank_bytes / 2**30:.1f} GiB a worker, {cost.activation_bytes / 2**20:.0f} MiB of it for "
        f"each clip of a micro-batch of {settings.train.micro_batch}",
        f"network: each worker sends {cost.gradient_bytes / 1e6:.0f} MB of gradients in a step",
    ]
    problems = []
    if settings.scaling.use_gpu:
        shared = settings.evaluation.enabled and settings.evaluation.device == "shared-gpu"
        needed = cost.rank_bytes + (2 if shared else 1) * GPU_PROCESS_BYTES
        beside = "CUDA, NCCL and cuDNN" + (" and the evaluation on the same GPU" if shared else "")
        lines.append(
            f"memory: about {needed / 2**30:.1f} GiB of each worker's GPU with {beside}, and "
            f"{cost.host_bytes / 2**30:.1f} GiB page-locked in its machine for batches and checkpoints"
        )
        if gpu_bytes and needed > gpu_bytes:
            problems.append(
                f"a worker needs about {needed / 2**30:.1f} GiB of GPU memory, and the smallest GPU has "
                f"{gpu_bytes / 2**30:.1f}: lower --train.micro-batch {settings.train.micro_batch}"
            )
    if speed is None:
        lines.append(
            "time: not measured, because no node had enough free for one worker: try again when the cluster is idle"
        )
        return lines, problems
    lines.append(_time_line(settings, cost, speed))
    return lines, problems


def _time_line(settings: PretrainSettings, cost: StepCost, speed: Speed) -> str:
    workers = settings.scaling.num_workers
    slow = cost.flops_after / workers / speed.flops_per_second
    hours = cost.run_flops(settings) / workers / speed.flops_per_second / 3600
    length = f"{hours:.1f} hours" if hours < 100 else f"{hours / 24:.0f} days"
    if settings.train.steps:
        length = f"about {length} for {settings.last_step} steps"
    else:
        length = f"that of --train.epochs {settings.train.epochs:g} depends on the data set: give --data.uri"
    return (
        f"time: {length}; on {workers} workers, {slow:.2g} s a step with the generator; "
        f"measured: {speed.flops_per_second / 1e12:.3g} TFLOP/s for a worker's encoder, without reading, "
        "augmentation and network"
    )


def _resource_problems(settings: PretrainSettings) -> list[str]:
    import ray  # in each function: Ray reads how to authenticate when it is imported, and a job connects first

    from vmoco.cluster.reservation import alive_nodes, shortage

    scaling = settings.scaling
    if scaling.wait_for_nodes:
        return []
    if scaling.use_gpu and not ray.cluster_resources().get("GPU"):
        return [
            f"preset {settings.preset} needs {scaling.num_workers} GPUs and the cluster has none: add GPU nodes, set "
            "--scaling.wait-for-nodes where an autoscaler adds them, or choose a preset for CPUs"
        ]
    problem = shortage(settings, alive_nodes())
    return [problem] if problem else []


def _measure(settings: PretrainSettings) -> Speed | None:
    import ray

    scaling = settings.scaling
    task: Any = ray.remote(measure_speed)
    task = task.options(num_cpus=scaling.cpus_per_worker, num_gpus=int(scaling.use_gpu), max_retries=0)
    answer = task.remote(settings.canonical_json())
    ready, _ = ray.wait([answer], timeout=_SPEED_SECONDS)
    if not ready:
        ray.cancel(answer, force=True)
        return None
    speed: Speed = ray.get(answer)
    return speed
