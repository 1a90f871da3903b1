"""Padded channels change nothing but rounding, and nothing outside the forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vmoco.model.backbone import build_backbone
from vmoco.model.moco import running_statistics_kept
from vmoco.model.padding import MULTIPLE, pad_channels

NAMES = ["r2plus1d_nano", "r2plus1d_18"]


class Channels(TorchDispatchMode):
    """Notes the channels of each convolution: in, out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.found += [args[1].shape[1], args[1].shape[0]]
        return func(*args, **(kwargs or {}))


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network in float64, and a copy of it that pads."""
    torch.manual_seed(1)
    plain = build_backbone(name).double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm3d):  # so that a mistake in scale, offset or statistics shows
            for tensor in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(tensor)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    padded = copy.deepcopy(plain)
    pad_channels(padded)
    return plain, padded


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_network_is_the_network(name: str) -> None:
    """Features, gradients of weights and pixels, and running statistics, in each mode of batch normalisation."""
    networks = pair(name)
    for mode in ("train", "kept", "eval"):
        found = []
        for network in networks:
            network.train(mode != "eval")
            network.zero_grad()
            clips = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64, generator=torch.manual_seed(2)).requires_grad_()
            if mode == "kept":
                with running_statistics_kept(network):
                    features = network(clips)
            else:
                features = network(clips)
            features.square().sum().backward()
            gradients = {f"gradient of {name}": each.grad for name, each in network.named_parameters()}
            found.append({"features": features, "pixels": clips.grad, **gradients, **network.state_dict()})
        plain, padded = found
        assert plain.keys() == padded.keys()
        for what, expected in plain.items():
            torch.testing.assert_close(padded[what], expected, rtol=1e-8, atol=1e-10, msg=f"{what} in {mode}")


@pytest.mark.parametrize("name", NAMES)
def test_all_channels_are_multiples_of_8(name: str) -> None:
    """Apart from the colours of the pixels; without padding they are not. A copy pads too, as the key encoder must."""
    plain, padded = pair(name)
    clips = torch.zeros(1, 3, 8, 32, 32, dtype=torch.float64)
    ragged = []
    for network in (plain, padded, copy.deepcopy(padded)):
        with torch.no_grad(), Channels() as channels:
            network(clips)
        assert channels.found[0] == 3
        ragged.append(sum(number % MULTIPLE > 0 for number in channels.found[1:]))
    assert ragged[0] > 2
    assert ragged[1:] == [0, 0]


def test_other_networks_have_nothing_to_pad() -> None:
    """Their class and forward stay as they are."""
    network = build_backbone("r3d_nano")
    before = [type(module) for module in network.modules()]
    pad_channels(network)
    assert [type(module) for module in network.modules()] == before
