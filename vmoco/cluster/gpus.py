"""The GPUs of a node: which there are, whether torch can use them, and whether two nodes see the same one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """A GPU that a node sees."""

    name: str
    memory_bytes: int
    uuid: str


# Least version of NVIDIA's driver for each version of CUDA (NVIDIA, "CUDA Compatibility", minor version compatibility).
_LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def gpus_here() -> tuple[tuple[Gpu, ...], str]:
    """The GPUs of this node, and why torch cannot use them; empty where it can, or where there are none."""
    import torch

    try:
        found = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
    except RuntimeError as error:  # there are GPUs, and CUDA does not start
        return (), f"CUDA does not start ({str(error).splitlines()[0]})" + _driver_advice(torch.version.cuda)
    return tuple(Gpu(each.name, each.total_memory, str(each.uuid)) for each in found), ""


def _driver_advice(cuda: str | None) -> str:
    """What to do about the driver, if it is too old for torch's version of CUDA; else empty."""
    driver = driver_version(_DRIVER_FILE.read_text()) if _DRIVER_FILE.exists() else None
    least = _LEAST_DRIVER.get(int(cuda.partition(".")[0])) if cuda else None
    if driver is None or least is None or int(driver.partition(".")[0]) >= least:
        return ""
    return f": NVIDIA's driver is {driver}, and CUDA {cuda} needs {least} or newer: update it on the machine"


def driver_version(text: str) -> str | None:
    """Version of NVIDIA's driver in the text of /proc/driver/nvidia/version: `580.65.06`; None if there is none."""
    found = re.search(r"Kernel Module\b.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def shared_gpus(seen: Mapping[str, Sequence[Gpu]]) -> list[str]:
    """One message for each GPU that two nodes see. Ray counts it twice, and NCCL later refuses the two workers on it.

    Args:
        seen: the GPUs of each node, by its address.
    """
    first: dict[str, str] = {}
    problems = []
    for address, gpus in seen.items():
        for gpu in gpus:
            if (other := first.setdefault(gpu.uuid, address)) != address:
                problems.append(
                    f"nodes {other} and {address} both see the GPU {gpu.name} {gpu.uuid}: give each container GPUs of "
                    "its own (nvidia.com/gpu in its limits, or docker run --gpus), and restart the nodes"
                )
    return problems
