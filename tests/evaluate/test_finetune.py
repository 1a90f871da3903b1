"""Fine-tuning learns what frozen features do not tell, is repeatable, and leaves the encoder as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.embeddings import labelled_data_set
from tests.made import encoder_of
from vmoco.evaluate.features import window
from vmoco.evaluate.finetune import finetune
from vmoco.evaluate.protocols import find_splits
from vmoco.job_settings import FinetuneSettings

SETTINGS = FinetuneSettings(
    epochs=16, batch_size=12, learning_rate=0.05, dropout=0.1, min_area=0.9, flip_probability=0, clips_per_video=2
)


def test_it_learns_directions_of_motion(tmp_path: Path) -> None:
    """Textures are new in every clip, so only motion tells the class: well above chance on videos never seen."""
    manifest = labelled_data_set(tmp_path, num_videos=48)
    encoder = encoder_of()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    split = find_splits(manifest.table, (1,), protocol="finetune")[0]
    said: list[str] = []
    found = finetune(encoder, manifest, split, SETTINGS, window=window(encoder, manifest), seed=0, show=said.append)
    assert len(found.right) == 16
    assert found.right.mean() > 0.6, "chance is 0.25"
    assert "epoch 16/16" in said[-1]
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    """Twice the same losses; another seed, others."""
    manifest = labelled_data_set(tmp_path, num_videos=12)
    split = find_splits(manifest.table, (1,), protocol="finetune")[0]
    settings = SETTINGS.model_copy(update={"epochs": 2, "batch_size": 4})

    def losses(seed: int) -> list[str]:
        said: list[str] = []
        encoder = encoder_of()
        finetune(encoder, manifest, split, settings, window=window(encoder, manifest), seed=seed, show=said.append)
        return said

    assert losses(1) == losses(1) != losses(2)


def test_a_divergence_is_said(tmp_path: Path) -> None:
    """With the setting to lower."""
    manifest = labelled_data_set(tmp_path, num_videos=12)
    split = find_splits(manifest.table, (1,), protocol="finetune")[0]
    settings = SETTINGS.model_copy(update={"learning_rate": 1e12, "epochs": 4, "batch_size": 4})
    encoder = encoder_of()
    with pytest.raises(ValueError, match=r"diverged in epoch \d: lower --finetune.learning-rate 1e\+12"):
        finetune(encoder, manifest, split, settings, window=window(encoder, manifest), seed=0, show=lambda _: None)
