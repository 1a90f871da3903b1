"""Every node of the cluster is asked the same, at once, by tasks that are pinned to them and need no CPU.

Before a run or an ingest that several machines take part in, `check_nodes` has them all look at the places that are
shared: what is only on one machine's disk, or not to be reached from one, would fail far later and say less.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from vmoco import storage
from vmoco.cluster.node_report import NodeReport, look

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
