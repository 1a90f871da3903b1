"""Does G's gradient know what dropping a frame does? `python -m tests.benchmarks.generator_gradient`.

The true effect is the change of G's loss when one more frame of one clip is dropped: every kept frame of every
clip in turn, one at a time. Fixed: 8 clips of 16 frames of real footage at 112 pixels, 4 of them dropped at random,
batch normalisation by the batch, seed 0, r3d_18 with random weights (no trained ones can be fetched).

Correlations are over all kept frames of all clips as they are, and `within_clip` after the mean of each clip is
taken off, because that is all that the softmax of G lets through. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tests.dataset import real_clips
from vmoco.data.augment import normalise
from vmoco.data.footage import fetch
from vmoco.model.generator import drop_frames, frame_fill, importance_gradient, keep_mask
from vmoco.model.loss import adversarial_loss
from vmoco.model.moco import MocoEncoder, running_statistics_kept

NUM_CLIPS, NUM_FRAMES, NUM_DROPPED = 8, 16, 4


def measure(backbone: str, *, size: int, seed: int) -> dict[str, torch.Tensor]:
    """True effects, mask, and what estimators are made of: clips, fill and the gradient by the pixels."""
    frames = torch.from_numpy(real_clips(fetch(), num_clips=NUM_CLIPS, num_frames=NUM_FRAMES, size=size))
    clips = normalise(frames.permute(0, 4, 1, 2, 3).float() / 255)
    torch.manual_seed(seed)
    encoder = MocoEncoder(backbone, embedding_dim=128, head="linear").train()
    encoder = encoder.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    mask = keep_mask(torch.rand(NUM_CLIPS, NUM_FRAMES), NUM_DROPPED)
    fill = frame_fill(clips, "mean")

    def loss(mask: torch.Tensor) -> torch.Tensor:
        return adversarial_loss(encoder(drop_frames(clips, mask, fill)), whole, strength=1.0).sum()

    with running_statistics_kept(encoder):
        with torch.no_grad():
            whole = encoder(clips)
        dropped = drop_frames(clips, mask, fill).requires_grad_()
        before = adversarial_loss(encoder(dropped), whole, strength=1.0).sum()
        (pixels,) = torch.autograd.grad(before, dropped)
        effects = torch.full_like(mask, float("nan"))
        with torch.no_grad():
            for count, (clip, frame) in enumerate(torch.nonzero(mask).tolist()):
                fewer = mask.clone()
                fewer[clip, frame] = 0
                effects[clip, frame] = loss(fewer) - before
                if count % 12 == 11:
                    print(f"{count + 1} of {int(mask.sum())} frames dropped", flush=True)
    return {"effects": effects, "mask": mask, "clips": clips, "fill": fill, "pixels": pixels}


def correlations(found: dict[str, torch.Tensor], estimate: torch.Tensor) -> tuple[float, float]:
    """Of an estimate (B, T) with the true effects: over all kept frames, and within clips."""
    kept = found["mask"] > 0
    pairs = []
    for values in (estimate, found["effects"]):
        only_kept = values.where(kept, torch.nan)
        pairs.append((values[kept], (only_kept - only_kept.nanmean(dim=1, keepdim=True))[kept]))
    together, within = (torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(*pairs, strict=True))
    return together, within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="r3d_18")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="keep the tensors here, to try estimators on")
    arguments = parser.parse_args()
    found = measure(arguments.backbone, size=arguments.size, seed=arguments.seed)
    if arguments.save:
        torch.save(found, arguments.save)
    numbers = {}
    for estimator in ("mask", "pixel_sum"):
        gradient = importance_gradient(found["pixels"], found["clips"], found["fill"], estimator=estimator)
        numbers[estimator] = correlations(found, gradient)
    print(
        json.dumps(
            {name: round(together, 3) for name, (together, _) in numbers.items()}
            | {"within_clip": {name: round(within, 3) for name, (_, within) in numbers.items()}}
        )
    )


if __name__ == "__main__":
    main()
