"""A picture of random clips, written beside the manifest, so that a person can look at what was cut.

One clip per row, frames from left to right, its name and time in the margin. Which clips are drawn follows from their
names, so the same data set gives the same picture.


The contact sheet: clips in rows, frames in columns, and which of them the generator drops.

frame       0    1    2    3   ...
clip a     [ ]  [X]  [ ]  [ ]        X is dropped: framed in red and greyed
clip b     [ ]  [ ]  [ ]  [X]
of all      |    ‖    |    |         share of the clips since the last checkpoint that lost this position
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageDraw, ImageFont

from vmoco import storage
from vmoco.data.frames import Encoding, Shape
from vmoco.data.manifest import shard_uri
from vmoco.data.shard_reader import read_clip
from vmoco.seed import hash64, mix64

NAME = "contact_sheet.png"

_CLIPS, _FRAMES = 16, 8
_HEIGHT, _GAP, _MARGIN = 96, 4, 260  # pixels
_INK, _PALE, _PAPER = (40, 40, 40), (120, 120, 120), (255, 255, 255)


def write(uri: str, table: pa.Table, *, frame_shape: Shape, encoding: Encoding) -> None:
    """Draws the sheet of the data set at `uri`; `table` has the columns of a manifest.

    Raises:
        ValueError: a shard cannot be read, or the place cannot be written.
    """
    ids = np.array([int(clip_id, 16) for clip_id in table["clip_id"].to_pylist()], np.uint64)
    order = np.argsort(mix64(ids, hash64("contact sheet")), kind="stable")[:_CLIPS]
    rows = sorted(table.take(order).to_pylist(), key=lambda row: (row["video_id"], row["start_seconds"]))
    num_frames = min(_FRAMES, frame_shape[0])
    shown = np.linspace(0, frame_shape[0] - 1, num_frames).round().astype(int)
    width = round(_HEIGHT * frame_shape[2] / frame_shape[1])
    size = (_MARGIN + num_frames * (width + _GAP), 40 + len(rows) * (_HEIGHT + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(12)
    pen.text((_GAP, 10), f"{len(rows)} of {table.num_rows} clips, frames {', '.join(map(str, shown))}", _INK, font=font)
    for number, row in enumerate(rows):
        top = 40 + number * (_HEIGHT + _GAP)
        name = row["video_id"] if len(row["video_id"]) < 38 else "…" + row["video_id"][-36:]
        pen.text((_GAP, top + 20), name.replace("\n", " "), _INK, font=small)
        about = f"from {row['start_seconds']:.2f} s, {row['fps']:.4g} frames/s"
        about += f"\n{row['label']}" if row["label"] else ""
        pen.multiline_text((_GAP, top + 40), about, _PALE, font=small)
        frames = read_clip(shard_uri(uri, row["shard"]), row, frame_shape=frame_shape, encoding=encoding)
        for place, frame in enumerate(shown):
            picture = Image.fromarray(frames[frame]).resize((width, _HEIGHT), Image.Resampling.BICUBIC)
            sheet.paste(picture, (_MARGIN + place * (width + _GAP), top))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    storage.write_atomic(storage.join(uri, NAME), content.getvalue())


_CELL, _DROPPED_GAP, _DROPPED_MARGIN = 96, 6, 108  # pixels
_HEAD, _BARS = 58, 110
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_RED, _DROPPED_INK, _DROPPED_PALE, _DROPPED_PAPER = (214, 39, 40), (40, 40, 40), (205, 205, 205), (255, 255, 255)


def dropped_frames_sheet(
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
    pitch = _CELL + _DROPPED_GAP
    size = (_DROPPED_MARGIN + num_frames * pitch + _DROPPED_GAP, _HEAD + num_clips * pitch + _BARS)
    sheet = Image.new("RGB", size, _DROPPED_PAPER)
    pen = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(14), ImageFont.load_default(18)
    pen.text((_DROPPED_GAP, _DROPPED_GAP), title, _DROPPED_INK, font=large)
    for frame in range(num_frames):
        pen.text(
            (_DROPPED_MARGIN + frame * pitch + _CELL // 2, _HEAD - 10),
            str(frame),
            _DROPPED_INK,
            font=small,
            anchor="ms",
        )
    for row in range(num_clips):
        top = _HEAD + row * pitch
        pen.text((_DROPPED_GAP, top + _CELL // 2), names[row], _DROPPED_INK, font=small, anchor="lm")
        for frame in range(num_frames):
            left = _DROPPED_MARGIN + frame * pitch
            picture = Image.fromarray(clips[row, frame].cpu().numpy()).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
            if dropped[row, frame]:
                picture = Image.blend(
                    picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, _DROPPED_PALE), 0.4
                )
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
    pen.text((_DROPPED_GAP, foot), "dropped in\nthis share\nof all clips", _DROPPED_INK, font=font, anchor="ld")
    for frame, share in enumerate(shares):
        left, height = _DROPPED_MARGIN + frame * pitch, round(longest * share)
        pen.rectangle((left + 24, foot - height, left + _CELL - 24, foot), fill=_RED)
        pen.text((left + _CELL // 2, foot - height - 4), f"{share:.0%}", _DROPPED_INK, font=font, anchor="ms")
