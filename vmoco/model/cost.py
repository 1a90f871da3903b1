"""What a run costs: arithmetic, memory and network by shapes alone, and how fast a worker really computes.

Costs are counted in forwards of the encoder. A step needs 4 before the generator starts (query 1, its backward 2, key
1) and 6 while it trains (q_real 1, the gradient of the pixels 1). If it learns from a part of the clips, these need 3
more instead of 2: with dropped frames, without, and the gradient of their pixels. If the generator follows the
contrastive loss, the 4 remain, and the first layer computes the gradient of its input as well. A clip whose key is also
encoded backwards needs 1 more. The generator, the augmentation and the loss are left out. They are small beside the
encoders, so a real step is somewhat slower.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vmoco.config import PretrainSettings
from vmoco.model.backbone import autocast_dtype
from vmoco.model.moco import MocoEncoder


@dataclass(frozen=True)
class StepCost:
    """What one step of a run costs, over all ranks unless said otherwise."""

    forward_flops: float
    """Of one forward of the encoder with one clip; a product and its sum are two."""
    num_parameters: int
    """Of one encoder with its head."""
    activation_bytes: int
    """Kept for the backward of one clip, in the precision of the run."""
    flops_before: float
    """Of a step before the generator starts."""
    flops_after: float
    """Of a step after the generator has started: the mean over steps in which it trains and others."""
    rank_bytes: int
    """Memory of a rank: two encoders, gradients, optimizer, queue, and the activations of one micro-batch."""
    host_bytes: int
    """Of the first rank, if it computes on a GPU, page-locked in its machine's memory: batches that are read ahead, and
    the copy of the state while a checkpoint is written."""
    gradient_bytes: int
    """What each rank sends in a ring all-reduce of the gradients: nearly twice their size."""
    key_bytes: int
    """What each rank receives of other ranks' keys."""

    def run_flops(self, settings: PretrainSettings) -> float:
        """Arithmetic of the complete run."""
        before = min(settings.generator_start, settings.last_step)
        return before * self.flops_before + (settings.last_step - before) * self.flops_after


_IN_FLOAT32 = {F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax}
"""Operations of the encoders that autocast computes in float32 on GPUs, and whose tensors it keeps in float32."""


