"""Temporal decay: how much a key still counts at its age (VideoMoCo, section 3.3)."""

from __future__ import annotations

import math

import torch

from vmoco.config import MocoSettings


def decay_at(step: int, settings: MocoSettings, *, total_steps: int, difference: float) -> float:
    """t at a step, in (0, 1].

    linear and cosine reach decay_end at the last step; step goes there in two equal steps at 60 % and 80 % of the
    run, as the learning rate does. adversarial is e^(L_G) of the previous step without lambda (the authors' journal
    version leaves lambda = 100 in, so that a mean difference of 0.02 gives 0.14).

    Args:
        step: the step about to be taken, counted from 0.
        settings: t at the start, its schedule and its end.
        total_steps: length of the run.
        difference: mean |q - q_real| of the previous step over all clips; 0 before the generator starts.
    """
    start, end = settings.decay, settings.decay_end
    if settings.decay_schedule == "constant":
        return start
    if settings.decay_schedule == "adversarial":
        return math.exp(-difference)
    if settings.decay_schedule == "step":
        return start + (end - start) * ((step >= 0.6 * total_steps) + (step >= 0.8 * total_steps)) / 2
    done = step / max(total_steps - 1, 1)
    if settings.decay_schedule == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return start + (end - start) * done


def key_weights(ages: torch.Tensor, decay: float) -> torch.Tensor:
    """t ** age for each key: int64 (K,) -> float32 (K,) in (0, 1]."""
    # In float64: 0.99999 ** 65536 loses three digits in float32.
    return torch.exp(ages.double() * math.log(decay)).float()


def oldest_key_weight(decay: float, *, queue_size: int, global_batch: int, age_unit: str) -> float:
    """Weight of the oldest key of a full queue: what a setting of t really means."""
    oldest = queue_size if age_unit == "key" else math.ceil(queue_size / global_batch)
    return decay**oldest
