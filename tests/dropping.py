"""What dropping a frame really does to the generator's loss, found by dropping it: the truth for estimators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vmoco.model.generator import drop_frames, frame_fill, importance_gradient
from vmoco.model.moco import adversarial_loss, running_statistics_kept


def true_effects(
    encoder: nn.Module, clips: torch.Tensor, mask: torch.Tensor, *, progress: Callable[[str], None] | None = None
) -> torch.Tensor:
    """Change of G's loss when one more frame of one clip is dropped, every kept frame in turn: (B, T), else NaN."""
    fill = frame_fill(clips, "mean")
    effects = torch.full_like(mask, float("nan"))
    kept = torch.nonzero(mask).tolist()
    with torch.no_grad(), running_statistics_kept(encoder):
        whole = encoder(clips)

        def loss(mask: torch.Tensor) -> torch.Tensor:
            return adversarial_loss(encoder(drop_frames(clips, mask, fill)), whole, strength=1.0).sum()

        before = loss(mask)
        for count, (clip, frame) in enumerate(kept, start=1):
            fewer = mask.clone()
            fewer[clip, frame] = 0
            effects[clip, frame] = loss(fewer) - before
            if progress and count % 24 == 0:
                progress(f"{count} of {len(kept)} frames dropped")
    return effects


def estimates(encoder: nn.Module, clips: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each estimator says of the same, from one backward: (B, T)."""
    fill = frame_fill(clips, "mean")
    with running_statistics_kept(encoder):
        with torch.no_grad():
            whole = encoder(clips)
        dropped = drop_frames(clips, mask, fill).requires_grad_()
        loss = adversarial_loss(encoder(dropped), whole, strength=1.0).sum()
    (pixels,) = torch.autograd.grad(loss, dropped)
    return {
        estimator: importance_gradient(pixels, clips, fill, estimator=estimator) for estimator in ("mask", "pixel_sum")
    }
