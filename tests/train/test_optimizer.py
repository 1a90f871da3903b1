"""Optimizers against their formulas in plain NumPy, in any memory layout of the gradients."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from vmoco.config import TrainSettings
from vmoco.train.optimizer import build_optimizer, slot_names, take_step

CPU = torch.device("cpu")
RATE, DECAY = 0.01, 0.1

Weights = npt.NDArray[np.float64]


def plain_sgd(weights: Weights, gradients: list[Weights]) -> Weights:
    """Momentum 0.9 over the gradient with its L2 penalty (as Sutskever et al., 2013, but for the rate's place)."""
    velocity = np.zeros_like(weights)
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient + DECAY * weights
        weights = weights - RATE * velocity
    return weights


def plain_adamw(weights: Weights, gradients: list[Weights]) -> Weights:
    """Algorithm 2 of Loshchilov and Hutter (2019)."""
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step, gradient in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, variance = first / (1 - 0.9**step), second / (1 - 0.999**step)
        weights = weights - RATE * mean / (np.sqrt(variance) + 1e-8) - RATE * DECAY * weights
    return weights


@pytest.mark.parametrize(("kind", "plain"), [("sgd", plain_sgd), ("adamw", plain_adamw)])
@pytest.mark.parametrize("strides", ["own", "other"])
def test_steps_follow_the_formula(kind: str, plain, strides: str) -> None:
    """Five steps on a 3-D kernel in channels_last_3d, with gradients laid out like it or not."""
    settings = TrainSettings(steps=9, optimizer=kind, weight_decay=DECAY)
    random = np.random.default_rng(1)
    weights, *gradients = random.normal(size=(6, 16, 8, 3, 3, 3))
    parameter = nn.Parameter(torch.from_numpy(weights).float().contiguous(memory_format=torch.channels_last_3d))
    optimizer = build_optimizer([parameter], settings, device=CPU)
    optimizer.param_groups[0]["lr"] = RATE
    for gradient in gradients:
        layout = torch.channels_last_3d if strides == "own" else torch.contiguous_format
        parameter.grad = torch.from_numpy(gradient).float().contiguous(memory_format=layout)
        assert (parameter.grad.stride() == parameter.stride()) == (strides == "own")
        take_step(optimizer)
    np.testing.assert_allclose(parameter.detach().numpy(), plain(weights, gradients), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"sgd_momentum": 0.0}, {"optimizer": "adamw"}], ids=str)
def test_slots_are_those_that_the_optimizer_makes(fields: dict[str, object]) -> None:
    """What a checkpoint expects is what there is after one step."""
    settings = TrainSettings(steps=9, **fields)
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = build_optimizer([parameter], settings, device=CPU)
    take_step(optimizer)
    made = {name for name, value in optimizer.state_dict()["state"].get(0, {}).items() if value is not None}
    assert made == slot_names(settings)
