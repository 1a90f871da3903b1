"""What is known of a clip from its pixels alone: how much moves, how light it is, and whether it crosses a cut.

Scores are computed from the stored frames when a shard is made, and are columns of the manifest, so training can choose
by them without a new ingest. Frames are first made four times smaller, which takes away noise and most of the cost; a
JPEG is decoded at that size.

Motion is the mean absolute difference of consecutive stored frames. A camera that shakes or pans counts as motion, and
so does a flickering lamp. The unit is grey levels (0 to 255) from one stored frame to the next, so videos of a higher
frame rate have less of it.

What a cut is, is defined in `cuts.py`; here the changes are those from one stored frame to the next. In joined films,
all clips that were said to have a cut had one, and 98 % of those with one were found; scores take 3 % of the time of
the rest of ingest (`python -m tests.benchmarks.curate`). Which clips are of one shot, `shots.py` says.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from vmoco.data import frames as storing
from vmoco.data.cuts import FACTOR, Grey, cuts, small_grey, written
from vmoco.data.frames import Encoding, Shape, Stored


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of one clip; their names are those of the columns of a manifest."""

    motion: float
    """Mean absolute difference of consecutive frames, in grey levels."""
    brightness: float
    """Mean grey level, 0 to 255."""
    contrast: float
    """Standard deviation of the grey levels of a frame, the mean over all frames."""
    cuts: int
    """Number of cuts between shots inside the clip."""


@dataclasses.dataclass(frozen=True)
class Looked:
    """A clip that was looked at, with what tells whether the next one is of the same shot."""

    scores: Scores
    first: Grey
    """Its first frame, and its last one, as `small_frames`."""
    last: Grey
    head: tuple[float, ...]
    """The first two changes from frame to frame, and the last two."""
    tail: tuple[float, ...]


FIELDS = [
    pa.field("motion", pa.float32()),
    pa.field("brightness", pa.float32()),
    pa.field("contrast", pa.float32()),
    pa.field("cuts", pa.int32()),
    pa.field("shot", pa.int32()),  # number of the shot of the video in which the clip begins (shots.py)
]
"""Columns of a manifest; null for clips that an earlier version made."""


def look(stored: Stored | storing.Frames, encoding: Encoding, shape: Shape) -> Looked:
    """Looks at a clip.

    Args:
        stored: bytes of the clip.
        encoding: how it is stored.
        shape: (T, H, W, C) of the clip.

    Raises:
        ValueError: the bytes are not such a clip.
    """
    small = small_frames(stored, encoding, shape)
    changes = [written(change) for change in np.abs(np.diff(small, axis=0)).mean(axis=(1, 2))]
    scores = Scores(
        motion=written(np.mean(changes)),
        brightness=written(small.mean()),
        contrast=written(small.std(axis=(1, 2)).mean()),
        cuts=len(cuts(changes)),
    )
    return Looked(scores, small[0], small[-1], tuple(changes[:2]), tuple(changes[-2:]))


def small_frames(stored: Stored | storing.Frames, encoding: Encoding, shape: Shape) -> Grey:
    """The frames of a clip in grey and about four times smaller: float32 (T, h, w), 0 to 255.

    Raises:
        ValueError: the bytes are not such a clip.
    """
    if encoding == "jpeg":
        return storing.decode_small(memoryview(stored).cast("B"), shape, factor=FACTOR)  # type: ignore[arg-type]
    pixels = storing.decode(memoryview(stored).cast("B"), encoding, shape)  # type: ignore[arg-type]
    return small_grey(pixels)
