"""Video transformers: torchvision's Swin and MViT, with drop path by given numbers, and positions of the right size.

Three things differ from torchvision's own forward. Drop path does not draw from torch's global generator: which branch
is left out of which clip comes in with the clips, as numbers that follow from seeds. Relative positions in a Swin
window that is cut to the size of the clip are those of its tokens (torchvision takes the first rows of the table, which
is right only if the window is cut in time alone). MViT takes clips of any length and size, and makes no index on the
host, which a GPU would wait for. With the same weights and clips that torchvision takes, features are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import video as torchvision_video
from torchvision.models.swin_transformer import PatchMerging
from torchvision.models.video.mvit import MultiscaleAttention
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d

Shape = tuple[int, int, int]
"""Number of tokens along time, height and width."""


class WindowAttention(ShiftedWindowAttention3d):
    """torchvision's attention in windows, with the right positions where the clip is smaller than a window."""

    def get_relative_position_bias(self, window_size: list[int]) -> torch.Tensor:
        """What is added to the attention of each pair of tokens of a window: (1, heads, N, N).

        Args:
            window_size: tokens along time, height and width, N in all; at most those of the network's window.
        """
        time, height, width = window_size
        index = self.relative_position_index.view(*self.window_size, *self.window_size)
        index = index[:time, :height, :width, :time, :height, :width].reshape(-1)
        tokens = time * height * width
        bias: torch.Tensor = self.relative_position_bias_table[index].view(tokens, tokens, -1)
        return bias.permute(2, 0, 1).contiguous().unsqueeze(0)


