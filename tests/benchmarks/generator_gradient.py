"""Does G's gradient know what dropping a frame does? `python -m tests.benchmarks.generator_gradient`.

The true effect is the change of G's loss when one more frame of one clip is dropped: every kept frame of every
clip in turn, one at a time. Fixed: r3d_18, 8 clips of 16 frames of real footage at 64 pixels, 4 of them dropped at
random, batch normalisation by the batch, seed 0. Weights: after 50 steps of 16 clips of the same footage with frames
dropped at random, as when G starts in training (no trained weights can be fetched), and before the first step.

For r3d_18 both are low (0.12 and 0.15): a whole frame is a large step, and along it the network is far from linear.
Against a step of 1 % of a frame the gradient agrees with the truth to 0.99. For `--backbone r3d_nano`, a shallower
network, `mask` is 0.77 after the 50 steps and 0.57 before them.

Correlations are over all kept frames of all clips, and `within_clip` after the mean of each clip is taken off, because
that is all that the softmax of G lets through. Ends with one JSON line, of the trained weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from tests.dataset import real_clips, real_data_set
from tests.dropping import estimates, true_effects
from vmoco.clip_settings import AugmentSettings
from vmoco.config import GeneratorSettings, MocoSettings, ModelSettings, PretrainSettings, TrainSettings
from vmoco.data.augment import normalise
from vmoco.data.footage import fetch
from vmoco.data.loader import Loader
from vmoco.model.generator import keep_mask
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep

NUM_CLIPS, NUM_FRAMES, NUM_DROPPED = 8, 16, 4
CPU = torch.device("cpu")


def settings_of(backbone: str, *, size: int, steps: int) -> PretrainSettings:
    """MoCo with frames dropped at random: what trains the encoder until G starts."""
    return PretrainSettings(
        augment=AugmentSettings(size=size),
        model=ModelSettings.model_validate({"backbone": backbone}),
        generator=GeneratorSettings(start_percent=100.0, before_start="random"),
        moco=MocoSettings(queue_size=256, momentum=0.99, decay=0.99),
        train=TrainSettings(
            steps=steps, global_batch=16, micro_batch=8, learning_rate=0.05, schedule="cosine", warmup_steps=10
        ),
    )


def correlations(encoder: nn.Module, clips: torch.Tensor, mask: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Of each estimator with the true effects: over all kept frames, and within clips."""
    effects = true_effects(encoder, clips, mask, progress=lambda line: print(line, flush=True))
    kept, found = mask > 0, {}
    for estimator, estimate in estimates(encoder, clips, mask).items():
        together, within = [], []
        for values in (estimate, effects):
            only_kept = values.where(kept, torch.nan)
            together.append(values[kept])
            within.append((only_kept - only_kept.nanmean(dim=1, keepdim=True))[kept])
        found[estimator] = tuple(torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in (together, within))
    return found


def as_numbers(found: dict[str, tuple[float, float]]) -> dict[str, object]:
    numbers: dict[str, object] = {name: round(together, 3) for name, (together, _) in found.items()}
    return numbers | {"within_clip": {name: round(within, 3) for name, (_, within) in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="r3d_18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    footage, size = fetch(), arguments.size
    frames = torch.from_numpy(real_clips(footage, num_clips=NUM_CLIPS, num_frames=NUM_FRAMES, size=size))
    clips = normalise(frames.permute(0, 4, 1, 2, 3).float() / 255)
    torch.manual_seed(0)
    mask = keep_mask(torch.rand(NUM_CLIPS, NUM_FRAMES), NUM_DROPPED)
    settings = settings_of(arguments.backbone, size=size, steps=arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        side = size * 8 // 7  # as 128 is to 112
        manifest = real_data_set(
            Path(folder), footage, num_frames=NUM_FRAMES, height=side, width=side * 4 // 3, max_clips=16
        )
        state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
        at_random = as_numbers(correlations(state.moco.query, clips, mask))
        print(f"random weights: {at_random}", flush=True)
        step = TrainStep(settings, state, CPU)
        for batch in Loader(manifest, settings, rank=0, world_size=1):
            loss = step(batch).numbers()["loss"]
            print(f"step {state.step}/{arguments.steps}  loss {loss:.3f}", flush=True)
    trained = as_numbers(correlations(state.moco.query, clips, mask))
    print(json.dumps(trained | {"random_weights": at_random}))


if __name__ == "__main__":
    main()
