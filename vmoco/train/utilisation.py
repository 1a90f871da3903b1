"""How much of a device's arithmetic a step uses (MFU): what its encoders need over what the device can do.

What it can do is measured with a large matrix product in the type that the encoders run in, because a table of data
sheets knows neither CPUs nor throttled GPUs. What a step needs is counted by torch's own formulas for one forward of
the encoder: 4 forwards (query 1, its backward 2, key 1), and 6 once the generator trains (q_real 1, the gradient of the
pixels 1). Augmentation, generator and loss are left out, so the share is a little low and never flattering.
"""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from vmoco.config import PretrainSettings
from vmoco.model.moco import MocoEncoder
from vmoco.train import distributed

_SIZES = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrix product: milliseconds on either
_ROUNDS = 3


class Utilisation:
    """Arithmetic of a run's steps on this rank's device.

    Args:
        settings: of the run.
        device: of this rank; others are taken for equal.
        dtype: type that the encoders run in; None for float32.
    """

    def __init__(self, settings: PretrainSettings, device: torch.device, dtype: torch.dtype | None) -> None:
        self._settings = settings
        self._forward = forward_flops(settings)
        self._peak = _peak_flops(device, dtype or torch.float32)

    def share(self, step: int, seconds: float) -> float:
        """The share that a step of so many seconds has used.

        Args:
            step: counted from 0; the generator trains or not.
            seconds: that it took.
        """
        settings = self._settings
        forwards = 6 if step >= settings.generator_start else 4
        clips = settings.train.global_batch / distributed.world_size()
        return clips * forwards * self._forward / (seconds * self._peak)


def forward_flops(settings: PretrainSettings) -> float:
    """Floating-point operations of one forward of the encoder with one clip; a product and its sum are two."""
    with torch.device("meta"):  # shapes alone: no memory, no time
        model = settings.model
        encoder = MocoEncoder(model.backbone, embedding_dim=model.embedding_dim, head=model.head)
        clips = torch.empty(2, 3, settings.data.num_frames, settings.augment.size, settings.augment.size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():  # counted, not learned from
            encoder.head(encoder.backbone(clips))  # autocast knows no such device
    return counter.get_total_flops() / len(clips)


def _peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = _SIZES.get(device.type, _SIZES["cpu"])
    one, other = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first one warms up
        started = time.perf_counter()
        float((one @ other)[0, 0])  # waits for the product
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
