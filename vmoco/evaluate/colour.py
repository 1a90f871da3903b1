"""Colour, which tells most videos apart and is nothing learned: its mean, and clips from which it was taken.

It is taken from the pixels and not from the features: a feature that depends on colour in any but a linear way would
keep it through every regression.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_MEAN, _DEVIATION = 100.0, 55.0
"""Of the brightness of Kinetics, about."""


def mean_colour(frames: Frames) -> npt.NDArray[np.float32]:
    """Mean red, green and blue of a clip, uint8 (T, H, W, 3) -> float32 (3,), 0 to 255."""
    mean: npt.NDArray[np.float32] = frames.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    return mean


def without_colour(frames: Frames) -> Frames:
    """The clip in grey, with the mean and the deviation of brightness that all clips get: uint8 (T, H, W, 3) -> same.

    What moves and where, and the texture, stay; one factor and one offset serve all frames.
    """
    grey = frames @ _LUMA  # float32 (T, H, W)
    grey = (grey - grey.mean(dtype=np.float64)) * (_DEVIATION / max(float(grey.std(dtype=np.float64)), 1.0)) + _MEAN
    grey = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
