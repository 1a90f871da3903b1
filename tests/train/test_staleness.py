"""The oldest keys are compared with what their own clips give now, in the very view and micro-batch of then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dataset import make_data_set
from tests.train.test_step import CPU, changed
from vmoco.data.loader import Loader
from vmoco.presets import PRESETS
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep
from vmoco.train.system_metrics import oldest_key_similarity


@pytest.mark.parametrize("positives", ["same_clip", "two_clips"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_keys_of_an_encoder_that_stands_still_are_their_own_encodings(
    tmp_path: Path, steps: int, positives: str
) -> None:
    """To the last digits, wherever in the ring of 20 slots the oldest whole batch of 8 is; another clip would show.

    An encoder that has moved since gives less, and looking changes no tensor of the state.
    """
    settings = changed(
        PRESETS["tiny"][1],
        moco={"queue_size": 20, "momentum": 0.0},
        train={"learning_rate": 1e-20, "weight_decay": 0.0},
        generator={"learning_rate": 1e-20},
        data={"positives": positives},
    )
    manifest = make_data_set(tmp_path)
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=1)
    assert oldest_key_similarity(step, state, loader) is None
    for number in range(steps):
        step(loader.batch(number))
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    assert oldest_key_similarity(step, state, loader) == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
    with torch.no_grad():
        _disturb(state)
    moved = oldest_key_similarity(step, state, loader)
    assert moved is not None
    assert moved < 0.999


def _disturb(state: TrainState) -> None:
    """Moves every weight of the key encoder by half of its size, in directions of a fixed draw."""
    random = torch.Generator().manual_seed(0)
    for parameter in state.moco.key.parameters():
        parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=random))
