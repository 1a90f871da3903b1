"""What one node of a cluster is and reaches: versions, devices, clock, shared memory, storage, tracker. Knows no Ray.

Every question is answered with a value or with a sentence, so that one broken node does not hide the others.


Every node of the cluster is asked the same, at once, by tasks that are pinned to them and need no CPU.

Before a run or an ingest that several machines take part in, `check_nodes` has them all look at the places that are
shared: what is only on one machine's disk, or not to be reached from one, would fail far later and say less.


Whether a cluster can carry a run, before it begins: every node is asked the same, and what differs or fails is said.

The questions go to all nodes at once, as tasks pinned to them that need no CPU, so a busy cluster answers too. Only the
measuring of speed waits for a worker's share of a node, and not for long.
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
from vmoco.config import PretrainSettings
from vmoco.model.cost import Speed, StepCost, measure_speed, step_cost

_PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "numpy", "av", "mlflow")


@dataclass(frozen=True)
class NodeReport:
    """The answers of one node."""

    address: str
    """IP address, which is what people know a node by."""
    versions: dict[str, str]
    """Of Python, of the packages that must agree, and a hash of vmoco's own sources."""
    num_cpus: int
    memory_bytes: int
    gpus: tuple[tuple[str, int], ...]
    """Name and memory of each."""
    clock: float
    """Seconds since 1970, as this node sees it."""
    asked: float
    """When it was asked, as whoever asked sees it; set by them, and so is `answered`."""
    answered: float
    """When its answer had come: it looked at its clock between the two, after its worker had started."""
    shared_memory_bytes: int
    """Size of /dev/shm, where Ray keeps its objects."""
    problems: dict[str, str] = field(default_factory=dict)
    """What did not work, by what was tried."""
    unseen: frozenset[str] = frozenset()
    """Settings whose place is on a local disk, and is not there on this node."""


def skew(one: NodeReport, other: NodeReport) -> float:
    """Seconds by which the clock of one node is ahead of another's, at least: 0 where they may agree."""
    ahead = (one.clock - one.answered) - (other.clock - other.asked)
    behind = (one.clock - one.asked) - (other.clock - other.answered)
    return max(ahead, 0.0) + min(behind, 0.0)


def look(address: str, *, places: dict[str, str], writes: str, mark: str) -> NodeReport:
    """Looks at what takes no time: versions, and whether this node reaches places.

    Args:
        address: of this node.
        places: URIs by the setting that names them.
        writes: setting of the place that is written to.
        mark: URI of a file below that place, written by the driver, which must be seen; empty where there is none.
    """
    clock = time.time()
    problems, unseen = {}, set()
    for setting, uri in places.items():
        seen = mark if setting == writes else uri
        try:
            if seen and not storage.exists(seen):
                written = f"what the driver's node writes to {uri} is not seen here"
                problems[setting] = written if setting == writes else f"{uri} is not there"
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


def report(address: str, *, places: dict[str, str], writes: str, mark: str, tracker: str) -> NodeReport:
    """Looks at this node as `look` does, and at its GPUs, and whether it reaches the tracker.

    Args:
        address: of this node.
        places: URIs by the setting that names them.
        writes: setting of the place that is written to.
        mark: file below that place that must be seen.
        tracker: URI of the tracker.
    """
    found = look(address, places=places, writes=writes, mark=mark)
    said = _tracker_problem(tracker)
    problems = found.problems | ({"tracker": said} if said else {})
    return dataclasses.replace(found, gpus=_gpus(), problems=problems)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}
    sources = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        sources.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return versions | {"vmoco": sources.hexdigest()[:12]}


def _gpus() -> tuple[tuple[str, int], ...]:
    import torch

    found = (torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count()))
    return tuple((device.name, device.total_memory) for device in found)


def _tracker_problem(uri: str) -> str:
    from vmoco import tracking

    try:
        tracking.client(uri).search_experiments(max_results=1)
    except Exception as error:  # whatever the client or the server says, it is what a run would meet
        return f"the tracker {uri} cannot be used: {' '.join(str(error).split())[:300]}"
    return ""


_OWN_DISK = (
    "a path of one machine's own disk will not do for several nodes: give a folder that all share, or s3:// or gs://"
)
_LOOK_SECONDS = 30.0


