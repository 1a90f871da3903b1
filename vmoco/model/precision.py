"""The arithmetic of the encoders: bf16 or fp32, and the deterministic mode.

CPUs always use fp32, even if they support bf16. At small shapes their bf16 weight gradient of a 3-D convolution is
computed from uninitialised memory (seen with torch 2.14.1 on AVX512-BF16: 512 channels, 3x3x3, at 2x7x7, the last layer
of r3d_18 at 16x112x112; `python -m tests.benchmarks.bf16_gradient` shows it).
"""

from __future__ import annotations

import os

import torch


def autocast_dtype(precision: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The type for autocast (None for float32) and the reason, for the log; switches TF32 off.

    Args:
        precision: "auto", "bf16" or "fp32".
        device: where the encoders run.

    Raises:
        ValueError: the device has no usable bf16, and `precision` is "bf16".
    """
    # NVIDIA GPUs would compute fp32 convolutions in TF32, with 3 digits: fp32 means fp32 here.
    torch.backends.cudnn.allow_tf32 = False
    if precision == "fp32":
        return None, "fp32 as asked for"
    if device.type == "cpu":
        if precision == "bf16":
            raise ValueError(
                "--train.precision bf16 is not allowed on a CPU, because its bf16 weight gradients are wrong at small "
                "shapes: use auto or fp32"
            )
        return None, "fp32 because bf16 gradients are wrong on CPUs"
    name = torch.cuda.get_device_name(device)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, f"bf16 because {name} computes in it"
    if precision == "bf16":
        raise ValueError(f"--train.precision bf16, but {name} does not compute in it: use auto or fp32")
    return None, f"fp32 because {name} has no bf16 arithmetic"


# Networks with an operation that has no deterministic gradient on GPUs (torch 2.14), and that operation.
_WITHOUT = {"s3d": "3-D max pooling"}


def require_determinism(backbone: str, device: torch.device) -> None:
    """Makes this process use deterministic algorithms only, so the same GPUs give the same bits, at some cost in speed.

    Operations without such an algorithm raise an error from then on. CPUs are deterministic already. Call it once,
    before any other work.

    Raises:
        ValueError: the backbone has no deterministic gradient on this device.
    """
    if device.type == "cuda" and backbone in _WITHOUT:
        raise ValueError(
            f"--train.deterministic, but the gradient of {_WITHOUT[backbone]} in --model.backbone {backbone} has no "
            "deterministic algorithm on GPUs: use another backbone, or --train.no-deterministic"
        )
    # cuBLAS reads this when it first needs memory: matrix products are repeatable only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # it would choose algorithms by their speed at that moment
