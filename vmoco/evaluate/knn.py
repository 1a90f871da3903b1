"""Classification by the nearest clips of the training part, without any training (Wu et al., CVPR 2018, section 3.4).

The k nearest training clips vote for their label, each with exp(cosine / temperature). Galleries are read block by
block, so memory is bounded however many clips there are.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

QUERIES = 4096
"""Queries that are looked up at a time by `classify`."""


def nearest(queries: Features, gallery: Iterable[Features], *, k: int) -> tuple[Features, Labels]:
    """The k most similar rows of a gallery for each query, by inner product, exact.

    Args:
        queries: float32 (Q, D), contiguous; unit rows where a cosine is wanted.
        gallery: its blocks, float32 (n, D) each; rows are numbered through.
        k: neighbours of each query.

    Returns:
        Similarities float32 and rows int64, both (Q, k), the most similar first; where the gallery has fewer than k
        rows, the rest is -inf and row -1.
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
    """Share of the votes that each class gets from the k nearest.

    Args:
        queries: float32 (Q, D), unit rows.
        gallery: blocks of the training part, unit rows; it can be gone through again for every `QUERIES` queries.
        labels: int64 (N,), classes of the gallery's rows, 0 to C - 1.
        k: neighbours that vote; all of the gallery where it has fewer.
        temperature: of the votes: the lower, the more the nearest count.

    Returns:
        float64 (Q, C); rows add up to 1, and the class of a query is the argmax of its row.
    """
    num_classes = int(labels.max()) + 1
    votes = np.zeros((len(queries), num_classes))
    for first in range(0, len(queries), QUERIES):
        similarity, rows = nearest(queries[first : first + QUERIES], gallery, k=min(k, len(labels)))
        # Less the largest, so that exp cannot overflow at low temperatures; the shares stay the same.
        weights = np.exp((similarity.astype(np.float64) - similarity[:, :1]) / temperature)
        for place in range(rows.shape[1]):
            np.add.at(votes, (first + np.arange(len(rows)), labels[rows[:, place]]), weights[:, place])
    shares: npt.NDArray[np.float64] = votes / votes.sum(axis=1, keepdims=True)
    return shares