class PooledAttention(MultiscaleAttention):
    """torchvision's attention of MViTv2 between pooled tokens, without an index that is made on the host."""

    def forward(self, tokens: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, Shape]:
        """(B, 1 + N, C), the class token first, and the shape of N -> the same after pooling of the queries."""
        batch, count, _ = tokens.shape
        parts = self.qkv(tokens).reshape(batch, count, 3, self.num_heads, self.head_dim)
        queries, keys, values = parts.transpose(1, 3).unbind(2)  # (B, heads, 1 + N, C / heads) each
        keys, of_keys = self.pool_k(keys, shape)
        values, _ = self.pool_v(values, shape)
        queries, of_queries = self.pool_q(queries, shape)
        scores = (self.scaler * queries) @ keys.transpose(2, 3)
        # The class token has no place.
        scores[:, :, 1:, 1:] += self._positions(queries[:, :, 1:], of_queries, of_keys)
        found = scores.softmax(dim=-1) @ values
        found[:, :, 1:] += queries[:, :, 1:]
        return self.project(found.transpose(1, 2).reshape(batch, -1, self.output_dim)), of_queries

    def _positions(self, queries: torch.Tensor, of_queries: Shape, of_keys: Shape) -> torch.Tensor:
        """q . (R_t + R_h + R_w) for each pair of places (Li et al., 2022, equation 4): (B, heads, N, N of the keys)."""
        grid = queries.unflatten(2, of_queries)
        tables = (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        time, height, width = (
            torch.einsum(f"bnthwc,{axis}kc->bnthwk", grid, _distances(table, num_queries, num_keys))
            for axis, table, num_queries, num_keys in zip("thw", tables, of_queries, of_keys, strict=True)
        )
        together = height[..., None, :, None] + width[..., None, None, :] + time[..., :, None, None]
        return together.flatten(2, 4).flatten(3)


def _distances(table: torch.Tensor, num_queries: int, num_keys: int) -> torch.Tensor:
    """The row of a table for the distance from each key to each query along one axis: (num_queries, num_keys, C).

    Of keys and queries the fewer ones lie further apart. A table of another length is interpolated.
    """
    rows = 2 * max(num_queries, num_keys) - 1
    if len(table) != rows:
        table = F.interpolate(table.T[None], size=rows, mode="linear")[0].T
    query = torch.arange(num_queries, device=table.device)[:, None] * max(num_keys / num_queries, 1.0)
    key = torch.arange(1 - num_keys, 1, device=table.device) * max(num_queries / num_keys, 1.0)
    return table[(query - key).long()]


class Branches:
    """Scales the residual branches of one forward, in the order of the network.

    Args:
        factors: float32 (B, N), one column for each branch: 0 where it is left out, else 1 / (1 - its rate); None
            leaves out nothing.
    """

    def __init__(self, factors: torch.Tensor | None) -> None:
        self._columns: Iterator[torch.Tensor] | None = None if factors is None else iter(factors.unbind(1))

    def next(self, branch: torch.Tensor) -> torch.Tensor:
        """The next branch, (B, ...), times the factor of each clip."""
        if self._columns is None:
            return branch
        factor = next(self._columns).to(branch.dtype)
        return branch * factor.view(-1, *[1] * (branch.ndim - 1))


def swin_tokens(trunk: Any, clips: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """(B, 3, T, H, W) -> what a Swin pools into its features: (B, feature_dim, T', H', W').

    Args:
        trunk: a `SwinTransformer3d`.
        clips: normalised.
        factors: as for `Branches`.
    """
    branches = Branches(factors)
    tokens = trunk.patch_embed(clips)  # (B, T', H', W', C)
    for stage in trunk.features:
        if isinstance(stage, PatchMerging):
            tokens = stage(tokens)
            continue
        for block in stage:
            tokens = tokens + branches.next(block.attn(block.norm1(tokens)))
            tokens = tokens + branches.next(block.mlp(block.norm2(tokens)))
    maps: torch.Tensor = trunk.norm(tokens).permute(0, 4, 1, 2, 3)
    return maps


def mvit_tokens(trunk: Any, clips: torch.Tensor, factors: torch.Tensor | None) -> tuple[torch.Tensor, Shape]:
    """(B, 3, T, H, W) -> tokens of the last block (B, 1 + N, feature_dim), the class token first; and the shape of N.

    Tables of relative positions are interpolated where the clip has another length or size than those of the weights.

    Args:
        trunk: an `MViT` of the second version.
        clips: normalised.
        factors: as for `Branches`.
    """
    branches = Branches(factors)
    patches = trunk.conv_proj(clips)
    shape: Shape = tuple(patches.shape[2:])
    tokens = trunk.pos_encoding(patches.flatten(2).transpose(1, 2))
    for block in trunk.blocks:
        normed = block.norm1(tokens)
        attended, smaller = block.attn(normed, shape)
        skipped = tokens if block.project is None else block.project(normed)
        skipped = skipped if block.pool_skip is None else block.pool_skip(skipped, shape)[0]
        tokens = skipped + branches.next(attended)
        tokens = tokens + branches.next(block.mlp(block.norm2(tokens)))
        shape = smaller
    return trunk.norm(tokens), shape


# Width of the first stage, blocks and heads of each stage: of torchvision's (Liu et al., 2022), and of a small one.
_SWINS = {
    "swin3d_t": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin3d_s": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swin3d_nano": (16, [1, 1, 2, 1], [1, 2, 4, 8]),
}


def build_swin(name: str) -> SwinTransformer3d:
    """A randomly initialised Swin without its classifier, by the name of its backbone."""
    width, depths, heads = _SWINS[name]
    trunk = SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        window_size=[8, 7, 7],
        stochastic_depth_prob=0.0,  # torchvision's draws from the global generator
    )
    trunk.head = nn.Identity()
    for module in trunk.modules():
        if type(module) is ShiftedWindowAttention3d:
            module.__class__ = WindowAttention  # keeps its parameters and their names
    return trunk


def build_mvit(*, num_frames: int, size: int) -> nn.Module:
    """A randomly initialised MViTv2-S without its classifier (Li et al., 2022), for clips of one length and size.

    Args:
        num_frames: T of the clips that it is trained on.
        size: their height and width, in pixels.
    """
    trunk = torchvision_video.mvit_v2_s(weights=None, stochastic_depth_prob=0.0)
    trunk.head = nn.Identity()
    # Convolutions with padding round up, from the patches (2x4x4) on.
    shape = (math.ceil(num_frames / 2), math.ceil(size / 4), math.ceil(size / 4))
    trunk.pos_encoding.temporal_size, trunk.pos_encoding.spatial_size = shape[0], shape[1:]
    for block in trunk.blocks:
        attention = block.attn
        attention.__class__ = PooledAttention  # keeps its parameters and their names
        queries, keys = (
            [math.ceil(n / stride) for n, stride in zip(shape, pooled.pool.stride, strict=True)]
            for pooled in (attention.pool_q, attention.pool_k)
        )
        for axis, name in enumerate(("rel_pos_t", "rel_pos_h", "rel_pos_w")):
            table, rows = getattr(attention, name), 2 * max(queries[axis], keys[axis]) - 1
            if len(table) != rows:  # torchvision's is for 16x224x224
                fresh = nn.Parameter(torch.empty(rows, table.shape[1]))
                setattr(attention, name, nn.init.trunc_normal_(fresh, std=0.02))
        shape = tuple(queries)
    return trunk
