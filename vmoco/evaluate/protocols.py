"""The protocols that need labels, on a table of features of a frozen encoder, and the splits to measure them on.

A split divides the labelled clips into a training and a test part, by the official split files or by the held-out
videos. Every protocol classifies videos and not clips: it first averages the answers for the clips of a video. Features
are read block by block. Nothing here needs Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vmoco.data.coded import strings
from vmoco.evaluate import knn
from vmoco.evaluate.probe import fit_probe
from vmoco.evaluate.table import SPLITS, FeatureTable
from vmoco.job_settings import EvaluateSettings

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """One way of dividing labelled clips into a training and a test part."""

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
        wanted: numbers of official splits; empty uses all of them, or the held-out videos if there are none.
        protocol: name of the protocol that needs labels, for error messages.

    Raises:
        ValueError: there are no labels, there is no such split, or a part of it is empty.
    """
    names = strings(rows["label"])
    labelled = names != None  # noqa: E711 - elementwise
    if not labelled.any():
        raise ValueError(
            f"{protocol} needs labels, and no clip of the data set has one: ingest a list with labels, or give "
            "--protocols label-free, which needs none"
        )
    classes = tuple(sorted({name for name in names if name is not None}))
    place = {name: index for index, name in enumerate(classes)}
    labels = np.array([place.get(name, -1) for name in names])
    videos = strings(rows["video_id"])
    parts = {number: strings(rows[SPLITS[number - 1]]) for number in (1, 2, 3)}
    there = [number for number, part in parts.items() if (part != None).any()]  # noqa: E711 - elementwise
    missing = sorted(set(wanted) - set(there))
    if missing:
        known = f"it has {', '.join(map(str, there))}" if there else "it has none"
        raise ValueError(
            f"--splits {missing[0]}: the data set has no official split {missing[0]}: {known}; give the split files to "
            "jobs/ingest.py"
        )
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


Features = npt.NDArray[np.float32]

COLUMNS = ("video_id", "label", "held_out", *SPLITS)
"""What `find_splits` needs to know of clips."""
RECALL_AT = (1, 5, 10, 20, 50)


@dataclass(frozen=True)
class Measured:
    """What a protocol measured on the test videos of one split."""

    protocol: str
    right: npt.NDArray[np.float64]
    """(V,), 1 for a video that was classified correctly."""
    videos: npt.NDArray[np.object_]
    """(V,)."""
    detail: str = ""
    """Settings that were used or chosen, for the report."""


def measure_knn(table: FeatureTable, split: Split, settings: EvaluateSettings) -> list[Measured]:
    """Accuracy of the nearest neighbours' vote (`knn.classify`)."""
    train = table.blocks(split.train)
    labels = split.labels[split.train]
    shares = (
        knn.classify(queries, train, labels, k=settings.k, temperature=settings.temperature)
        for queries in _chunks(table.blocks(split.test), knn.QUERIES)
    )
    known = np.arange(int(labels.max()) + 1)
    return [_accuracy("knn", shares, known, split, f"k {settings.k}, temperature {settings.temperature:g}")]


def measure_probe(table: FeatureTable, split: Split, settings: EvaluateSettings) -> list[Measured]:
    """Accuracy of a linear classifier (`probe.fit_probe`)."""
    rows = np.flatnonzero(split.train)
    if len(rows) > settings.max_probe_clips:
        rows = rows[np.linspace(0, len(rows) - 1, settings.max_probe_clips).astype(np.int64)]
    chosen = np.zeros(len(split.train), bool)
    chosen[rows] = True
    probe = fit_probe(table.features(chosen), split.labels[chosen], video_ids=list(split.video_ids[chosen]))
    shares = (probe.probabilities(block) for block in table.blocks(split.test))
    return [_accuracy("probe", shares, probe.classes, split, f"C {probe.strength:g}")]


def measure_retrieval(table: FeatureTable, split: Split, settings: EvaluateSettings) -> list[Measured]:
    """R@k: is a training video of the same class among the k nearest of a test video, by the mean of their clips?"""
    gallery, gallery_videos = _video_features(table.blocks(split.train), split.video_ids[split.train])
    queries, videos = _video_features(table.blocks(split.test), split.video_ids[split.test])
    label_of = dict(zip(split.video_ids, split.labels, strict=True))
    gallery_labels = np.array([label_of[video] for video in gallery_videos])
    labels = np.array([label_of[video] for video in videos])
    _, rows = knn.nearest(queries, [gallery], k=min(max(RECALL_AT), len(gallery)))
    hits = gallery_labels[rows] == labels[:, None]
    return [
        Measured(f"retrieval-R@{k}", hits[:, :k].any(axis=1).astype(np.float64), videos)
        for k in RECALL_AT
        if k <= len(gallery)
    ]


MEASURES = {"knn": measure_knn, "probe": measure_probe, "retrieval": measure_retrieval}


def video_right(
    shares: Iterable[npt.NDArray[np.float64]],
    classes: npt.NDArray[np.int64],
    *,
    videos: npt.NDArray[np.object_],
    split: Split,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.object_]]:
    """Which videos are classified correctly by the mean over their clips.

    Args:
        shares: (clips, C), share of each class, block after block.
        classes: (C,), class of each column.
        videos: video of each clip.
        split: has the labels.

    Returns:
        1 or 0 for each video, and the videos, sorted.
    """
    names, members = np.unique(videos, return_inverse=True)
    sums, first = np.zeros((len(names), len(classes))), 0
    for block in shares:
        np.add.at(sums, members[first : first + len(block)], block)
        first += len(block)
    label_of = dict(zip(split.video_ids, split.labels, strict=True))
    truth = np.array([label_of[name] for name in names])
    return (classes[sums.argmax(axis=1)] == truth).astype(np.float64), names


def _accuracy(
    protocol: str,
    shares: Iterable[npt.NDArray[np.float64]],
    classes: npt.NDArray[np.int64],
    split: Split,
    detail: str,
) -> Measured:
    right, videos = video_right(shares, classes, videos=split.video_ids[split.test], split=split)
    return Measured(protocol, right, videos, detail)


def _video_features(
    blocks: Iterable[Features], videos: npt.NDArray[np.object_]
) -> tuple[Features, npt.NDArray[np.object_]]:
    """Unit mean of the features of each video, float32 (V, D), and the videos, sorted."""
    names, members = np.unique(videos, return_inverse=True)
    sums, first = None, 0
    for block in blocks:
        sums = np.zeros((len(names), block.shape[1])) if sums is None else sums
        np.add.at(sums, members[first : first + len(block)], block)
        first += len(block)
    assert sums is not None, "a split has clips"
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)  # in place: there may be many videos
    return sums.astype(np.float32), names


def _chunks(blocks: Iterable[Features], size: int) -> Iterator[Features]:
    """The same rows in blocks of about `size`: each block is compared with the complete gallery."""
    held: list[Features] = []
    for block in blocks:
        held.append(block)
        if sum(map(len, held)) >= size:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)
