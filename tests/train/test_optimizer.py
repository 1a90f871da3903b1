"""Optimizers against their formulas in plain NumPy, and the learning rate against the paper's figures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from vmoco.config import TrainSettings
from vmoco.model.backbone import build_backbone
from vmoco.model.moco import MocoEncoder
from vmoco.train.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    load_slots,
    parameter_groups,
    slot_names,
    slots_of,
    take_step,
)

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


@pytest.mark.parametrize("name", ["swin3d_nano", "mvit_v2_s", "r2plus1d_nano"])
def test_only_weights_of_layers_decay_if_asked_for(name: str) -> None:
    """By the names of torchvision: not biases, normalisation, the class token and tables of positions. By default all.

    With a gradient of zero, a step of AdamW multiplies what decays by 1 - rate * decay, and leaves the rest.
    """
    encoder = MocoEncoder(name, embedding_dim=8, head="mlp", num_frames=4, size=32)
    names = [name for name, _ in encoder.named_parameters()]
    positions = ("relative_position_bias_table", "rel_pos_t", "rel_pos_h", "rel_pos_w", "class_token")
    kept = {name for name in names if name.endswith(("bias", *positions)) or "norm" in name}
    if name == "r2plus1d_nano":
        kept |= {name for name, tensor in encoder.named_parameters() if tensor.ndim == 1}
    assert 0 < len(kept) < len(names)
    for on, still in (("weights", kept), ("all", set())):
        settings = TrainSettings(steps=9, optimizer="adamw", weight_decay=DECAY, weight_decay_on=on)
        optimizer = build_optimizer(parameter_groups(encoder, settings), settings, device=CPU)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        before = {}
        for name, parameter in encoder.named_parameters():
            parameter.data.fill_(1.0)
            parameter.grad, before[name] = torch.zeros_like(parameter), parameter.detach().clone()
        take_step(optimizer)
        for name, parameter in encoder.named_parameters():
            expected = before[name] * (1 if name in still else 1 - RATE * DECAY)
            torch.testing.assert_close(parameter.detach(), expected, msg=f"{name} with --train.weight-decay-on {on}")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_slots_belong_to_parameters_and_not_to_groups(optimizer: str) -> None:
    """What an optimizer of one group kept, one of two groups takes over, parameter by parameter, and the other way."""
    network = build_backbone("swin3d_nano")
    for number, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    kept = {}
    for on in ("all", "weights"):
        settings = TrainSettings(steps=9, optimizer=optimizer, weight_decay_on=on, weight_decay=1e-30)
        made = build_optimizer(parameter_groups(network, settings), settings, device=CPU)
        take_step(made)
        kept[on] = slots_of(made, network)
        other = TrainSettings(steps=9, optimizer=optimizer, weight_decay_on="weights" if on == "all" else "all")
        taken = build_optimizer(parameter_groups(network, other), other, device=CPU)
        load_slots(taken, network, kept[on])
        found = slots_of(taken, network)
        assert found.keys() == kept[on].keys()
        assert all(torch.equal(found[name], value) for name, value in kept[on].items())
        assert [group["weight_decay"] for group in taken.param_groups] == [1e-4, 0.0][: len(taken.param_groups)]
    slot = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
    first = {name: float(value.flatten()[0]) for name, value in kept["all"].items() if name.endswith(f".{slot}")}
    factor = 1.0 if optimizer == "sgd" else 0.1
    assert first == {f"{n}.{slot}": pytest.approx(factor * n) for n in range(len(list(network.parameters())))}
    assert kept["weights"].keys() == kept["all"].keys()


@pytest.mark.parametrize("largest", [0.5, 1e9])
def test_clipping_is_that_of_torch_and_says_whether_it_did(largest: float) -> None:
    """The same bits as torch's own function; a gradient that is short enough stays as it is."""
    networks = [MocoEncoder("r3d_nano", embedding_dim=8, head="linear") for _ in range(2)]
    for mine, theirs in zip(*(network.parameters() for network in networks), strict=True):
        mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(mine.numel()))
        theirs.grad = mine.grad.clone()
    before = [parameter.grad.clone() for parameter in networks[0].parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(before)
    clipped = clip_gradients(networks[0], norm, largest=largest)
    nn.utils.clip_grad_norm_(networks[1].parameters(), largest)
    found = [parameter.grad for parameter in networks[0].parameters() if parameter.grad is not None]
    for one, other in zip(found, networks[1].parameters(), strict=True):
        assert torch.equal(one, other.grad)
    assert bool(clipped) == (float(norm) > largest) == (largest == 0.5)
    assert float(torch.nn.utils.get_total_norm(found)) == pytest.approx(min(largest, float(norm)), rel=1e-4)


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
