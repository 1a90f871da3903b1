"""A clip without colour says nothing of its colours and everything of its shapes."""

from __future__ import annotations

import numpy as np

from vmoco.evaluate.features import mean_colour, without_colour


def clip(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 140, (4, 12, 16, 3), dtype=np.uint8)


def test_a_tint_a_lamp_and_a_filter_are_gone() -> None:
    """Brighter, of more contrast or grey from the start: after rounding, the same clip."""
    grey = np.repeat(clip(0)[..., :1], 3, axis=-1)
    expected = without_colour(grey).astype(int)
    for changed in (grey + 40, (grey * 1.5).astype(np.uint8)):
        assert np.abs(without_colour(changed).astype(int) - expected).max() <= 2
    assert np.ptp(without_colour(clip(1)), axis=-1).max() == 0, "all three channels are one"


def test_all_clips_get_the_same_mean_and_deviation() -> None:
    """Over the whole clip and not per frame, so that a frame that is brighter stays brighter."""
    frames = clip(2)
    frames[0] += 20
    flat = without_colour(frames)[..., 0].astype(float)
    assert abs(flat.mean() - 100) < 1
    assert abs(flat.std() - 55) < 2
    assert flat[0].mean() > flat[1:].mean() + 10


def test_a_clip_of_one_colour_is_no_division_by_zero() -> None:
    """Nothing but the common mean is left of it."""
    assert (without_colour(np.full((2, 4, 4, 3), 7, np.uint8)) == 100).all()


def test_mean_colour_is_the_mean() -> None:
    """Against float64."""
    np.testing.assert_allclose(mean_colour(clip(3)), clip(3).astype(float).reshape(-1, 3).mean(axis=0), rtol=1e-6)
