"""Tables of embeddings for tests, made by the task that the actors run, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.dataset import write_data_set
from vmoco.data.manifest import Manifest
from vmoco.data.shard import Clip
from vmoco.encoders.encoder import Encoder
from vmoco.evaluate.embed_items import shard_items
from vmoco.evaluate.embed_task import EmbedTask, Work
from vmoco.evaluate.features import window
from vmoco.evaluate.table import FeatureTable
from vmoco.seed import hash64

CLASSES = ("down", "left", "right", "up")


def labelled_data_set(
    folder: Path, *, num_videos: int = 24, clips_per_video: int = 2, splits: bool = True, size: int = 32
) -> Manifest:
    """Videos whose class is the direction in which a pattern moves; two official splits, or held-out videos."""
    clips = []
    for video in range(num_videos):
        label = CLASSES[video % 4]
        for place in range(clips_per_video):
            random = np.random.default_rng(hash64("labelled", video, place))
            texture = np.kron(random.integers(30, 220, (size // 4, size // 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
            axis, step = {"down": (0, 2), "up": (0, -2), "right": (1, 2), "left": (1, -2)}[label]
            frames = np.stack([np.roll(texture, step * time, axis=axis) for time in range(10)])
            parts = ("train" if video % 3 else "test", "test" if video < 8 else "train", None)
            name = f"{label}-{video:03d}"
            clips.append(
                Clip(
                    f"{hash64(name, place):016x}",
                    name,
                    place * 0.4,
                    25.0,
                    video % 3 == 0,
                    frames,
                    label=label,
                    splits=parts if splits else (None, None, None),
                )
            )
    return write_data_set(folder, clips)


def embedded(
    encoder: Encoder, manifest: Manifest, folder: Path, *, batch_size: int = 5, colour: bool = True
) -> FeatureTable:
    """The table of all clips of a data set."""
    work = Work(output=str(folder), window=window(encoder, manifest), batch_size=batch_size, colour=colour)
    task, items = EmbedTask(encoder, work), shard_items(manifest, manifest.table)
    for item in items:
        made = task(item)
        assert made["error"] == ""
    return FeatureTable(str(folder), [item["part"] for item in items])


def table_of(folder: Path, features: npt.NDArray[np.float32], labels: list[str], *, block: int = 7) -> FeatureTable:
    """A table of given features, one clip per video, in several parts; the first half tests."""
    from vmoco import storage
    from vmoco.evaluate.table import part_bytes, part_uri

    names = []
    for first in range(0, len(features), block):
        rows = [
            {
                "clip_id": f"{row:016x}",
                "video_id": f"v{row:05d}",
                "start_seconds": 0.0,
                "clip_seconds": 1.0,
                "label": labels[row],
                "split_1": "test" if row < len(features) // 2 else "train",
                "held_out": False,
                "source": "none",
                "row": row,
                "sha256": "",
                "colour": [1.0, 2.0, 3.0],
            }
            for row in range(first, min(first + block, len(features)))
        ]
        names.append(f"part-{first:05d}")
        storage.write_atomic(part_uri(str(folder), names[-1]), part_bytes(rows, features[first : first + block]))
    return FeatureTable(str(folder), names)
