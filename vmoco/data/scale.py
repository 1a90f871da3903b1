"""Scales decoded frames to cover the stored frame, turned and shaped as their metadata says, and crops the middle."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from vmoco.data.frames import Frames
from vmoco.data.ledger import VideoError

MAX_PIXELS = 8192 * 4352
"""Largest frame, decoded or scaled: a damaged header may promise any size, and one frame must fit in memory."""

# swscale's bilinear filter widens when it shrinks, so it is antialiased: with chroma at full width it is within 52 to
# 58 dB of torch's antialiased resize of the RGB frame (area: 38 to 53 dB, 20 % faster; decoding takes 2 to 5 times as
# long as either). The last two flags make it give the same bytes on every CPU.
SCALING = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class Scaler:
    """Scales the frames of one video to cover height x width."""

    def __init__(self, *, height: int, width: int) -> None:
        self._height, self._width = height, width
        self.pixel_aspect: Fraction | None = None
        self._reformatter = VideoReformatter()  # keeps swscale's tables from frame to frame
        self._covers: dict[tuple[int, int, int], tuple[int, int]] = {}

    def scale(self, frame: Any) -> Frames:
        """The frame as it is stored: uint8 (H, W, 3), RGB."""
        turns = round(frame.rotation / 90) % 4  # counter-clockwise
        height, width = (self._width, self._height) if turns % 2 else (self._height, self._width)
        shape = (frame.width, frame.height, turns % 2)
        tall, wide = self._covers.get(shape) or self._covers.setdefault(shape, self._cover(frame, height, width))
        # One pass from the codec's colours at full size to RGB at the small size; one thread, as for decoding.
        scaled = self._reformatter.reformat(
            frame, width=wide, height=tall, format="rgb24", interpolation=SCALING, threads=1
        )
        plane = scaled.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:tall, : wide * 3]
        top, left = (tall - height) // 2, (wide - width) // 2
        return np.rot90(rows.reshape(tall, wide, 3)[top : top + height, left : left + width], turns)

    def _cover(self, frame: Any, height: int, width: int) -> tuple[int, int]:
        """Height and width of the scaled frame before it is cropped."""
        # Width of a pixel over its height; values that no camera makes come from damaged headers.
        aspect = self.pixel_aspect
        shown = frame.width * (aspect if aspect and Fraction(1, 8) <= aspect <= 8 else Fraction(1))
        factor = max(Fraction(height) / frame.height, Fraction(width) / shown)
        tall, wide = max(height, round(frame.height * factor)), max(width, round(shown * factor))
        if tall * wide > MAX_PIXELS:
            raise VideoError(
                "decode", "frame-too-large", f"{frame.width} x {frame.height} would be {wide} x {tall} scaled"
            )
        return tall, wide
