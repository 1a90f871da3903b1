"""How sure a score is: intervals by resampling videos.

Clips of one video are not independent, so whole videos are drawn, each with all that was measured on it. The draws
follow from a seed: the same measurements give the same interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmoco.seed import hash64, uniform


@dataclass(frozen=True)
class Estimate:
    """A mean over videos with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def estimate(
    values: npt.ArrayLike, groups: npt.ArrayLike, *, num_samples: int = 1000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean of measurements, and the interval that it keeps to when other videos of the same kind are drawn.

    Args:
        values: (N,), one number per measurement, such as 1 where a clip was classified right.
        groups: (N,), the video of each.
        num_samples: sets of videos that are drawn, with replacement.
        level: share of them whose mean lies inside the interval.
        seed: of the draws.

    Raises:
        ValueError: there is nothing to measure.
    """
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        raise ValueError("there is nothing to estimate: no clip was measured")
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(members, numbers), np.bincount(members)
    means = np.empty(num_samples)
    places = np.arange(len(names), dtype=np.uint64)
    for sample in range(num_samples):
        drawn = (uniform(places, hash64("bootstrap", seed, sample)) * len(names)).astype(np.int64)
        means[sample] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(numbers.mean()), float(low), float(high))
