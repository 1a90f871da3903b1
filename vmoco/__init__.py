"""Distributed self-supervised pretraining of video encoders (VideoMoCo, CVPR 2021) on Ray.

Shape letters, the same everywhere:

    B  clips on this rank          T    frames of a clip     D  width of an embedding
    G  clips over all ranks        H W  pixels               K  length of the queue
       (the global batch)          C    channels             M  clips in a micro-batch

A clip on disk and in a loader is uint8 (T, H, W, C); inside a network it is float (C, T, H, W).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmoco.encoders.package import Encoder

__version__ = "0.2.0"
__all__ = ["__version__", "load_encoder"]


def load_encoder(uri: str) -> Encoder:
    """Loads a pretrained encoder; see `vmoco.encoders.package.load_encoder`."""
    from vmoco.encoders import package  # torch and mlflow are imported on the first call, not with the package

    return package.load_encoder(uri)