class _Kept(TorchFunctionMode):
    """Sizes of what autograd keeps while it is entered, by storage: a tensor that two operations keep counts once.

    In float32; an operation of `_IN_FLOAT32` under autocast has a copy of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._float32 = False
        self._sizes: dict[tuple[int, bool], int] = {}
        self._tensors: list[torch.Tensor] = []  # so that no storage is freed and its address used again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self._float32 = self._float32, self._float32 or func in _IN_FLOAT32
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._float32 = before

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        """Takes a tensor that is kept."""
        self._sizes[_storage(tensor), self._float32] = tensor.untyped_storage().nbytes()
        self._tensors.append(tensor)
        return tensor

    def num_bytes(self, num_clips: int, *, bf16: bool, without: set[int]) -> int:
        """Bytes for each clip.

        Args:
            num_clips: in the forward.
            bf16: what is not computed in float32 takes half.
            without: storages that do not count.
        """
        counted = {key: size for key, size in self._sizes.items() if key[0] not in without}
        if not bf16:
            return sum({storage: size for (storage, _), size in counted.items()}.values()) // num_clips
        full, halved = (
            sum(size for (_, float32), size in counted.items() if float32 == kind) // num_clips
            for kind in (True, False)
        )
        return full + halved // 2


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def step_cost(settings: PretrainSettings, *, bf16: bool) -> StepCost:
    """Counts what a step of a run costs.

    Args:
        settings: of the run.
        bf16: whether the encoders run in bfloat16; parameters and optimizer stay float32.
    """
    model, train, moco = settings.model, settings.train, settings.moco
    kept = _Kept()

    def count_stem(layer: nn.Conv3d, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        stem.append(2 * output[0].numel() * layer.in_channels * math.prod(layer.kernel_size))

    stem: list[int] = []  # arithmetic of the first layer for one clip, forward, or backward for its input
    with torch.device("meta"):
        encoder = MocoEncoder.of(settings)
        first = next(layer for layer in encoder.backbone.modules() if isinstance(layer, nn.Conv3d))
        first.register_forward_hook(count_stem)
        clips = torch.empty(2, 3, settings.data.num_frames, settings.augment.size, settings.augment.size)
        hooks = torch.autograd.graph.saved_tensors_hooks(kept.note, kept.note)
        with FlopCounterMode(display=False) as counter, hooks, kept:
            encoder.head(encoder.backbone(clips))  # not its own forward: autocast does not support the meta device
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    # Integers are the indices of positions, which all clips share.
    indices = (buffer for buffer in encoder.buffers() if not buffer.is_floating_point())
    constants = {_storage(tensor) for tensor in (*encoder.parameters(), *indices)}
    activations = kept.num_bytes(len(clips), bf16=bf16, without=constants)
    forward = counter.get_total_flops() / len(clips)
    ranks = settings.scaling.num_workers or 1  # 0 before the run knows its cluster
    learns_from = settings.num_generator_clips / train.micro_batch
    adversarial = (2 if learns_from == 1 else 3 * learns_from) * forward
    if settings.generator.objective == "contrast":
        adversarial = stem[0]
    optimizer = 2 if train.optimizer == "adamw" else 1
    queue = moco.queue_size * (4 * model.embedding_dim + 16)  # with age and video id of each key
    state_bytes = 4 * parameters * (2 + optimizer) + queue
    views = 2 if settings.data.positives == "two_clips" else 1
    batch_bytes = train.global_batch * views * 3 * settings.data.num_frames * _STORED_PIXELS * settings.augment.size**2
    batches = settings.data.batches_ahead + 2  # one that is being read, and one in use
    share = (ranks - 1) / ranks
    keys = 1 + settings.num_reversed / train.micro_batch  # of a clip: some are also encoded backwards
    return StepCost(
        forward_flops=forward,
        num_parameters=parameters,
        activation_bytes=activations,
        flops_before=(3 + keys) * forward * train.global_batch,
        flops_after=((3 + keys) * forward + adversarial / settings.generator.every) * train.global_batch,
        rank_bytes=4 * parameters * (3 + optimizer) + queue + activations * train.micro_batch,
        host_bytes=round(state_bytes + batches * batch_bytes / ranks),
        gradient_bytes=round(2 * share * 4 * parameters),
        key_bytes=round(share * keys * train.global_batch * 4 * model.embedding_dim),
    )


_STORED_PIXELS = 1.75
"""Pixels of a stored frame for each one that the encoder sees: 128 x 171 for 112 x 112, as ingest makes them."""
GPU_PROCESS_BYTES = 3 * 2**29
"""What a process takes of a GPU besides its tensors: CUDA's context and kernels, NCCL's buffers, cuDNN's workspaces.
An estimate: it depends on the driver and was not measured."""
SCORE_SECONDS = 1800.0
"""Longest time in which a checkpoint must be scored; the presets need about a third of it."""
_CLIPS_PER_VIDEO = 20  # 8 for the label-free score, 4 backwards for `arrow`, 8 for kNN where the videos have labels
_MOTION_CLIPS_PER_VIDEO = 20  # 2 to fit the linear probes and 2 to test them, in 5 views
_FLOPS_PER_SECOND = {"cpu": 5e10, "cuda": 1e13}  # of one CPU core (66e9 measured), of one GPU in float32


def scoring_seconds(settings: PretrainSettings, *, num_videos: int) -> float:
    """Estimates how long the score of one checkpoint takes, for videos with labels.

    Args:
        settings: of the run.
        num_videos: held-out videos of the data set; `evaluation.max_videos` of them at most take part.
    """
    evaluation = settings.evaluation
    per_video = _CLIPS_PER_VIDEO + _MOTION_CLIPS_PER_VIDEO * evaluation.motion
    clips = per_video * min(num_videos, evaluation.max_videos)
    speed = _FLOPS_PER_SECOND["cuda"] if evaluation.use_gpu else _FLOPS_PER_SECOND["cpu"] * max(evaluation.num_cpus, 1)
    return clips * step_cost(settings, bf16=False).forward_flops / speed


_SECONDS = 3.0
_CLIPS = {"cpu": 2, "cuda": 16}


@dataclass(frozen=True)
class Speed:
    """Speed of one worker."""

    flops_per_second: float
    """In a forward and backward of the encoder; a product and its sum are two operations."""
    bf16: bool
    """Whether the encoders run in bfloat16 on this machine."""


def measure_speed(settings_json: str) -> Speed:
    """Measures a worker for about 3 seconds: forward and backward of the encoder on clips of zeros, without a data set.

    Args:
        settings_json: `PretrainSettings` as JSON.
    """
    settings = PretrainSettings.model_validate_json(settings_json)
    torch.set_num_threads(settings.scaling.cpus_per_worker)
    device = torch.device("cuda" if settings.scaling.use_gpu else "cpu")
    dtype, _ = autocast_dtype(settings.train.precision, device)
    encoder = MocoEncoder.of(settings, autocast_dtype=dtype)
    encoder = encoder.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    size = settings.augment.size
    shape = (min(settings.train.micro_batch, _CLIPS[device.type]), 3, settings.data.num_frames, size, size)
    clips = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last_3d)
    _once(encoder, clips)  # the first call chooses kernels
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
        torch.cuda.synchronize()  # otherwise only the launch of the kernels is measured
