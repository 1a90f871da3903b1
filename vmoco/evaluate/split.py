"""Which clips of a data set train and which test, and their classes: the official splits, or the held-out videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vmoco.evaluate.table import SPLITS

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """One way of cutting labelled clips into a training and a test part."""

    name: str
    """`split 1`, or `held out`."""
    train: Mask
    """(N,), over the rows of the table."""
    test: Mask
    """(N,)."""
    labels: npt.NDArray[np.int64]
    """(N,), class of each row, an index into `classes`; -1 without a label."""
    classes: tuple[str, ...]
    video_ids: npt.NDArray[np.object_]
    """(N,)."""

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / len(self.classes)


def find_splits(rows: pa.Table, wanted: Sequence[int] = (), *, protocol: str) -> list[Split]:
    """The splits of a data set.

    Args:
        rows: table with video_id, label, held_out and the columns of the official splits.
        wanted: numbers of official splits; all there are when left out, and the held-out videos where there are none.
        protocol: what needs labels, for errors.

    Raises:
        ValueError: there are no labels, no such split, or a part of it is empty.
    """
    names = np.asarray(rows["label"].to_pylist(), dtype=object)
    labelled = np.array([name is not None for name in names])
    if not labelled.any():
        raise ValueError(
            f"{protocol} needs labels, and no clip of the data set has one: ingest a list with labels, or take "
            "--protocols label-free, which needs none"
        )
    classes = tuple(sorted({name for name in names if name is not None}))
    place = {name: index for index, name in enumerate(classes)}
    labels = np.array([place.get(name, -1) for name in names])
    videos = np.asarray(rows["video_id"].to_pylist(), dtype=object)
    parts = {number: np.asarray(rows[SPLITS[number - 1]].to_pylist(), dtype=object) for number in (1, 2, 3)}
    there = [number for number, part in parts.items() if (part != None).any()]  # noqa: E711 - elementwise
    missing = sorted(set(wanted) - set(there))
    if missing:
        said = f"it has {', '.join(map(str, there))}" if there else "it has none"
        raise ValueError(f"the data set has no official split {missing[0]}: {said}; give the split files to ingest")
    cuts = [(f"split {number}", parts[number] == "train", parts[number] == "test") for number in wanted or there]
    if not cuts:
        held_out = rows["held_out"].to_numpy()
        cuts = [("held out", ~held_out, held_out)]
    splits = []
    for name, train, test in cuts:
        for part, mask in (("training", train & labelled), ("test", test & labelled)):
            if not mask.any():
                raise ValueError(
                    f"{protocol} on {name}: its {part} part has no labelled clip; the data set has "
                    f"{len(set(videos))} videos, {len(set(videos[labelled]))} with a label"
                )
        splits.append(Split(name, train & labelled, test & labelled, labels, classes, videos))
    return splits