def check_nodes(
    places: Mapping[str, str], *, writes: str, tracker: str | None = None, show: Callable[[str], None] = print
) -> None:
    """Has every node look at places that all must reach, where the cluster has several machines; `ray.init` was called.

    Args:
        places: URI of each, by the setting that names it.
        writes: the setting among them whose place is written to.
        tracker: URI of the tracker, where one is used.
        show: takes a warning about nodes that do not answer.

    Raises:
        ValueError: a node does not reach them, or has other versions than another.
    """
    import ray  # in each function: Ray reads how to authenticate when it is imported, and a job connects first

    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(machines) < 2:
        return
    reports, silent = ask_nodes(look, places, writes=writes, seconds=_LOOK_SECONDS)
    for address in silent:
        show(f"warning: node {address} gave no answer in {_LOOK_SECONDS:.0f} s")
    problems = [*place_problems(reports), *version_problems(reports), *tracker_problems(tracker, machines)]
    if problems:
        more = f" (and {len(problems) - 1} more: jobs/check.py cluster names all)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)


def ask_nodes(
    question: Callable[..., NodeReport], places: Mapping[str, str], *, writes: str, seconds: float, **more: object
) -> tuple[list[NodeReport], list[str]]:
    """The reports of all nodes, by address, and the addresses of those that did not answer in time.

    Args:
        question: takes an address, the places, the setting that is written to, and a file that it must see there.
        places: URIs, by the setting that names each.
        writes: setting of the place that is written to.
        seconds: so long the answers are waited for.
        more: for the question.

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
                except ray.exceptions.RayError:  # it was lost while it was asked
                    lost.append(answer)
    finally:
        _attempt(lambda: storage.delete_folder(probe))
    if not reports:
        raise ValueError(f"no node of the cluster answered in {seconds:.0f} s: look at `ray status`")
    reports.sort(key=lambda each: each.address)
    if problem and not any(writes in each.problems for each in reports):
        here = ray.util.get_node_ip_address()
        at = next((at for at, each in enumerate(reports) if each.address == here), 0)
        reports[at] = dataclasses.replace(reports[at], problems={**reports[at].problems, writes: problem})
    return reports, [asked[answer][0] for answer in (*late, *lost)]


def place_problems(reports: Sequence[NodeReport]) -> list[str]:
    """What nodes do not reach, a sentence each."""
    own = len({each.address for each in reports}) > 1
    return [
        f"node {each.address}: {what}: {said}" + (f"; {_OWN_DISK}" if own and what in each.unseen else "")
        for each in reports
        for what, said in each.problems.items()
    ]


def version_problems(reports: Sequence[NodeReport]) -> list[str]:
    """In what nodes differ from the first, a sentence each."""
    first, problems = reports[0], []
    for each in reports:
        for package, version in each.versions.items():
            # What follows a plus names the build: a head for CPUs and workers for GPUs are one version.
            if version.partition("+")[0] != first.versions[package].partition("+")[0]:
                problems.append(
                    f"node {each.address} has {package} {version}, node {first.address} has {first.versions[package]}: "
                    "install requirements.lock on both (or start both from one image), and restart the nodes"
                )
    return problems


def tracker_problems(tracker: str | None, machines: set[str]) -> list[str]:
    """Why several machines cannot use a tracker; nothing where they can."""
    if len(machines) < 2 or tracker is None or not tracker.startswith("sqlite:"):
        return []
    return [
        f"the tracker {tracker} is a file of one machine and the cluster has {len(machines)} nodes: set "
        "MLFLOW_TRACKING_URI to a server before the nodes start"
    ]


def _attempt(action: Callable[[], object]) -> str:
    """Why it failed; empty where it did not."""
    try:
        action()
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    return ""


_ANSWER_SECONDS = 40.0
_SPEED_SECONDS = 25.0
_MOST_SKEW_SECONDS = 2.0
_LEAST_SHARED_MEMORY = 2**30


def check_cluster(settings: PretrainSettings, *, show: Callable[[str], None] = print) -> list[str]:
    """Asks every node, shows what was found, and returns the problems, a sentence each; `ray.init` has been called.

    Args:
        settings: of the run that is to be carried; `data.uri` may be empty.
        show: takes each line for a person.
    """
    place = storage.require_absolute(settings.run.storage or storage.join(storage.home(), "runs"), "run.storage")
    places = {"run.storage": place}
    if settings.data.uri:
        places["data.uri"] = storage.require_absolute(settings.data.uri, "data.uri")
    reports, silent = ask_nodes(
        report, places, writes="run.storage", seconds=_ANSWER_SECONDS, tracker=tracking.tracking_uri()
    )
    problems = [
        f"node {address} gave no answer in {_ANSWER_SECONDS:.0f} s: look at it, or remove it" for address in silent
    ]
    problems += find_problems(settings, reports, tracker=tracking.tracking_uri())
    problems += _resource_problems(settings)
    for each in sorted(reports, key=lambda each: each.address):
        gpus = ", ".join(f"{name} ({size / 2**30:.0f} GiB)" for name, size in each.gpus) or "no GPU"
        show(
            f"node {each.address}: {each.num_cpus} CPUs, {each.memory_bytes / 2**30:.0f} GiB, {gpus}, /dev/shm "
            f"{each.shared_memory_bytes / 2**30:.1f} GiB, "
            + (", ".join(f"{what} FAILS" for what in each.problems) or "storage and tracker reached")
        )
    if not any("GPU" in problem for problem in problems):
        speed = _measure(settings)
        gpu_bytes = min((size for each in reports for _, size in each.gpus), default=0)
        lines, more = estimate(settings, speed, gpu_bytes=gpu_bytes)
        problems += more
        for line in lines:
            show(line)
    return problems


def find_problems(settings: PretrainSettings, reports: list[NodeReport], *, tracker: str) -> list[str]:
    """What is wrong with the nodes, or between them, a sentence each.

    Args:
        settings: of the run.
        reports: of all nodes; the first is the one that others are compared with.
        tracker: URI of the tracker.
    """
    first, problems = reports[0], [*place_problems(reports), *version_problems(reports)]
    for each in reports:
        if abs(ahead := skew(each, first)) > _MOST_SKEW_SECONDS:
            problems.append(
                f"the clock of node {each.address} is {ahead:+.0f} s beside that of {first.address}: let chrony or "
                "systemd-timesyncd set both; S3 refuses a request that is 15 minutes off"
            )
        if each.shared_memory_bytes < _LEAST_SHARED_MEMORY:
            problems.append(
                f"node {each.address} has {each.shared_memory_bytes / 2**20:.0f} MiB of /dev/shm, Ray's object store "
                "wants 1 GiB or more: start its container with --shm-size 2g, or mount memory there"
            )
    problems += tracker_problems(tracker, {each.address for each in reports})
    return problems


def estimate(settings: PretrainSettings, speed: Speed | None, *, gpu_bytes: int) -> tuple[list[str], list[str]]:
    """How long a run takes and what it needs, as lines for a person, and what of it cannot be.

    Args:
        settings: of the run.
        speed: measured; None where the cluster was too busy.
        gpu_bytes: memory of the smallest GPU; 0 without GPUs.
    """
    cost = step_cost(settings, bf16=speed.bf16 if speed else settings.scaling.use_gpu)
    lines = [
        f"memory: about {cost.rank_bytes / 2**30:.1f} GiB a worker, {cost.activation_bytes / 2**20:.0f} MiB of it for "
        f"each clip of a micro-batch of {settings.train.micro_batch}",
        f"network: each worker sends {cost.gradient_bytes / 1e6:.0f} MB of gradients in a step",
    ]
    problems = []
    if settings.scaling.use_gpu and gpu_bytes and cost.rank_bytes > gpu_bytes:
        problems.append(
            f"a worker needs about {cost.rank_bytes / 2**30:.1f} GiB of GPU memory, the smallest GPU has "
            f"{gpu_bytes / 2**30:.1f}: lower train.micro-batch {settings.train.micro_batch}"
        )
    if speed is None:
        lines.append("time: no worker's share of a node was free to measure; ask again when the cluster is idle")
        return lines, problems
    lines.append(_time_line(settings, cost, speed))
    return lines, problems


def _time_line(settings: PretrainSettings, cost: StepCost, speed: Speed) -> str:
    workers = settings.scaling.num_workers
    slow = cost.flops_after / workers / speed.flops_per_second
    hours = cost.run_flops(settings) / workers / speed.flops_per_second / 3600
    length = f"{hours:.1f} hours" if hours < 100 else f"{hours / 24:.0f} days"
    return (
        f"time: about {length} for {settings.last_step} steps on {workers} workers, {slow:.2g} s a step with the "
        f"generator; a worker's encoder was measured at {speed.flops_per_second / 1e12:.3g} TFLOP/s, and reading, "
        "augmentation and network come on top"
    )


def _resource_problems(settings: PretrainSettings) -> list[str]:
    import ray  # in each function: Ray reads how to authenticate when it is imported, and a job connects first

    from vmoco.cluster.reservation import shortage

    scaling = settings.scaling
    if scaling.wait_for_nodes:
        return []
    if scaling.use_gpu and not ray.cluster_resources().get("GPU"):
        return [
            f"preset {settings.preset} wants {scaling.num_workers} GPUs and the cluster has none: add GPU nodes, take "
            "--scaling.wait-for-nodes where an autoscaler brings them, or another preset for CPUs"
        ]
    problem = shortage(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])
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
