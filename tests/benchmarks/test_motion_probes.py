"""The rank correlation benchmark: what it keeps, and which clips it takes for one video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch

from tests.benchmarks import motion_probes
from tests.dataset import make_data_set
from vmoco.data.held_out import sources_of
from vmoco.model.backbone import build_backbone


def test_places_are_sources_of_their_own(tmp_path: Path) -> None:
    """Data sets whose clips all have one file hash count as many videos, and their clips stay as they are."""
    manifest = make_data_set(tmp_path, num_videos=4)
    column = manifest.table.schema.get_field_index("video_sha256")
    same = pa.array(["0"] * manifest.table.num_rows)
    old = manifest.with_table(manifest.table.set_column(column, manifest.table.schema.field(column), same))
    assert len(set(sources_of(old.table))) == 1
    found = motion_probes.by_place(old)
    assert len(set(sources_of(found.table))) == 4
    assert found.table.drop_columns(["video_sha256"]) == manifest.table.drop_columns(["video_sha256"])


def test_scores_are_kept_until_the_weights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start scores no encoder again, except one whose weights are others than those it was scored with."""
    make_data_set(tmp_path / "validation", num_videos=24, num_frames=16, height=48, width=64)
    (tmp_path / "results").mkdir()

    def write(number: int) -> None:
        torch.manual_seed(number)
        tensors = {f"query.backbone.{n}": t.contiguous() for n, t in build_backbone("r3d_nano").state_dict().items()}
        safetensors.torch.save_file(tensors, tmp_path / f"results/arm-seed{number % 10}.safetensors")

    for seed in range(3):
        write(seed)
        result = {"arm": "arm", "seed": seed, "linear_test": 10.0 * seed}
        (tmp_path / f"results/arm-seed{seed}.json").write_text(json.dumps(result))
    scored: list[float] = []

    def score(encoder: Any, *_: Any) -> dict[str, float]:
        scored.append(float(next(encoder.backbone.parameters()).detach().mean()))
        return {"arrow": -float(len(scored)), "speed": 0.5}

    monkeypatch.setattr(motion_probes, "score_encoder", score)
    first = motion_probes.measure(tmp_path, "validation")
    assert len(set(scored)) == 3
    assert first["ranks"]["arrow"] == {"spearman": -1.0, "low": None, "high": None}  # three are too few
    assert first["ranks"]["speed"]["spearman"] is None
    assert motion_probes.measure(tmp_path, "validation") == first
    assert len(scored) == 3
    write(11)
    assert motion_probes.measure(tmp_path, "validation")["scores"][1]["arrow"] == -4
    assert len(scored) == 4


def test_the_interval_holds_the_correlation() -> None:
    """Of 12 or more encoders there is an interval; ranks alone count, not values."""
    truth = np.arange(12.0)
    found = motion_probes.rank_correlation(np.exp(truth), truth)
    assert found == {"spearman": 1.0, "low": 1.0, "high": 1.0}
    noisy = truth.copy()
    noisy[[2, 5]] = noisy[[5, 2]]
    ranks = motion_probes.rank_correlation(noisy, truth)
    assert ranks["spearman"] == round(1 - 6 * (9 + 9) / (12 * 143), 3)  # Spearman's formula without ties
    assert ranks["low"] is not None
    assert ranks["low"] < ranks["spearman"] <= 1
