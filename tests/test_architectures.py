"""What the table says of a backbone is what its network is."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from vmoco import config
from vmoco.architectures import ARCHITECTURES
from vmoco.model.backbone import build_backbone


def test_the_table_has_the_backbones_that_settings_take() -> None:
    """All of them, in the order in which `--help` lists them."""
    assert list(ARCHITECTURES) == list(get_args(config.Backbone))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_agrees_with_the_network(name: str) -> None:
    """Kind of normalisation, number of blocks, and whether shapes of weights depend on the clip."""
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        backbone, other = build_backbone(name), build_backbone(name, num_frames=8, size=112)
    modules = list(backbone.modules())
    assert any(isinstance(module, nn.BatchNorm3d) for module in modules) == architecture.batch_norm
    assert any(isinstance(module, nn.LayerNorm) for module in modules) != architecture.batch_norm
    assert sum(hasattr(module, "stochastic_depth") for module in modules) == architecture.num_blocks
    shapes, others = ([tensor.shape for tensor in each.state_dict().values()] for each in (backbone, other))
    assert (shapes != others) == architecture.learns_positions


@pytest.mark.parametrize("name", ["swin3d_t", "swin3d_nano"])
def test_drop_rates_rise_linearly_over_the_blocks(name: str) -> None:
    """Two branches of a block have one rate: 0 in the first block, the rate itself in the last."""
    rates = ARCHITECTURES[name].drop_rates(0.2)
    blocks = ARCHITECTURES[name].num_blocks
    assert rates[::2] == rates[1::2] == pytest.approx([0.2 * block / (blocks - 1) for block in range(blocks)])
    assert ARCHITECTURES[name].drop_rates(0.0) == ARCHITECTURES["r3d_18"].drop_rates(0.2) == []
