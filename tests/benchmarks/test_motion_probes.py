"""The rank correlation benchmark: what it keeps, and which clips it takes for one video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
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


def test_an_encoder_is_scored_by_its_weights(tmp_path: Path) -> None:
    """Every score is a number, the same each time; other weights have others."""
    make_data_set(tmp_path / "validation", num_videos=24, num_frames=16, height=48, width=64)

    def scored(seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        tensors = {f"query.backbone.{n}": t.contiguous() for n, t in build_backbone("r3d_nano").state_dict().items()}
        safetensors.torch.save_file(tensors, tmp_path / "arm.safetensors")
        return motion_probes.motion_scores(tmp_path / "arm.safetensors", tmp_path / "validation")

    first = scored(0)
    assert {"arrow", "speed", "order", "retrieval", "effective_rank"} <= set(first)
    assert np.isfinite(list(first.values())).all()
    assert scored(0) == first
    assert scored(1) != first


def test_few_encoders_support_no_claim() -> None:
    """Three have a correlation without an interval, and one that does not vary has none."""
    results = [{"linear_test": 10.0 * seed, "motion": {"arrow": -0.1 * seed, "speed": 0.5}} for seed in range(3)]
    found = motion_probes.rank(results)
    assert (found["encoders"], found["enough"]) == (3, False)
    assert found["ranks"]["arrow"] == {"spearman": -1.0, "low": None, "high": None}
    assert found["ranks"]["speed"]["spearman"] is None
    assert "ranks" not in motion_probes.rank(results[:2])


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
