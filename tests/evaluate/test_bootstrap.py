"""An interval covers the truth as often as it says, and knows that clips of one video are not independent."""

from __future__ import annotations

import numpy as np
import pytest

from vmoco.evaluate.score import estimate


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 samples of 60 videos, about 95 % of the intervals hold the true mean; between 90 and 99 is let pass."""
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        difficulty = random.beta(2, 2, 60)  # mean 0.5
        right = random.random((60, 4)) < difficulty[:, None]
        found = estimate(right.ravel(), np.repeat(np.arange(60), 4), num_samples=300, seed=trial)
        covered += found.low <= 0.5 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_copies_of_a_clip_make_no_score_surer() -> None:
    """Ten equal clips of each video give the interval of one clip of each."""
    right = np.random.default_rng(1).random(50) < 0.7
    once = estimate(right, np.arange(50))
    assert estimate(np.repeat(right, 10), np.repeat(np.arange(50), 10)) == once
    assert once.value == right.mean()
    assert once.low < once.value < once.high


def test_nothing_measured_is_an_error() -> None:
    """A sentence, no division by zero."""
    with pytest.raises(ValueError, match="no clip was measured"):
        estimate([], [])
