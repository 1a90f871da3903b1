"""Optimizers against their formulas in plain NumPy, and the learning rate against the paper's figures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from vmoco.config import TrainSettings
from vmoco.train.optimizer import build_optimizer, learning_rate, slot_names, take_step

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


def rates(base: float = 1.0, **fields: object) -> list[float]:
    """The rate of every step of a run at the reference batch of 32."""
    settings = TrainSettings(**({"global_batch": 32} | fields))
    return [learning_rate(step, base, settings) for step in range(settings.steps)]


@pytest.mark.parametrize(("batch", "expected"), [(32, 0.005), (256, 0.04), (16, 0.0025)])
def test_rate_scales_with_the_batch(batch: int, expected: float) -> None:
    """The paper's two figures: 0.005 at 32 and 0.04 at 256; half the batch is half the rate."""
    assert rates(0.005, steps=1, global_batch=batch, schedule="constant") == [pytest.approx(expected)]


def test_steps_of_the_paper() -> None:
    """200 epochs: x0.1 from epoch 120 on and once more from epoch 160 on."""
    expected = [1.0] * 120 + [0.1] * 40 + [0.01] * 40
    assert rates(steps=200, schedule="step") == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 7, 15, 35, 95, 333])
def test_steps_fall_at_whole_shares_of_any_run(steps: int) -> None:
    """In whole numbers: the first step that has three fifths, or four fifths, of the run behind it is the lower one."""
    expected = [0.1 ** ((5 * step >= 3 * steps) + (5 * step >= 4 * steps)) for step in range(steps)]
    assert rates(steps=steps, schedule="step") == pytest.approx(expected)


def test_cosine_falls_from_the_peak_towards_zero() -> None:
    """Half a cosine over the steps after the warm-up: peak at first, half in the middle, never 0 and never rising."""
    found = rates(2.0, steps=110, warmup_steps=10, schedule="cosine")
    assert found[10:] == pytest.approx(1 + np.cos(np.linspace(0, np.pi, 101))[:-1])
    assert found[10] == 2
    assert found[60] == pytest.approx(1)
    assert 0 < found[-1] < 0.001
    assert (np.diff(found[10:]) < 0).all()


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule: str) -> None:
    """The first step moves already; after the last step of the warm-up the rate is the peak, in every schedule."""
    found = rates(3.0, steps=100, warmup_steps=4, schedule=schedule)
    assert found[:5] == pytest.approx([0.75, 1.5, 2.25, 3, 3])


def test_constant_is_constant() -> None:
    """Without a warm-up every step has the same rate."""
    assert set(rates(0.5, steps=50, schedule="constant")) == {0.5}
