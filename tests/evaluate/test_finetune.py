"""Fine-tuning learns what frozen features do not show, is repeatable, and does not change the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dataset import damage_clip, upload
from tests.embeddings import labelled_data_set
from tests.made import encoder_of
from vmoco.data import clip_cache
from vmoco.evaluate import finetune as finetuning
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
    assert any("trained 32/32 steps" in line and line.endswith("0:00 left") for line in said)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    """The same seed gives the same losses; another seed gives other losses."""
    manifest = labelled_data_set(tmp_path, num_videos=12)
    split = find_splits(manifest.table, (1,), protocol="finetune")[0]
    settings = SETTINGS.model_copy(update={"epochs": 2, "batch_size": 4})

    def losses(seed: int) -> list[str]:
        said: list[str] = []
        encoder = encoder_of()
        finetune(encoder, manifest, split, settings, window=window(encoder, manifest), seed=seed, show=said.append)
        return [line for line in said if "loss" in line]

    assert losses(1) == losses(1) != losses(2)


def test_a_divergence_is_said(tmp_path: Path) -> None:
    """The message has the setting to lower."""
    manifest = labelled_data_set(tmp_path, num_videos=12)
    split = find_splits(manifest.table, (1,), protocol="finetune")[0]
    settings = SETTINGS.model_copy(update={"learning_rate": 1e12, "epochs": 4, "batch_size": 4})
    encoder = encoder_of()
    with pytest.raises(ValueError, match=r"diverged in epoch \d: lower --finetune.learning-rate 1e\+12"):
        finetune(encoder, manifest, split, settings, window=window(encoder, manifest), seed=0, show=lambda _: None)


def test_a_damaged_clip_is_refused(tmp_path: Path) -> None:
    """In the training part and in the test part, the message names its shard and what to do."""
    settings = SETTINGS.model_copy(update={"epochs": 2, "batch_size": 4})
    for part in ("train", "test"):
        manifest = labelled_data_set(tmp_path / part, num_videos=6, clips_per_video=1)
        split = find_splits(manifest.table, (1,), protocol="finetune")[0]
        said, encoder = damage_clip(manifest, int(getattr(split, part).argmax())), encoder_of()
        with pytest.raises(ValueError, match=said):
            finetune(encoder, manifest, split, settings, window=window(encoder, manifest), seed=0, show=lambda _: None)


def test_a_remote_data_set_leaves_a_bounded_cache(
    tmp_path: Path, store: Any, vmoco_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses as from this disk, with a cache of a third of the clips, and no file in the temporary folder."""
    manifest = labelled_data_set(tmp_path / "data", num_videos=12)
    far = upload(manifest, "s3://bucket/set")
    split = find_splits(manifest.table, (1,), protocol="finetune")[0]
    settings = SETTINGS.model_copy(update={"epochs": 2, "batch_size": 4})
    bound = sum(manifest.table["num_bytes"].to_pylist()) // 3
    cache = clip_cache.ClipCache(vmoco_home / "cache" / "clips", max_bytes=bound)
    monkeypatch.setattr(finetuning, "cache_for", lambda uri: cache if uri.startswith("s3:") else None)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    said: dict[str, list[str]] = {}
    for each in (manifest, far):
        lines: list[str] = []

        def show(line: str, lines: list[str] = lines) -> None:
            lines.append(line)
            assert not list(temporary.iterdir()), "no copy of a shard"

        encoder = encoder_of()
        finetune(encoder, each, split, settings, window=window(encoder, each), seed=1, show=show)
        said[each.uri] = [line.partition("loss")[2][:6] for line in lines if "loss" in line]
    assert said[far.uri] == said[manifest.uri]
    assert 0 < cache.size() <= bound
