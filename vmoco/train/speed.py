"""How fast a worker trains the encoder of a run: measured for a few seconds, on clips of noise, without a data set."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from vmoco.config import PretrainSettings
from vmoco.model.cost import step_cost
from vmoco.model.moco import MocoEncoder
from vmoco.train.precision import autocast_dtype

_SECONDS = 3.0
_CLIPS = {"cpu": 2, "cuda": 16}


@dataclass(frozen=True)
class Speed:
    """What one worker reaches."""

    flops_per_second: float
    """In a forward and backward of the encoder; a product and its sum are two operations."""
    bf16: bool
    """Whether the encoders run in bfloat16 here."""


def measure_speed(settings_json: str) -> Speed:
    """Runs forward and backward of the encoder of a run for about 3 seconds, with the threads that a worker has.

    Args:
        settings_json: `PretrainSettings` as JSON.
    """
    settings = PretrainSettings.model_validate_json(settings_json)
    torch.set_num_threads(settings.scaling.cpus_per_worker)
    device = torch.device("cuda" if settings.scaling.use_gpu else "cpu")
    dtype, _ = autocast_dtype(settings.train.precision, device)
    model = settings.model
    encoder = MocoEncoder(model.backbone, embedding_dim=model.embedding_dim, head=model.head, autocast_dtype=dtype).to(
        device, memory_format=torch.channels_last_3d
    )  # type: ignore[call-overload]
    size = settings.augment.size
    shape = (min(settings.train.micro_batch, _CLIPS[device.type]), 3, settings.data.num_frames, size, size)
    clips = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last_3d)
    _once(encoder, clips)  # the first one chooses kernels
    started, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - started < _SECONDS:
        _once(encoder, clips)
        rounds += 1
    seconds = time.perf_counter() - started
    forward = step_cost(settings, bf16=dtype is not None).forward_flops
    return Speed(3 * forward * len(clips) * rounds / seconds, bf16=dtype is not None)


def _once(encoder: MocoEncoder, clips: torch.Tensor) -> None:
    encoder(clips).square().sum().backward()
    if clips.device.type == "cuda":
        torch.cuda.synchronize()  # without it only the launch of the kernels would be measured
