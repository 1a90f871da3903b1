"""The contact sheet: clips in rows, frames in columns, and which of them the generator drops.

frame       0    1    2    3   ...
clip a     [ ]  [X]  [ ]  [ ]        X is dropped: framed in red and greyed
clip b     [ ]  [ ]  [ ]  [X]
of all      |    ‖    |    |         share of the clips since the last checkpoint that lost this position
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

_CELL, _GAP, _MARGIN = 96, 6, 108  # pixels
_HEAD, _BARS = 58, 110
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_RED, _INK, _PALE, _PAPER = (214, 39, 40), (40, 40, 40), (205, 205, 205), (255, 255, 255)


def contact_sheet(
    clips: torch.Tensor, dropped: torch.Tensor, *, names: Sequence[str], shares: Sequence[float], title: str
) -> bytes:
    """Draws the sheet as a PNG.

    Args:
        clips: uint8 (B, T, H, W, 3).
        dropped: bool (B, T).
        names: of the clips, for the left margin.
        shares: of each position, in [0, 1].
        title: the line above.
    """
    num_clips, num_frames = dropped.shape
    pitch = _CELL + _GAP
    size = (_MARGIN + num_frames * pitch + _GAP, _HEAD + num_clips * pitch + _BARS)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(14), ImageFont.load_default(18)
    pen.text((_GAP, _GAP), title, _INK, font=large)
    for frame in range(num_frames):
        pen.text((_MARGIN + frame * pitch + _CELL // 2, _HEAD - 10), str(frame), _INK, font=small, anchor="ms")
    for row in range(num_clips):
        top = _HEAD + row * pitch
        pen.text((_GAP, top + _CELL // 2), names[row], _INK, font=small, anchor="lm")
        for frame in range(num_frames):
            left = _MARGIN + frame * pitch
            picture = Image.fromarray(clips[row, frame].cpu().numpy()).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
            if dropped[row, frame]:
                picture = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, _PALE), 0.4)
                pen.rectangle((left - 4, top - 4, left + _CELL + 3, top + _CELL + 3), fill=_RED)
            sheet.paste(picture, (left, top))
    _draw_bars(pen, shares, top=_HEAD + num_clips * pitch, pitch=pitch, font=small)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _draw_bars(pen: ImageDraw.ImageDraw, shares: Sequence[float], *, top: int, pitch: int, font: Font) -> None:
    """One bar per column, its length the share of clips, with the number above it."""
    foot = top + _BARS - 12
    longest = _BARS - 40
    pen.text((_GAP, foot), "dropped in\nthis share\nof all clips", _INK, font=font, anchor="ld")
    for frame, share in enumerate(shares):
        left, height = _MARGIN + frame * pitch, round(longest * share)
        pen.rectangle((left + 24, foot - height, left + _CELL - 24, foot), fill=_RED)
        pen.text((left + _CELL // 2, foot - height - 4), f"{share:.0%}", _INK, font=font, anchor="ms")
