"""What one node of a cluster is and reaches: versions, devices, clock, shared memory, storage, tracker. Knows no Ray.

Every question is answered with a value or with a sentence, so that one broken node does not hide the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from vmoco import storage

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
