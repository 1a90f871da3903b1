"""How much memory does an evaluation of a million clips take? `python -m tests.benchmarks.gallery [--clips 1000000]`.

Writes a table of unit features in parts, as an evaluation does: as many classes as Kinetics, ten clips of each video,
and 1 % of the videos for the test. Then each protocol runs on it in a separate process. The features alone would take
two gigabytes. The probe is not measured, because it uses at most `max_probe_clips` clips. Ends with one JSON line: the
peak memory and the seconds of each protocol.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np

from vmoco import storage
from vmoco.evaluate.protocols import COLUMNS, MEASURES, find_splits
from vmoco.evaluate.table import FeatureTable, part_bytes, part_uri
from vmoco.job_settings import EvaluateSettings

CLASSES, CLIPS_PER_VIDEO, BLOCK = 400, 10, 4000


def write(folder: str, num_clips: int, width: int) -> None:
    """Writes the table."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(CLASSES, width)).astype(np.float32)
    for first in range(0, num_clips, BLOCK):
        videos = np.arange(first, min(first + BLOCK, num_clips)) // CLIPS_PER_VIDEO
        features = random.standard_normal((len(videos), width), np.float32) + 0.3 * centres[videos % CLASSES]
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        rows = [
            {
                "clip_id": f"{first + at:016x}",
                "video_id": f"v{video:07d}",
                "start_seconds": 1.0 * (at % CLIPS_PER_VIDEO),
                "clip_seconds": 1.0,
                "label": f"class {video % CLASSES:03d}",
                "split_1": "test" if video // CLASSES % 100 == 0 else "train",
                "held_out": False,
                "source": f"shard-{first:07d}",
                "row": at,
                "sha256": "",
                "colour": [1.0, 2.0, 3.0],
            }
            for at, video in enumerate(videos.tolist())
        ]
        storage.write_atomic(part_uri(folder, f"part-{first:07d}"), part_bytes(rows, features))


def measure(folder: str, protocol: str) -> dict[str, float]:
    """Runs one protocol; returns its seconds and the peak memory of this process."""
    began = time.perf_counter()
    table = FeatureTable(folder)
    (split,) = find_splits(table.columns(COLUMNS), protocol="knn")
    found = MEASURES[protocol](table, split, EvaluateSettings(data="-"))[0]
    words = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    mib = int(words.split()[1]) / 2**10
    return {"peak_mib": mib, "seconds": time.perf_counter() - began, "accuracy": float(found.right.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    wanted = parser.parse_args()
    report: dict[str, object] = {"clips": wanted.clips, "feature_mib": wanted.clips * wanted.width * 4 / 2**20}
    with tempfile.TemporaryDirectory() as folder:
        write(folder, wanted.clips, wanted.width)
        for protocol in ("retrieval", "knn"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(measure, (folder, protocol))
            report[protocol] = {name: round(value, 3) for name, value in found.items()}
            print(protocol, report[protocol], flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
