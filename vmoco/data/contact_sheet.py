"""A picture of random clips, written beside the manifest, so that a person can look at what was cut.

One clip per row, frames from left to right, its name and time in the margin. Which clips are drawn follows from their
names, so the same data set gives the same picture.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from vmoco import storage
from vmoco.data.frames import Encoding, Shape
from vmoco.data.manifest import shard_uri
from vmoco.data.stored_clip import read_clip
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
