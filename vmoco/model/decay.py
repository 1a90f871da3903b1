"""Temporal decay: how much a key still counts at its age (VideoMoCo, section 3.3)."""

from __future__ import annotations

import math

import torch


def key_weights(ages: torch.Tensor, decay: float) -> torch.Tensor:
    """t ** age for each key: int64 (K,) -> float32 (K,) in (0, 1]."""
    # In float64: 0.99999 ** 65536 loses three digits in float32.
    return torch.exp(ages.double() * math.log(decay)).float()


def oldest_key_weight(decay: float, *, queue_size: int, global_batch: int, age_unit: str) -> float:
    """Weight of the oldest key of a full queue: what a setting of t really means."""
    oldest = queue_size if age_unit == "key" else math.ceil(queue_size / global_batch)
    return decay**oldest
