"""Nearest clips by cosine, and classification by their votes (Wu et al., CVPR 2018, section 3.4).

The k nearest training clips vote for their label, each with exp(cosine / temperature). Galleries are read block by
block, so memory is bounded for any number of clips.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from vmoco.data.manifest import Manifest
from vmoco.encoders.encoder import Encoder
from vmoco.evaluate.features import clip_features, mean_colours

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

QUERIES = 4096
"""Queries that `classify` looks up at a time."""


def nearest(queries: Features, gallery: Iterable[Features], *, k: int) -> tuple[Features, Labels]:
    """The k most similar rows of a gallery for each query, by inner product, exact.

    Args:
        queries: float32 (Q, D), contiguous; unit rows where a cosine is wanted.
        gallery: its blocks, float32 (n, D) each; rows are numbered across blocks.
        k: neighbours of each query.

    Returns:
        Similarities float32 and rows int64, both (Q, k), the most similar first; if the gallery has fewer than k rows,
        the rest is -inf and row -1.
    """
    import faiss

    best = faiss.ResultHeap(len(queries), k, keep_max=True)
    first = 0
    for block in gallery:
        block = np.ascontiguousarray(block, np.float32)
        similarity, rows = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(D=similarity, I=rows + first)
        first += len(block)
    best.finalize()
    similarity, rows = best.D, best.I
    similarity[rows < 0] = -np.inf
    return similarity, rows


def classify(
    queries: Features, gallery: Iterable[Features], labels: Labels, *, k: int = 200, temperature: float = 0.07
) -> npt.NDArray[np.float64]:
    """Share of the votes that each class gets from the k nearest rows.

    Args:
        queries: float32 (Q, D), unit rows.
        gallery: blocks of the training part, unit rows; it is iterated again for every `QUERIES` queries.
        labels: int64 (N,), classes of the gallery's rows, 0 to C - 1.
        k: neighbours that vote; the complete gallery if it has fewer rows.
        temperature: a lower one gives the nearest neighbours more weight.

    Returns:
        float64 (Q, C); rows add up to 1, and the class of a query is the argmax of its row.
    """
    num_classes = int(labels.max()) + 1
    votes = np.zeros((len(queries), num_classes))
    for first in range(0, len(queries), QUERIES):
        similarity, rows = nearest(queries[first : first + QUERIES], gallery, k=min(k, len(labels)))
        # The largest is subtracted so that exp cannot overflow at low temperatures; the shares stay the same.
        weights = np.exp((similarity.astype(np.float64) - similarity[:, :1]) / temperature)
        for place in range(rows.shape[1]):
            np.add.at(votes, (first + np.arange(len(rows)), labels[rows[:, place]]), weights[:, place])
    shares: npt.NDArray[np.float64] = votes / votes.sum(axis=1, keepdims=True)
    return shares


@dataclass(frozen=True)
class Neighbour:
    """A query clip and the nearest other clip."""

    query: str
    """`video @ seconds` of the query."""
    nearest: str
    """The same for its nearest clip."""
    similarity: float
    """Their cosine, after the mean over the gallery is subtracted."""
    same_video: bool
    """Whether they come from one video."""


@dataclass(frozen=True)
class NearestClips:
    """The nearest other clip of each query, and how often it is of the same video."""

    neighbours: list[Neighbour]
    held_out: bool
    """Whether the queries come from held-out videos; False where no video is held out."""
    gallery_size: int
    """Clips that were searched."""
    same_video: float
    """Share of queries whose nearest clip is of the same video."""
    same_video_by_colour: float
    """The same by mean colour alone: what an encoder must beat to have learned anything."""


def nearest_clips(
    encoder: Encoder, manifest: Manifest, *, max_queries: int = 20, max_gallery: int = 500
) -> NearestClips:
    """Looks up the nearest other clip of held-out clips, among all clips of a data set.

    Args:
        encoder: in evaluation mode.
        manifest: data set.
        max_queries: clips that are looked up, spread evenly over the held-out ones.
        max_gallery: clips that are searched, spread evenly over all; the queries are always among them.
    """
    held_out = np.flatnonzero(manifest.columns(["held_out"])["held_out"].to_numpy())
    candidates = held_out if len(held_out) else np.arange(manifest.num_clips)
    queries = _spread(candidates, max_queries)
    gallery = np.union1d(queries, _spread(np.arange(manifest.num_clips), max_gallery))
    rows = manifest.take(gallery)
    videos = np.asarray(rows["video_id"].to_pylist())
    at = np.searchsorted(gallery, queries)
    features = centred(clip_features(encoder, manifest, rows, progress=print))
    nearest, similarity = nearest_other(features, at)
    by_colour, _ = nearest_other(centred(mean_colours(manifest, rows)), at)
    names = [
        f"{video} @ {seconds:.1f} s"
        for video, seconds in zip(videos, pc.round(rows["start_seconds"], 1).to_pylist(), strict=True)
    ]
    neighbours = [
        Neighbour(names[query], names[found], float(cosine), bool(videos[query] == videos[found]))
        for query, found, cosine in zip(at, nearest, similarity, strict=True)
    ]
    return NearestClips(
        neighbours=neighbours,
        held_out=len(held_out) > 0,
        gallery_size=len(gallery),
        same_video=float(np.mean([neighbour.same_video for neighbour in neighbours])),
        same_video_by_colour=float(np.mean(videos[at] == videos[by_colour])),
    )


def centred(features: Features) -> Features:
    """Unit rows of features without their common mean: (N, D).

    Features after a ReLU share a large positive part, which moves all cosines close to 1.
    """
    apart = features - features.mean(axis=0)
    unit: Features = (apart / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-9)).astype(np.float32)
    return unit


def nearest_other(features: Features, queries: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Features]:
    """The most similar other row of each query row, and its cosine.

    Args:
        features: (N, D), unit rows.
        queries: rows to look up.
    """
    similarity = features[queries] @ features.T  # similarity[i, j] is the cosine of query i and row j
    similarity[np.arange(len(queries)), queries] = -np.inf
    nearest = similarity.argmax(axis=1)
    return nearest, similarity[np.arange(len(queries)), nearest]


def _spread(values: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """At most `count` of the values, evenly spread."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(np.int64)]
