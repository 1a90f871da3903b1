"""Finds the cuts between the shots of a video from how much each frame differs from the one before.

A cut is a change from one frame to the next that is large (CUT_CHANGE) and much larger (CUT_RATIO) than the two changes
before and the two after: fast motion changes all frames, a flash changes two in a row. Dissolves, and cuts to almost
the same picture, are not seen.

Frames are first made grey and four times smaller, which takes away noise and most of the cost. Changes are rounded, so
all machines find the same cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from vmoco.data.frames import Frames

CUT_CHANGE = 10.0
"""Least mean change at a cut, in grey levels."""
CUT_RATIO = 2.0
"""Least ratio of this change to the largest of the two before and the two after, each with one grey level added."""
FACTOR = 4
"""How many times smaller the frames are made that are compared."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

Grey = npt.NDArray[np.float32]


class Watcher:
    """Sees all frames of a video in turn, and keeps how much each differs from the one before."""

    def __init__(self) -> None:
        self.names: list[int] = []
        """Of all frames that were seen."""
        self._changes: dict[int, float] = {}
        self._before: Grey | None = None

    def see(self, name: int, picture: Frames) -> None:
        """Compares a frame, uint8 (H, W, 3), with the one before."""
        (small,) = small_grey(picture[None])
        self.names.append(name)
        if self._before is not None:
            self._changes[name] = written(np.abs(small - self._before).mean())
        self._before = small

    def interrupt(self) -> None:
        """Says that the next frame does not follow the last one."""
        self._before = None

    def changes(self, names: Iterable[int]) -> list[float]:
        """The change of each of these frames from the one before; 0 where no other was before it, or it never came."""
        return [self._changes.get(name, 0.0) for name in names]


def cuts(changes: Sequence[float]) -> list[int]:
    """Places of the cuts: number n means that a cut lies before frame n.

    Args:
        changes: (T - 1,), mean change from each frame to the next, in grey levels.
    """
    found = []
    for place, change in enumerate(changes):
        around = [*changes[max(0, place - 2) : place], *changes[place + 1 : place + 3]]
        if is_cut(change, around):
            found.append(place + 1)
    return found


def is_cut(change: float, around: Sequence[float]) -> bool:
    """Whether a change is a cut, given the two changes before and the two after."""
    return change >= CUT_CHANGE and change >= CUT_RATIO * (max(around, default=0.0) + 1)


def small_grey(pixels: Frames) -> Grey:
    """Frames, uint8 (T, H, W, 3), in grey and four times smaller: float32 (T, h, w), 0 to 255."""
    num_frames, height, width, colours = pixels.shape
    if height % FACTOR == 0:  # no block spans two frames, so all are one picture: half the time
        tall = np.asarray(Image.fromarray(pixels.reshape(num_frames * height, width, colours)).reduce(FACTOR))
        small = tall.reshape(num_frames, height // FACTOR, *tall.shape[1:])
    else:
        small = np.stack([np.asarray(Image.fromarray(frame).reduce(FACTOR)) for frame in pixels])
    grey: Grey = small @ _LUMA
    return grey


def written(value: np.floating) -> float:
    """Rounded, so that all machines write the same: sums differ in their last digits."""
    return float(np.float32(round(float(value), 2)))
