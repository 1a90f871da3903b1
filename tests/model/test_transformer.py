"""Transformers against torchvision's own and slow plain versions; nothing draws from torch's global generator."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import video as torchvision_video
from torchvision.models.video import mvit
from torchvision.models.video.swin_transformer import SwinTransformer3d

from vmoco.architectures import ARCHITECTURES, TRANSFORMERS
from vmoco.model.backbone import Backbone, build_backbone
from vmoco.model.transformer import WindowAttention


def clips(num_frames: int, size: int, *, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, num_frames, size, size, generator=torch.Generator().manual_seed(1))


def pair(name: str, **sizes: int) -> tuple[nn.Module, Backbone]:
    """torchvision's network without its classifier and ours, with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    ours = build_backbone(name, **sizes).eval()
    if name == "swin3d_nano":
        theirs: Any = SwinTransformer3d([2, 4, 4], 16, [1, 1, 2, 1], [1, 2, 4, 8], [8, 7, 7])
    else:
        theirs = getattr(torchvision_video, name)()
    if name == "mvit_v2_s" and sizes:
        theirs = copy.deepcopy(ours.trunk)
        for block in theirs.blocks:
            block.attn.__class__ = mvit.MultiscaleAttention
    theirs.head = nn.Identity()
    for tensor in ours.state_dict().values():  # as if trained: norms and biases of their own
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    theirs.load_state_dict(ours.trunk.state_dict())
    return theirs.eval(), ours


@pytest.mark.parametrize(
    ("name", "num_frames"),
    [
        ("swin3d_nano", 19),  # 10 tokens in time: windows of 8 are shifted and padded
        ("swin3d_nano", 6),  # 3 tokens: the window is cut in time
        pytest.param("swin3d_t", 4, marks=pytest.mark.slow),
        pytest.param("swin3d_s", 2, marks=pytest.mark.slow),
        pytest.param("mvit_v2_s", 16, marks=pytest.mark.slow),
    ],
)
def test_features_are_those_of_torchvision(name: str, num_frames: int) -> None:
    """With the same weights, at the size that torchvision's are for; bit for bit, but MViT's up to rounding."""
    theirs, ours = pair(name)
    with torch.no_grad():
        found, expected = ours(clips(num_frames, 224)), theirs(clips(num_frames, 224))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, expected) or name == "mvit_v2_s"


@pytest.mark.parametrize("window", [(8, 7, 7), (4, 7, 7), (2, 4, 4), (8, 2, 3), (1, 1, 1)])
def test_a_window_has_the_positions_of_its_tokens(window: tuple[int, int, int]) -> None:
    """Entry (i, j) is the row of the table for the distance from token j to token i, by loops over all pairs.

    torchvision's index is the same where the window is cut in time alone, and another where it is cut in space.
    """
    attention = WindowAttention(16, [8, 7, 7], [0, 0, 0], 2)
    table = attention.relative_position_bias_table.detach()
    places = [(t, y, x) for t in range(window[0]) for y in range(window[1]) for x in range(window[2])]
    expected = torch.empty(2, len(places), len(places))
    for i, (t, y, x) in enumerate(places):
        for j, (t2, y2, x2) in enumerate(places):
            expected[:, i, j] = table[((t - t2 + 7) * 13 + (y - y2 + 6)) * 13 + (x - x2 + 6)]
    found = attention.get_relative_position_bias(list(window))
    assert torch.equal(found, expected[None])
    same = torch.equal(super(WindowAttention, attention).get_relative_position_bias(list(window)), found)
    assert same == (window[1:] == (7, 7) or len(places) == 1)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_clips_of_any_length_and_size_are_taken(name: str) -> None:
    """Odd numbers of frames and sizes that are no multiple of a patch too, and the smallest that settings allow."""
    for num_frames, size in ((2, 16), (9, 50)):
        backbone = build_backbone(name, num_frames=num_frames, size=size).eval()
        with torch.no_grad():
            assert backbone(clips(num_frames, size, count=2)).shape == (2, backbone.feature_dim)


