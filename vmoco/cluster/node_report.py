"""What one node of a cluster is and reaches: versions, devices, clock, shared memory, storage, tracker. Knows no Ray.

Every question is answered with a value or with a sentence, so that one broken node does not hide the others.
"""

from __future__ import annotations

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
    """The same instant as near as can be said: when the node was asked, by whoever asked; set by them."""
    shared_memory_bytes: int
    """Size of /dev/shm, where Ray keeps its objects."""
    problems: dict[str, str] = field(default_factory=dict)
    """What did not work, by what was tried."""


def report(address: str, *, places: dict[str, str], probe: str, tracker: str) -> NodeReport:
    """Looks at this node.

    Args:
        address: of this node.
        places: URIs by the setting that names them; in `run.storage` a file is left that other nodes look for.
        probe: name of that file's folder.
        tracker: URI of the tracker.
    """
    clock = time.time()
    problems = {}
    for setting, uri in places.items():
        try:
            if setting == "run.storage":
                storage.write_atomic(storage.join(uri, probe, address), address.encode())
            elif not storage.exists(uri):
                problems[setting] = f"{uri} is not there"
        except (ValueError, OSError) as error:
            problems[setting] = " ".join(str(error).split())
    if said := _tracker_problem(tracker):
        problems["tracker"] = said
    return NodeReport(
        address=address,
        versions=_versions(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpus(),
        clock=clock,
        asked=clock,
        shared_memory_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        problems=problems,
    )


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
