"""How well scores without labels rank encoders: Spearman's correlation with the labelled linear probe.

    python -m tests.benchmarks.motion_probes

The encoders are those of the runs of the ablation, which scores each when it ends (`motion_scores`): on the validation
part, without its labels, by the three motion probes, their gain over a single frame, retrieval and effective rank. The
truth is the linear probe on the test part, which shares no video with it. Once for all encoders, and once for the arms
alone: without random weights and trunks, which are easily told from the others, they are as alike as the trials of a
sweep. The interval is over encoders that are drawn with replacement. Encoders of one seed start from the same trunk, so
they are not independent and the true interval is wider. With fewer than 12 encoders of a data set the figures are
printed, and `enough` is false: they support no claim. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import scipy.stats
import torch

from tests.benchmarks.ablation_report import FROM_SCRATCH, RESULTS
from vmoco.data.held_out import sources_of
from vmoco.data.manifest import Manifest
from vmoco.data.shard_reader import ClipReader
from vmoco.encoders.encoder import Encoder, Preprocessing
from vmoco.evaluate.features import embed_views, window
from vmoco.evaluate.motion import (
    ENCODER,
    SEEN,
    STILL,
    MotionPlan,
    Views,
    make_views,
    measure_motion,
    plan_motion,
    read_colours,
    split_views,
    still_features,
)
from vmoco.evaluate.score import score
from vmoco.model.backbone import build_backbone

ENOUGH = 12
BACKBONE, SIZE = "r3d_nano", 32  # of the ablation
_DRAWS = 2000
_BATCH = 48


def read_encoder(weights: Path, manifest: Manifest) -> Encoder:
    """The encoder of a run of the ablation; its key encoder, heads and other tensors are left out."""
    tensors, prefix = safetensors.torch.load_file(weights), "query.backbone."
    backbone = build_backbone(BACKBONE)
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    backbone.load_state_dict(own)
    fps = float(manifest.table["fps"][0].as_py())
    return Encoder(backbone, Preprocessing(16, fps, SIZE, standardise=True), {"backbone": BACKBONE}).eval()


def score_encoder(
    encoder: Encoder, manifest: Manifest, chosen: MotionPlan, views: Views, colours: np.ndarray[Any, Any]
) -> dict[str, float]:
    """Every score of an encoder, in one pass over the clips."""
    reader = ClipReader.of(manifest, chosen.rows, crop=True)
    frames, parts = list(reader.several(range(chosen.rows.num_rows))), []
    for first in range(0, len(frames), _BATCH):
        parts.append(embed_views(encoder, frames[first : first + _BATCH], list(views.numbers.values()), colour=False))
    features = split_views(torch.cat(parts).numpy(), list(views.numbers))
    seconds = manifest.frame_shape[0] / chosen.rows["fps"].to_numpy()
    sources = {ENCODER: features, STILL: still_features(features)}
    scores = {}
    for each in measure_motion(sources, chosen, views, clip_seconds=seconds):
        scores[each.probe] = each.by[ENCODER].value
        scores[f"{each.probe}, less single frame"] = each.by[ENCODER].value - each.by[STILL].value
    found = score(
        features[SEEN],
        video_ids=chosen.rows["video_id"].to_pylist(),
        start_seconds=chosen.rows["start_seconds"].to_numpy(),
        clip_seconds=seconds,
        colours=colours.mean(axis=1),
        sources=sources_of(chosen.rows),
    )
    return scores | {"retrieval": found.retrieval.value, "effective_rank": found.effective_rank}


def rank_correlation(scores: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> dict[str, float | None]:
    """Spearman's correlation, None where a score does not vary; with its interval where there are enough encoders."""
    random, drawn = np.random.default_rng(0), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)  # a draw may hold one encoder alone
        value = float(scipy.stats.spearmanr(scores, truth).statistic)
        for _ in range(_DRAWS):
            rows = random.integers(len(scores), size=len(scores))
            drawn.append(float(scipy.stats.spearmanr(scores[rows], truth[rows]).statistic))
    if not np.isfinite(value) or len(scores) < ENOUGH:
        return {"spearman": round(value, 3) if np.isfinite(value) else None, "low": None, "high": None}
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"spearman": round(value, 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def by_place(manifest: Manifest) -> Manifest:
    """The same clips, each place a source of its own: data sets that an earlier ablation made have one for all."""
    table = manifest.table
    column = table.schema.get_field_index("video_sha256")
    return manifest.with_table(table.set_column(column, table.schema.field(column), table["video_id"]))


def motion_scores(weights: Path, part: Path) -> dict[str, float]:
    """The scores without labels of the encoder of a run of the ablation, on a part of its data set."""
    manifest = by_place(Manifest.load(str(part)))
    chosen = plan_motion(manifest)
    colours, _ = read_colours(manifest, chosen.rows)
    encoder = read_encoder(weights, manifest)
    views = make_views(window(encoder, manifest), manifest.frame_shape[0])
    found = score_encoder(encoder, manifest, chosen, views, colours)
    return {name: round(value, 4) for name, value in found.items()}


def rank(results: list[dict[str, Any]]) -> dict[str, Any]:
    """How each score ranks the encoders of a data set; `results` are those of its runs."""
    found: dict[str, Any] = {"encoders": len(results), "enough": len(results) >= ENOUGH}
    if len(results) >= 3:
        truth = np.array([result["linear_test"] for result in results])
        columns = {name: np.array([result["motion"][name] for result in results]) for name in results[0]["motion"]}
        found["ranks"] = {name: rank_correlation(column, truth) for name, column in columns.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS / "runs", help="of the runs of the ablation")
    parser.add_argument("--data", nargs="+", default=["doom", "moments", "camera"], help="data sets")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.data:
        files = sorted((arguments.results / name / "results").glob("*.json"))
        results = [json.loads(path.read_text()) for path in files]
        found[name] = rank(results)
        found[f"{name}, arms"] = rank([result for result in results if result["arm"] not in FROM_SCRATCH])
    for name, each in found.items():
        print(f"\n{name}, {each['encoders']} encoders{'' if each['enough'] else ' (too few for a claim)'}")
        for score_name, ranks in each.get("ranks", {}).items():
            print(f"    {score_name:28} {ranks['spearman']} [{ranks['low']}, {ranks['high']}]")
    print(json.dumps({"benchmark": "motion_probes", "data": found}))


if __name__ == "__main__":
    main()
