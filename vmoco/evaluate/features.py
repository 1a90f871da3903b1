"""Features of the clips of a data set: which frames an encoder sees, and clips without colour.

Colour alone tells most videos apart, so finding a video by its colour does not show that an encoder has learned
anything. Colour is removed from the pixels and not from the features: a regression on features would remove only what
depends on colour linearly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from vmoco.data.clip_cache import ClipCache, cache_for
from vmoco.data.manifest import Manifest
from vmoco.data.mixture import Mixture
from vmoco.data.shard_reader import ClipReader
from vmoco.encoders.encoder import Encoder
from vmoco.progress import Progress

Frames = npt.NDArray[np.uint8]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_MEAN, _DEVIATION = 100.0, 55.0
"""Close to the mean and the deviation of the brightness in Kinetics."""


def mean_colour(frames: Frames) -> npt.NDArray[np.float32]:
    """Mean red, green and blue of a clip, uint8 (T, H, W, 3) -> float32 (3,), 0 to 255."""
    mean: npt.NDArray[np.float32] = frames.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    return mean


def without_colour(frames: Frames) -> Frames:
    """The clip in grey, with the same mean and deviation of brightness for every clip: uint8 (T, H, W, 3) -> same.

    Motion and texture stay: one factor and one offset apply to all frames.
    """
    grey = frames @ _LUMA  # float32 (T, H, W)
    grey = (grey - grey.mean(dtype=np.float64)) * (_DEVIATION / max(float(grey.std(dtype=np.float64)), 1.0)) + _MEAN
    grey = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """Which frames of a stored clip an encoder sees: `num_frames` in its middle, `stride` apart."""

    num_frames: int
    stride: int
    note: str = ""
    """Warning that the frame rate differs from that of the encoder's training; empty if it does not."""

    @property
    def span(self) -> int:
        """Number of stored frames from the first to the last one that the encoder sees."""
        return (self.num_frames - 1) * self.stride + 1

    def numbers(self, num_stored: int, *, start: int | None = None) -> range:
        """The frames to take from a clip of `num_stored` frames, beginning at `start`; None takes the middle."""
        start = (num_stored - self.span) // 2 if start is None else start
        return range(start, start + self.span, self.stride)


def window(encoder: Encoder, manifest: Manifest) -> Window:
    """The frames of each clip that are most like an encoder's training clips.

    Raises:
        ValueError: the clips of the data set are too short for it.
    """
    expected, stored = encoder.preprocessing, manifest.frame_shape[0]
    fps = Mixture.of(manifest).fps
    if stored < expected.num_frames:
        raise ValueError(
            f"data set {manifest.uri} has clips of {stored} frames, and this encoder was trained on "
            f"{expected.num_frames}: make a data set with jobs/ingest.py --num-frames {expected.num_frames}"
        )
    stride = encoder.stride(fps)
    while (expected.num_frames - 1) * stride + 1 > stored:
        stride -= 1
    note = ""
    if not 2 / 3 < fps / stride / expected.fps < 3 / 2:
        note = (
            f"the encoder was trained at {expected.fps:.3g} frames per second and sees {fps / stride:.3g} here, "
            f"because a stored clip has {stored} frames at {fps:.3g}: ingest with more frames, or another stride, for "
            "a fair comparison"
        )
    return Window(expected.num_frames, stride, note)


def clip_features(
    encoder: Encoder,
    manifest: Manifest,
    rows: pa.Table,
    *,
    batch_size: int = 16,
    colour: bool = True,
    cache: ClipCache | None = None,
    numbers: Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Features:
    """Features of clips by a frozen encoder, in this process.

    Args:
        encoder: in evaluation mode.
        manifest: data set of the clips.
        rows: rows of its table, in the order of the result.
        batch_size: clips in one forward.
        colour: False removes the colour of clips first (`without_colour`).
        cache: cache for the clips of a remote data set; None uses the default one.
        numbers: numbers of the stored frames that the encoder sees, in order; None uses its `window`.
        progress: called with a progress line every few seconds.

    Returns:
        float32 (number of rows, feature_dim), unit rows.

    Raises:
        ValueError: the clips of the data set are too short for the encoder, or a clip is damaged.
    """
    parts: list[torch.Tensor] = []
    if numbers is None:
        numbers = window(encoder, manifest).numbers(manifest.frame_shape[0])
    frames = _frames(manifest, rows, numbers, cache=cache)
    if not colour:
        frames = map(without_colour, frames)
    printed = Progress(progress or _ignore, "features  computed", total=rows.num_rows, unit="clips", every_seconds=5)
    for first in range(0, rows.num_rows, batch_size):
        size = min(batch_size, rows.num_rows - first)
        parts.append(embed_batch(encoder, [next(frames) for _ in range(size)]))
        printed.add(size)
    return torch.cat(parts).numpy()


def _ignore(line: str) -> None:
    """Prints nothing."""


def embed_batch(encoder: Encoder, clips: Sequence[Frames]) -> torch.Tensor:
    """Features of clips (T, H, W, 3), float32 (number of clips, feature_dim) on the CPU; heights and widths may differ.

    Clips of different sizes are prepared one by one, and then go through the network together.
    """
    if len({frames.shape for frames in clips}) == 1:
        return encoder.embed(np.stack(clips), batch_size=len(clips)).cpu()
    return torch.cat(encoder.embed(list(clips), batch_size=len(clips))).cpu()


def embed_views(
    encoder: Encoder, clips: Sequence[Frames], views: Sequence[Sequence[int]], *, colour: bool
) -> torch.Tensor:
    """Features of several views of stored clips, float32 (number of clips, number of views * feature_dim), on the CPU.

    Colour is removed from the complete stored clip, not from each view: otherwise the brightness of a frame would
    depend on which other frames the view shows.

    Args:
        encoder: in evaluation mode.
        clips: all stored frames of each, uint8 (T, H, W, 3).
        views: numbers of the frames that each view shows, in order.
        colour: False removes the colour of clips first (`without_colour`).
    """
    shown = clips if colour else [without_colour(frames) for frames in clips]
    return torch.cat([embed_batch(encoder, [frames[list(view)] for frames in shown]) for view in views], dim=1)


def mean_colours(manifest: Manifest, rows: pa.Table, *, cache: ClipCache | None = None) -> Features:
    """Mean red, green and blue of clips, float32 (number of rows, 3): what an encoder must beat.

    The arguments are those of `clip_features`.

    Raises:
        ValueError: a clip is damaged.
    """
    return np.stack([mean_colour(frames) for frames in _frames(manifest, rows, cache=cache)])


def _frames(
    manifest: Manifest, rows: pa.Table, numbers: Sequence[int] | None = None, *, cache: ClipCache | None
) -> Iterator[Frames]:
    """The frames of each clip without their padding, uint8 (T, H, W, 3)."""
    reader = ClipReader.of(manifest, rows, crop=True, cache=cache or cache_for(manifest.uri))
    return reader.several(range(rows.num_rows), itertools.repeat(numbers))