@pytest.mark.parametrize(("num_frames", "size"), [(16, 112), (9, 50), (8, 32)])
def test_positions_of_mvit_fit_its_training_clips(monkeypatch: pytest.MonkeyPatch, num_frames: int, size: int) -> None:
    """No table is interpolated for clips of that length and size. Those of others are, in time alone."""
    resized = []

    def interpolate(table: torch.Tensor, *, size: int, mode: str) -> torch.Tensor:
        resized.append((table.shape[2], size))
        return original(table, size=size, mode=mode)

    original = F.interpolate
    monkeypatch.setattr(F, "interpolate", interpolate)
    backbone = build_backbone("mvit_v2_s", num_frames=num_frames, size=size).eval()
    with torch.no_grad():
        backbone(clips(num_frames, size))
        assert resized == []
        backbone(clips(num_frames + 4, size))
    tokens = -(-num_frames // 2)
    assert resized == [(2 * tokens - 1, 2 * (tokens + 2) - 1)] * 16


@pytest.mark.parametrize("sizes", [((3, 5, 4), (3, 3, 1)), ((2, 7, 7), (2, 14, 4)), ((1, 1, 1), (1, 1, 1))])
def test_attention_of_mvit_is_that_of_torchvision(sizes: tuple[tuple[int, int, int], tuple[int, int, int]]) -> None:
    """What is added for positions, for more queries than keys and fewer, also where one is no multiple of the other."""
    of_queries, of_keys = sizes
    torch.manual_seed(0)
    attention = build_backbone("mvit_v2_s", num_frames=4, size=32).trunk.blocks[0].attn
    tables = attention.rel_pos_h, attention.rel_pos_w, attention.rel_pos_t
    queries = torch.randn(2, 1, 1 + math.prod(of_queries), 96)
    expected = mvit._add_rel_pos(
        torch.zeros(2, 1, 1 + math.prod(of_queries), 1 + math.prod(of_keys)), queries, of_queries, of_keys, *tables
    )
    found = attention._positions(queries[:, :, 1:], of_queries, of_keys)
    torch.testing.assert_close(found, expected[:, :, 1:, 1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["swin3d_nano", pytest.param("mvit_v2_s", marks=pytest.mark.slow)])
def test_left_out_branches_are_those_of_a_network_without_them(name: str) -> None:
    """Each clip as torchvision's network gives it alone, where hooks scale its branches; torch's generator stays."""
    theirs, ours = pair(name, num_frames=4, size=32)
    # MViT alone has weights for small clips. torchvision's Swin has other positions in windows that are cut in space.
    inputs = clips(4, 224 if name == "swin3d_nano" else 32, count=2)
    number = 2 * ARCHITECTURES[name].num_blocks
    factors = (torch.rand(2, number, generator=torch.Generator().manual_seed(2)) > 0.4) * 1.6
    before = torch.get_rng_state()
    found = ours.train()(inputs, factors)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn from the global generator"

    blocks = [each for each in theirs.modules() if hasattr(each, "stochastic_depth")]
    assert 2 * len(blocks) == number
    scaled: list[torch.Tensor] = []
    for branch in (branch for block in blocks for branch in (block.attn, block.mlp)):
        branch.register_forward_hook(lambda _, __, output: _scaled(output, scaled.pop(0)))
    for clip in range(2):
        scaled[:] = list(factors[clip])
        with torch.no_grad():
            expected = theirs(inputs[clip : clip + 1])
        assert not scaled
        torch.testing.assert_close(found[clip : clip + 1].detach(), expected, rtol=1e-4, atol=1e-5)
    plain = ours.eval()(inputs)
    assert not torch.allclose(plain, found, atol=1e-3)
    assert torch.equal(ours.train()(inputs, torch.ones(2, number)), plain), "factors of 1 change nothing"
    whole = torch.compile(ours, backend="eager", fullgraph=True)  # one graph, so nothing of it is decided on the host
    assert torch.equal(whole(inputs, factors), found)


def _scaled(output: Any, factor: torch.Tensor) -> Any:
    if isinstance(output, tuple):  # tokens and their shape
        return output[0] * factor, output[1]
    return output * factor


@pytest.mark.parametrize("name", ["swin3d_nano", "mvit_v2_s"])
def test_training_mode_is_evaluation_mode_without_drop_path(name: str) -> None:
    """Nothing is random and nothing depends on the other clips of a batch: each clip is encoded by itself."""
    backbone = build_backbone(name, num_frames=4, size=32)
    inputs = clips(4, 32, count=3)
    with torch.no_grad():
        found = backbone.train()(inputs)
        assert torch.equal(backbone.eval()(inputs), found)
        alone = torch.cat([backbone(clip[None]) for clip in inputs])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
