"""Features of the clips of a data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from vmoco.data.clip_reader import ClipReader, cache_for
from vmoco.data.manifest import Manifest
from vmoco.encoder import Encoder
from vmoco.evaluate.colour import mean_colour, without_colour

Features = npt.NDArray[np.float32]


def clip_features(
    encoder: Encoder,
    manifest: Manifest,
    rows: pa.Table,
    *,
    batch_size: int = 16,
    colour: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Features:
    """Features of clips by a frozen encoder.

    Args:
        encoder: in evaluation mode.
        manifest: data set of the clips.
        rows: rows of its table, in the order of the result.
        batch_size: clips in one forward.
        colour: False shows the encoder the clips `without_colour`.
        progress: takes a line every few seconds.

    Returns:
        float32 (number of rows, feature_dim), unit rows.
    """
    parts: list[Features] = []
    frames = _frames(manifest, rows, encoder.preprocessing.num_frames)
    if not colour:
        frames = map(without_colour, frames)
    started = said = time.monotonic()
    for first in range(0, rows.num_rows, batch_size):
        size = min(batch_size, rows.num_rows - first)
        parts.append(encoder.embed(torch.from_numpy(np.stack([next(frames) for _ in range(size)]))).cpu().numpy())
        now, done = time.monotonic(), first + size
        if progress and now - said > 5:
            said, left = now, round((now - started) / done * (rows.num_rows - done))
            progress(f"features of {done}/{rows.num_rows} clips, {left // 60}:{left % 60:02d} left")
    return np.concatenate(parts)


def mean_colours(manifest: Manifest, rows: pa.Table) -> Features:
    """What colour alone says of clips: their mean red, green and blue, float32 (number of rows, 3)."""
    return np.stack([mean_colour(frames) for frames in _frames(manifest, rows, None)])


def _frames(manifest: Manifest, rows: pa.Table, num_frames: int | None) -> Iterator[npt.NDArray[np.uint8]]:
    """The middle `num_frames` frames of each clip, or all, uint8 (T, H, W, 3)."""
    reader = ClipReader(manifest, rows, cache=cache_for(manifest))
    for clip in range(rows.num_rows):
        stored = reader.frames(clip)
        length = min(num_frames or len(stored), len(stored))
        start = (len(stored) - length) // 2
        yield stored[start : start + length]
