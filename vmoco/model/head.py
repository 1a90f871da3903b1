"""Projection from a feature to the embedding that is compared; thrown away after pretraining."""

from __future__ import annotations

from torch import nn


def build_head(kind: str, feature_dim: int, embedding_dim: int) -> nn.Module:
    """A linear layer (MoCo, VideoMoCo) or two layers with a ReLU between (MoCo v2): (B, feature_dim) -> (B, D)."""
    if kind == "linear":
        return nn.Linear(feature_dim, embedding_dim)
    return nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, embedding_dim))
