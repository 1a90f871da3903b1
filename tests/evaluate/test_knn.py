"""Nearest neighbours equal scikit-learn's for any division of the gallery into blocks; votes follow the paper."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from vmoco.evaluate.knn import classify, nearest


def unit(rows: int, seed: int, width: int = 24) -> np.ndarray:
    features = np.random.default_rng(seed).normal(size=(rows, width))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("block", [7, 100, 1000])
def test_neighbours_are_exact_in_any_blocks(block: int) -> None:
    """The same rows in the same order as scikit-learn finds by brute force."""
    gallery, queries = unit(300, 0), unit(40, 1)
    similarity, rows = nearest(queries, [gallery[i : i + block] for i in range(0, 300, block)], k=9)
    reference = NearestNeighbors(n_neighbors=9, metric="cosine", algorithm="brute").fit(gallery)
    distance, expected = reference.kneighbors(queries)
    assert np.array_equal(rows, expected)
    np.testing.assert_allclose(similarity, 1 - distance, atol=1e-5)


def test_a_gallery_smaller_than_k_says_so() -> None:
    """Places without a neighbour are row -1 at -inf."""
    similarity, rows = nearest(unit(2, 0), [unit(2, 1), unit(1, 2)], k=5)
    assert (np.sort(rows, axis=1)[:, 2:] == [0, 1, 2]).all()
    assert (rows[:, 3:] == -1).all()
    assert np.isneginf(similarity[:, 3:]).all()


def test_votes_are_the_papers() -> None:
    """They equal scikit-learn's with the weights exp(cosine / 0.07), class by class."""
    gallery, queries = unit(500, 3), unit(60, 4)
    labels = np.random.default_rng(5).integers(0, 7, 500)
    reference = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(gallery, labels)
    found = classify(queries, [gallery[:123], gallery[123:]], labels, k=20, temperature=0.07)
    np.testing.assert_allclose(found, reference.predict_proba(queries), atol=1e-4)


def test_a_low_temperature_is_the_single_nearest() -> None:
    """exp(1 / 0.0001) would overflow; the nearest decides."""
    gallery, queries = unit(50, 6), unit(20, 7)
    labels = np.arange(50)
    _, rows = nearest(queries, [gallery], k=1)
    assert np.array_equal(classify(queries, [gallery], labels, k=50, temperature=1e-4).argmax(axis=1), rows[:, 0])
