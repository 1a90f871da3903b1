"""Makes the stored picture of a decoded frame: scaled, cropped, turned and mirrored, as a player shows it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation, VideoReformatter

from vmoco.data.frames import Frames
from vmoco.data.ledger import VideoError

Matrix = tuple[int, int, int, int]
"""(a, b, c, d) of a display matrix: x to the right and y down go to (a x + c y, b x + d y)."""


def is_turned(matrix: Matrix) -> bool:
    """Whether the picture is shown with its height and width exchanged."""
    a, b, c, d = matrix
    return abs(b) + abs(c) > abs(a) + abs(d)


def is_mirrored(matrix: Matrix) -> bool:
    """Whether the picture is shown mirrored, also where it is turned too."""
    a, b, c, d = matrix
    return a * d < b * c


def upright(picture: Frames, matrix: Matrix) -> Frames:
    """The picture as a player shows it, turned to the nearest quarter; a view.

    Args:
        picture: uint8 (H, W, 3), as it is coded.
        matrix: Of its frame.
    """
    a, b, c, d = matrix
    if is_turned(matrix):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _display_matrix(frame: Any) -> Matrix:
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    values = np.frombuffer(data, np.int32).tolist()
    return values[0], values[1], values[3], values[4]


MAX_PIXELS = 8192 * 4352
"""Pixels of the largest frame, decoded or scaled: a damaged header may state any size, and memory must hold it."""

# swscale's bilinear filter widens when it shrinks a frame, so it is antialiased: with chroma at full width it is within
# 52 to 58 dB of torch's antialiased resize of the RGB frame (area: 38 to 53 dB, 20 % faster; decoding takes 2 to 5
# times as long as either). With the last two flags it gives the same bytes on every CPU.
SCALING = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class Scaler:
    """Scales the frames of one video to cover height x width."""

    def __init__(self, *, height: int, width: int) -> None:
        self._height, self._width = height, width
        self.pixel_aspect: Fraction | None = None
        self.notes: set[str] = set()
        """What was done to the frames beyond scaling, as in `Timeline.notes`."""
        self._reformatter = VideoReformatter()  # keeps swscale's tables from frame to frame
        self._covers: dict[tuple[int, int, int], tuple[int, int]] = {}
        self._matrices: dict[int, Matrix] = {}

    def scale(self, frame: Any) -> Frames:
        """The frame as it is stored, turned upright and cropped in the middle: uint8 (H, W, 3), RGB."""
        matrix = self._matrix(frame)
        turned = is_turned(matrix)
        height, width = (self._width, self._height) if turned else (self._height, self._width)
        shape = (frame.width, frame.height, turned)
        tall, wide = self._covers.get(shape) or self._covers.setdefault(shape, self._cover(frame, height, width))
        # One pass from the codec's colours at full size to RGB at the small size; one thread, as for decoding.
        scaled = self._reformatter.reformat(
            frame, width=wide, height=tall, format="rgb24", interpolation=SCALING, threads=1
        )
        plane = scaled.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:tall, : wide * 3]
        top, left = (tall - height) // 2, (wide - width) // 2
        if is_mirrored(matrix):
            self.notes.add("mirrored: its display matrix mirrors the picture")
        return upright(rows.reshape(tall, wide, 3)[top : top + height, left : left + width], matrix)

    def _matrix(self, frame: Any) -> Matrix:
        # Looked up once for each rotation: a frame whose side data was read lives until Python collects its garbage.
        turn = frame.rotation
        return self._matrices.get(turn) or self._matrices.setdefault(turn, _display_matrix(frame))

    def _cover(self, frame: Any, height: int, width: int) -> tuple[int, int]:
        """Height and width of the scaled frame before it is cropped."""
        # Width of a pixel over its height; extreme values come from damaged headers.
        aspect = self.pixel_aspect
        shown = frame.width * (aspect if aspect and Fraction(1, 8) <= aspect <= 8 else Fraction(1))
        factor = max(Fraction(height) / frame.height, Fraction(width) / shown)
        tall, wide = max(height, round(frame.height * factor)), max(width, round(shown * factor))
        if tall * wide > MAX_PIXELS:
            raise VideoError(
                "decode", "frame-too-large", f"{frame.width} x {frame.height} would be {wide} x {tall} scaled"
            )
        return tall, wide
