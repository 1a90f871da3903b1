"""Whether a cluster can carry a run, before it begins: every node is asked the same, and what differs or fails is said.

The questions go to all nodes at once, as tasks pinned to them that need no CPU, so a busy cluster answers too. Only the
measuring of speed waits for a worker's share of a node, and not for long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmoco import storage, tracking
from vmoco.cluster.node_report import NodeReport, report, skew
from vmoco.cluster.nodes import ask_nodes, place_problems, tracker_problems, version_problems
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
