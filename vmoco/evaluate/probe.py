"""Linear probe: a logistic regression on frozen features. Its regularisation is chosen within the training part.

A fifth of the training videos of each class (by a hash of their names) validates each strength; the test part is not
used. The chosen strength is then fitted again on the complete training part.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vmoco.seed import hash64

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

STRENGTHS = tuple(10.0**power for power in range(-4, 5))
"""Inverse strengths of the L2 penalty (scikit-learn's C) that are tried."""
_MAX_ITERATIONS = 500


@dataclass(frozen=True)
class Probe:
    """A fitted probe."""

    model: Any
    """scikit-learn pipeline: standardises, then classifies."""
    strength: float
    """C that validated best."""
    validation: dict[float, float]
    """Accuracy on the validation part for each C."""

    def predict(self, features: Features) -> Labels:
        """Class of each row, int64 (Q,)."""
        predicted: Labels = self.model.predict(features)
        return predicted

    def probabilities(self, features: Features) -> npt.NDArray[np.float64]:
        """Share of each class in the order of `classes`, float64 (Q, number of classes)."""
        shares: npt.NDArray[np.float64] = self.model.predict_proba(features)
        return shares

    @property
    def classes(self) -> Labels:
        """The classes that it was fitted on, sorted."""
        known: Labels = self.model[-1].classes_
        return known


def fit_probe(
    features: Features, labels: Labels, *, video_ids: Sequence[str], strengths: Sequence[float] = STRENGTHS
) -> Probe:
    """Fits the probe.

    Args:
        features: float32 (N, D) of the training part.
        labels: int64 (N,).
        video_ids: video of each row: clips of one video are never on both sides of the validation.
        strengths: values of C to try. The smallest of the best is chosen, because it is the simplest model.

    Raises:
        ValueError: there is only one class, or no class has two videos.
    """
    if len(np.unique(labels)) < 2:
        raise ValueError("the training part has one class, and a probe needs two: check the labels of the data set")
    validating = _validating(labels, np.asarray(video_ids, dtype=object))
    if not validating.any():
        raise ValueError(
            "no class of the training part has two videos, and a linear probe keeps some to choose its "
            "regularisation: give it more labelled videos"
        )
    model = _model()
    validation: dict[float, float] = {}
    for strength in sorted(strengths):
        # Each fit starts from the one before: the optimum moves little from C to C.
        _fit(model, features[~validating], labels[~validating], strength=strength)
        validation[strength] = float((model.predict(features[validating]) == labels[validating]).mean())
    best = max(validation, key=lambda strength: (validation[strength], -strength))
    return Probe(_fit(_model(), features, labels, strength=best), best, validation)


def _validating(labels: Labels, video_ids: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
    """Which rows validate: those of a fifth of the videos of each class, at least one, by a hash of their names."""
    chosen: set[str] = set()
    for label in np.unique(labels):
        videos = sorted(set(video_ids[labels == label]), key=lambda video: hash64("probe validation", video))
        chosen.update(videos[: min(max(len(videos) // 5, 1), len(videos) - 1)])
    return np.isin(video_ids, list(chosen))


def _model() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True))


def _fit(model: Any, features: Features, labels: Labels, *, strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    model[-1].set_params(C=strength)
    with warnings.catch_warnings():
        # With almost no penalty the optimum is far away, and the last iterations change no prediction.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels)
