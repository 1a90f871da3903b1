"""A GPU that torch cannot use, or that two nodes see, gives a message with the value and what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vmoco.cluster import gpus
from vmoco.cluster.gpus import Gpu, driver_version, gpus_here, shared_gpus

OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)  Sun Jul 27\n"
)
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15\nGCC version: 12.3\n"


@pytest.mark.parametrize(
    ("text", "version"), [(OPEN, "580.65.06"), (CLOSED, "535.183.01"), ("GCC version: 12.3\n", None)]
)
def test_the_version_of_the_driver_is_read(text: str, version: str | None) -> None:
    """From both kinds of kernel module."""
    assert driver_version(text) == version


def test_a_driver_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch sees GPUs, CUDA does not start: the message has the driver that is there and the one that is needed.

    With a driver that is new enough it has torch's reason alone.
    """
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

    def refuse(at: int) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpus, "_DRIVER_FILE", tmp_path / "version")
    (tmp_path / "version").write_text(CLOSED)
    found, problem = gpus_here()
    assert found == ()
    assert problem.startswith(
        "CUDA does not start (The NVIDIA driver on your system is too old (found version 12020).)"
    )
    assert problem.endswith("driver is 535.183.01, and CUDA 13.0 needs 580 or newer: update it on the machine")
    (tmp_path / "version").write_text(OPEN)
    assert gpus_here()[1].endswith("(found version 12020).)")


def test_gpus_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, memory and UUID of each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda at: SimpleNamespace(name="H100", total_memory=80, uuid=f"uuid-{at}"),
    )
    assert gpus_here() == ((Gpu("H100", 80, "uuid-0"), Gpu("H100", 80, "uuid-1")), "")


def test_a_gpu_that_two_nodes_see_is_named() -> None:
    """Two containers of one machine that both see its GPUs; another machine with an equal GPU is fine."""
    one, other = Gpu("H100", 80, "GPU-1"), Gpu("H100", 80, "GPU-2")
    assert shared_gpus({"192.0.2.1": [one], "192.0.2.2": [other]}) == []
    (problem,) = shared_gpus({"192.0.2.1": [one, other], "192.0.2.2": [other]})
    assert problem.startswith("nodes 192.0.2.1 and 192.0.2.2 both see the GPU H100 GPU-2: give each container GPUs of")
