"""The optimizers of the query encoder and of the generator, SGD (paper) or AdamW, and the learning rate over training.

torch's fused kernels assume that a gradient has the memory layout of its parameter. If the two differ, CUDA raises an
error (pytorch issue 106951) and a CPU computes wrong weights (seen with torch 2.14; see the test). So `take_step`
changes the layout of gradients first. Fused kernels are used where they are faster: for SGD on GPUs (on CPUs both take
28 ms for r3d_18, with the same bits), for AdamW everywhere (33 ms instead of 105 on 2 cores).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from vmoco.config import TrainSettings


def build_optimizer(
    parameters: Iterable[nn.Parameter], settings: TrainSettings, *, device: torch.device
) -> torch.optim.Optimizer:
    """An optimizer whose learning rate is set before each step."""
    if settings.optimizer == "adamw":
        # betas 0.9 and 0.999, as in Loshchilov and Hutter, 2019
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=settings.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=0.0,
        momentum=settings.sgd_momentum,
        weight_decay=settings.weight_decay,
        fused=True if device.type == "cuda" else None,
    )


def slot_names(settings: TrainSettings) -> set[str]:
    """Names of the tensors that the optimizer keeps for each parameter, from its first step on."""
    if settings.optimizer == "adamw":
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if settings.sgd_momentum > 0 else set()


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Updates the parameters, whatever the memory layout of their gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
    optimizer.step()


# Learning rates are given for this global batch and scaled linearly with it (Goyal et al., 2017).
REFERENCE_BATCH = 32


def learning_rate(step: int, base: float, settings: TrainSettings) -> float:
    """Learning rate of a step, counted from 0.

    Args:
        step: the step about to be taken.
        base: learning rate at a global batch of 32.
        settings: batch, warm-up, schedule and length of the run.
    """
    peak = base * settings.global_batch / REFERENCE_BATCH
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "cosine":
        done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if settings.schedule == "step":  # paper: epochs 120 and 160 of 200
        return peak * 0.1 ** ((step >= 0.6 * settings.steps) + (step >= 0.8 * settings.steps))
    return peak
