"""The optimizers of the query encoder and of the generator, SGD (paper) or AdamW: what decays, what is clipped, and the
learning rate over training.

torch's fused kernels assume that a gradient has the memory layout of its parameter. If the two differ, CUDA raises an
error (pytorch issue 106951) and a CPU computes wrong weights (seen with torch 2.14; see the test). So `take_step`
changes the layout of gradients first. Fused kernels are used where they are faster: for SGD on GPUs (on CPUs both take
28 ms for r3d_18, with the same bits), for AdamW everywhere (33 ms instead of 105 on 2 cores).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vmoco.config import TrainSettings


def parameter_groups(network: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """The parameters of an encoder for `build_optimizer`: in one group, or those that do not decay in a second one.

    The second one has biases, the scales of normalisation, and what transformers learn about positions
    (`--train.weight-decay-on weights`).
    """
    parameters = list(network.parameters())
    if settings.weight_decay_on == "all" or settings.weight_decay == 0:
        return [{"params": parameters}]
    layers = (layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d))
    decayed = {id(layer.weight) for layer in layers}
    return [
        {"params": [parameter for parameter in parameters if id(parameter) in decayed]},
        {"params": [parameter for parameter in parameters if id(parameter) not in decayed], "weight_decay": 0.0},
    ]


def build_optimizer(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]], settings: TrainSettings, *, device: torch.device
) -> torch.optim.Optimizer:
    """An optimizer of parameters, or of groups of them; its learning rate is set before each step."""
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


def slots_of(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, torch.Tensor]:
    """What an optimizer keeps, by `place.slot`, where `place` counts the parameters of the network.

    Not torch's own numbers, which count group by group: checkpoints must not depend on how parameters are grouped.
    """
    return {
        f"{place}.{slot}": value
        for place, parameter in enumerate(network.parameters())
        for slot, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def load_slots(optimizer: torch.optim.Optimizer, network: nn.Module, slots: Mapping[str, torch.Tensor]) -> None:
    """Gives an optimizer what another one kept (`slots_of`); its learning rate and decay stay its own."""
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number_of = {id(parameter): number for number, parameter in enumerate(grouped)}
    parameters = list(network.parameters())
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in slots.items():
        place, slot = name.split(".", 1)
        parameter = parameters[int(place)]
        # In the memory layout of the parameter, as the optimizer made it.
        laid_out = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        state.setdefault(number_of[id(parameter)], {})[slot] = laid_out
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()  # gradients are scaled, not differentiated
def clip_gradients(network: nn.Module, norm: torch.Tensor, *, largest: float) -> torch.Tensor:
    """Scales the gradients of a network down to a norm, in place. Does not wait for the device.

    Args:
        network: its gradients are the mean over ranks, so all ranks scale alike.
        norm: float32 scalar, the norm of all its gradients together.
        largest: that they have afterwards at most.

    Returns:
        Whether they were longer: bool scalar on the device.
    """
    nn.utils.clip_grads_with_norm_(network.parameters(), largest, norm)
    return norm > largest


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
