"""The probe is scikit-learn's logistic regression at the strength that validates best, and never sees the test part."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vmoco.evaluate.probe import fit_probe

CLASSES = 4


def labelled(
    num_videos: int, seed: int, *, width: int = 200, clips: int = 3
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Few samples with many features, of which three depend on the class: here regularisation matters."""
    random = np.random.default_rng(seed)
    classes = np.arange(num_videos) % CLASSES
    centres = np.random.default_rng(99).normal(size=(CLASSES, 3)) * 2
    of_video = random.normal(size=(num_videos, width))
    of_video[:, :3] += centres[classes]
    features = np.repeat(of_video, clips, axis=0) + 0.1 * random.normal(size=(num_videos * clips, width))
    names = [f"video {video}" for video in range(num_videos) for _ in range(clips)]
    return features.astype(np.float32), np.repeat(classes, clips), names


def test_it_is_scikit_learns_fit_on_the_whole_training_part() -> None:
    """Coefficients of a fit from scratch at the chosen strength, on standardised features."""
    features, labels, videos = labelled(60, 0)
    probe = fit_probe(features, labels, video_ids=videos)
    scaled = StandardScaler().fit(features)
    reference = LogisticRegression(C=probe.strength, max_iter=5000).fit(scaled.transform(features), labels)
    test, _, _ = labelled(100, 1)
    assert np.mean(probe.predict(test) == reference.predict(scaled.transform(test))) > 0.99


def test_the_sweep_matters_and_validates_on_other_videos() -> None:
    """The best strength beats the worst on fresh videos, and clips of a fitted video would have hidden that.

    Every validation is below 1: with clips of the same video on both sides, the weakest penalty would be right always.
    """
    features, labels, videos = labelled(60, 0)
    probe = fit_probe(features, labels, video_ids=videos)
    assert probe.validation[probe.strength] == max(probe.validation.values()) < 1
    assert probe.strength < 1, "noise in 197 features wants a strong penalty"
    test, truth, _ = labelled(400, 1)
    weakest = fit_probe(features, labels, video_ids=videos, strengths=[1e4])
    assert (probe.predict(test) == truth).mean() > (weakest.predict(test) == truth).mean()


def test_of_equal_strengths_the_simplest_is_taken() -> None:
    """If all strengths are equally good, the strongest penalty is chosen."""
    features, labels, videos = labelled(40, 2, width=3)
    features[:, :] = np.eye(CLASSES)[labels][:, :3] * 100
    probe = fit_probe(features, labels, video_ids=videos, strengths=[0.1, 1, 10])
    assert set(probe.validation.values()) == {1.0}
    assert probe.strength == 0.1


def test_labels_that_cannot_be_probed_are_refused() -> None:
    """One class, or no class with two videos, is refused."""
    features, labels, videos = labelled(8, 3)
    with pytest.raises(ValueError, match="has one class"):
        fit_probe(features, np.zeros_like(labels), video_ids=videos)
    with pytest.raises(ValueError, match="no class of the training part has two videos"):
        fit_probe(features[:12], labels[:12], video_ids=videos[:12])
