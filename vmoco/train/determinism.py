"""The deterministic mode: the same bits from the same GPUs, at some cost in speed.

CPUs give the same bits without it. It belongs to the whole process, so a worker calls it once, before any other
work.
"""

from __future__ import annotations

import os

import torch

# Networks with a step that has no deterministic gradient on GPUs (torch 2.14), and which.
_WITHOUT = {"s3d": "3-D max pooling"}


def require_determinism(backbone: str, device: torch.device) -> None:
    """Makes torch use deterministic algorithms alone; what has none is an error from then on.

    Raises:
        ValueError: the backbone cannot be trained so on this device.
    """
    if device.type == "cuda" and backbone in _WITHOUT:
        raise ValueError(
            f"train.deterministic, but the gradient of {_WITHOUT[backbone]} in model.backbone {backbone} has no "
            "deterministic form on GPUs: use another backbone, or turn it off"
        )
    # cuBLAS reads it when it first needs memory: matrix products are repeatable with a workspace of fixed size only.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # it would choose algorithms by their speed of the moment
