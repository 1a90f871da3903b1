"""Whether a cluster can carry a run, before it begins: every node is asked the same, and what differs or fails is said.

The questions go to all nodes at once, as tasks pinned to them that need no CPU, so a busy cluster answers too. Only the
measuring of speed waits for a worker's share of a node, and not for long.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any

from vmoco import storage, tracking
from vmoco.cluster.node_report import NodeReport, report
from vmoco.config import PretrainSettings
from vmoco.model.cost import StepCost, step_cost
from vmoco.train.speed import Speed, measure_speed

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
    reports, silent = _ask_all(places)
    problems = [
        f"node {address} gave no answer in {_ANSWER_SECONDS:.0f} s: look at it, or remove it" for address in silent
    ]
    problems += find_problems(settings, reports, tracker=tracking.tracking_uri())
    problems += _resource_problems(settings)
    for each in sorted(reports, key=lambda each: each.address):
        gpus = ", ".join(f"{name} ({size / 2**30:.0f} GiB)" for name, size in each.gpus) or "no GPU"
        show(
            f"node {each.address}: {each.num_cpus} CPUs, {each.memory_bytes / 2**30:.0f} GiB, {gpus}, /dev/shm "
            f"{each.shared_memory_bytes / 2**30:.1f} GiB, clock {each.clock - each.asked:+.1f} s, "
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
    first, problems = reports[0], []
    for each in reports:
        problems += [f"node {each.address}: {what}: {said}" for what, said in each.problems.items()]
        for package, version in each.versions.items():
            if version != first.versions[package]:
                problems.append(
                    f"node {each.address} has {package} {version}, node {first.address} has {first.versions[package]}: "
                    "install requirements.lock on both (or start both from one image), and restart the nodes"
                )
        skew = (each.clock - each.asked) - (first.clock - first.asked)
        if abs(skew) > _MOST_SKEW_SECONDS:
            problems.append(
                f"the clock of node {each.address} is {skew:+.0f} s beside that of {first.address}: let chrony or "
                "systemd-timesyncd set both; S3 refuses a request that is 15 minutes off"
            )
        if each.shared_memory_bytes < _LEAST_SHARED_MEMORY:
            problems.append(
                f"node {each.address} has {each.shared_memory_bytes / 2**20:.0f} MiB of /dev/shm, Ray's object store "
                "wants 1 GiB or more: start its container with --shm-size 2g, or mount memory there"
            )
    if len(reports) > 1 and tracker.startswith("sqlite:"):
        problems.append(
            f"the tracker {tracker} is a file of one machine and the cluster has {len(reports)} nodes: set "
            "MLFLOW_TRACKING_URI to a server before the nodes start"
        )
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


def _ask_all(places: dict[str, str]) -> tuple[list[NodeReport], list[str]]:
    """The reports of all nodes, and the addresses of those that did not answer."""
    import ray  # in each function: Ray reads how to authenticate when it is imported, and a job connects first
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = f".check-{uuid.uuid4().hex[:8]}"
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            remote: Any = ray.remote
            task = remote(report).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
            tracker = tracking.tracking_uri()
            answer = task.remote(node["NodeManagerAddress"], places=places, probe=probe, tracker=tracker)
            asked[answer] = (node["NodeManagerAddress"], time.time())
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    reports = [dataclasses.replace(ray.get(answer), asked=asked[answer][1]) for answer in ready]
    reports = sorted(reports, key=lambda each: each.address)
    if not reports:
        raise ValueError(f"no node of the cluster answered in {_ANSWER_SECONDS:.0f} s: look at `ray status`")
    return _with_unseen(reports, places["run.storage"], probe), [asked[answer][0] for answer in late]


def _with_unseen(reports: list[NodeReport], place: str, probe: str) -> list[NodeReport]:
    """Adds to each report that its file in run.storage cannot be seen from here; removes the files."""
    folder = storage.join(place, probe)
    try:
        seen = set(storage.list_files(folder)) if storage.exists(folder) else set()
        storage.delete_folder(folder)
    except OSError:  # the driver may not look there either: each node has said why itself
        seen = set()
    unseen = (
        f"what it writes to {place} is not seen from the driver's node: a path of one machine's own disk will not do "
        "for several nodes; give a shared folder, s3:// or gs://"
    )
    return [
        each
        if each.address in seen or "run.storage" in each.problems
        else dataclasses.replace(each, problems={**each.problems, "run.storage": unseen})
        for each in reports
    ]


def _resource_problems(settings: PretrainSettings) -> list[str]:
    import ray

    from vmoco.train.room import lacking

    scaling = settings.scaling
    if scaling.wait_for_nodes:
        return []
    if scaling.use_gpu and not ray.cluster_resources().get("GPU"):
        return [
            f"preset {settings.preset} wants {scaling.num_workers} GPUs and the cluster has none: add GPU nodes, take "
            "--scaling.wait-for-nodes where an autoscaler brings them, or another preset for CPUs"
        ]
    problem = lacking(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])
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
