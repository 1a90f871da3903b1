"""The learning rate over training."""

from __future__ import annotations

import math

from vmoco.config import TrainSettings

# Learning rates are given for this global batch and scaled linearly with it (Goyal et al., 2017).
REFERENCE_BATCH = 32


def learning_rate(step: int, base: float, settings: TrainSettings) -> float:
    """Learning rate of a step, counted from 0.

    Args:
        step: the step about to be taken.
        base: learning rate at a global batch of 32.
        settings: batch, warm-up, schedule and length of the run.
    """
    peak = base * settings.global_batch / REFERENCE_BATCH
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "cosine":
        done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if settings.schedule == "step":  # paper: epochs 120 and 160 of 200
        return peak * 0.1 ** ((step >= 0.6 * settings.steps) + (step >= 0.8 * settings.steps))
    return peak
