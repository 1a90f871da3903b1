"""Contact sheets: pictures of clips in rows, frames from left to right, for a person to look at.

frame        0    1    2    3   ...
clip a      [ ]  [X]  [ ]  [ ]        X: dropped by the generator, grey in a red frame
clip b      [ ]  [ ]  [ ]  [X]
of all       |    ‖    |    |         share of the clips since the last checkpoint that lost this frame

One is written beside each manifest, and one with each checkpoint that has a generator. Equal content gives equal bytes:
which clips of a data set are shown follows from their names, and from how much moves in them.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image, ImageDraw, ImageFont

from vmoco import storage
from vmoco.data.frames import Encoding, Frames, Shape
from vmoco.data.shard_reader import ClipReader
from vmoco.seed import hash64, mix64

NAME = "contact_sheet.png"

_CLIPS, _EXTREMES, _FRAMES = 16, 4, 8
_HEIGHT, _GAP, _MARGIN, _HEAD, _BARS, _LINE = 96, 6, 108, 58, 110, 18  # pixels
_INK, _PALE, _GREY, _PAPER, _RED = (40, 40, 40), (120, 120, 120), (205, 205, 205), (255, 255, 255), (214, 39, 40)


@dataclass(frozen=True)
class Row:
    """A clip of a contact sheet."""

    frames: Frames
    """uint8 (T, H, W, 3): those that are shown."""
    lines: tuple[str, ...]
    """Text in the left margin: the name, and what is known of the clip."""
    dropped: Sequence[bool] = ()
    """(T,), which of the frames are marked as dropped; none when left out."""


def write(uri: str, pieces: Iterable[pa.Table], *, frame_shape: Shape, encoding: Encoding) -> None:
    """Writes the contact sheet of the data set at `uri`.

    Args:
        uri: folder of the data set.
        pieces: rows of all its clips with the columns of a manifest, in any order; there is at least one.
        frame_shape: (T, H, W, C) of every clip.
        encoding: how its frames are stored.

    Raises:
        ValueError: a shard is missing or damaged, or the place cannot be written.
    """
    chosen, shown = _choose(pieces)
    numbers = np.linspace(0, frame_shape[0] - 1, min(_FRAMES, frame_shape[0])).round().astype(int).tolist()
    reader = ClipReader(uri, chosen, frame_shape=frame_shape, encoding=encoding)
    frames = reader.several(range(chosen.num_rows), itertools.repeat(numbers))
    rows = [Row(pictures, _lines(row)) for row, pictures in zip(chosen.to_pylist(), frames, strict=True)]
    title = f"{shown}, with the numbers of the frames"
    storage.write_atomic(storage.join(uri, NAME), draw(rows, title=title, numbers=numbers))


def _choose(pieces: Iterable[pa.Table]) -> tuple[pa.Table, str]:
    """The clips that are shown, and which they are, for the title; each piece leaves only what may be shown."""
    some: list[pa.Table] = []
    still: list[pa.Table] = []
    lively: list[pa.Table] = []
    num_clips = num_scored = 0
    rising, falling = ([("motion", order), ("clip_id", order)] for order in ("ascending", "descending"))
    for piece in pieces:
        some = [_first_by_hash(pa.concat_tables([*some, piece]))]
        scored = piece.filter(pc.is_valid(piece["motion"]))
        still = [pa.concat_tables([*still, scored]).sort_by(rising).slice(0, _EXTREMES)]
        lively = [pa.concat_tables([*lively, scored]).sort_by(falling).slice(0, _EXTREMES)]
        num_clips, num_scored = num_clips + piece.num_rows, num_scored + scored.num_rows
    chosen = some[0].sort_by([("video_id", "ascending"), ("start_seconds", "ascending")])
    shown = f"{chosen.num_rows} of {num_clips} clips"
    if num_scored >= 2 * _EXTREMES:
        chosen = pa.concat_tables([chosen, *still, *lively])
        shown += f", then the {_EXTREMES} that move least and the {_EXTREMES} that move most"
    return chosen, shown


def _first_by_hash(rows: pa.Table) -> pa.Table:
    ids = np.array([int(clip_id, 16) for clip_id in rows["clip_id"].to_pylist()], np.uint64)
    return rows.take(np.argsort(mix64(ids, hash64("contact sheet")), kind="stable")[:_CLIPS])


def dropped_frames_sheet(
    clips: torch.Tensor, dropped: torch.Tensor, *, names: Sequence[str], shares: Sequence[float], title: str
) -> bytes:
    """The contact sheet of what the generator drops, as a PNG.

    Args:
        clips: uint8 (B, T, H, W, 3).
        dropped: bool (B, T).
        names: of the clips.
        shares: (T,), share of all clips that lost the frame at each position, in [0, 1].
        title: the line above.
    """
    rows = [
        Row(frames, (name,), marks)
        for frames, name, marks in zip(clips.cpu().numpy(), names, dropped.tolist(), strict=False)
    ]
    return draw(rows, title=title, numbers=range(dropped.shape[1]), shares=shares)


def draw(rows: Sequence[Row], *, title: str, numbers: Sequence[int], shares: Sequence[float] = ()) -> bytes:
    """Draws clips in rows, as a PNG.

    Args:
        rows: the clips, of one shape.
        title: the line above.
        numbers: (T,), of the frames, the head of each column.
        shares: (T,), length of a bar below each column, in [0, 1]; no bars when left out.
    """
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    height, width = rows[0].frames.shape[1:3] if rows else (1, 1)
    cell = (round(_HEIGHT * width / height), _HEIGHT)
    pitch = (cell[0] + _GAP, cell[1] + _GAP)
    texts = [small.getlength(line) for row in rows for line in row.lines]
    margin = max(_MARGIN, *(round(text) + 3 * _GAP for text in texts)) if texts else _MARGIN
    foot = _HEAD + len(rows) * pitch[1]
    size = (margin + len(numbers) * pitch[0] + _GAP, foot + (_BARS if shares else 0))
    sheet = Image.new("RGB", (max(size[0], round(large.getlength(title)) + 2 * _GAP), size[1]), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, _INK, font=large)
    for column, number in enumerate(numbers):
        head = (margin + column * pitch[0] + cell[0] // 2, _HEAD - 10)
        pen.text(head, str(number), _INK, font=small, anchor="ms")
    for place, row in enumerate(rows):
        top = _HEAD + place * pitch[1]
        first = top + _HEIGHT // 2 - _LINE * (len(row.lines) - 1) // 2
        for line, text in enumerate(row.lines):
            pen.text((_GAP, first + line * _LINE), text, _PALE if line else _INK, font=small, anchor="lm")
        for column, frame in enumerate(row.frames):
            left = margin + column * pitch[0]
            picture = Image.fromarray(frame).resize(cell, Image.Resampling.BICUBIC)
            if row.dropped and row.dropped[column]:
                picture = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", cell, _GREY), 0.4)
                pen.rectangle((left - 4, top - 4, left + cell[0] + 3, top + cell[1] + 3), fill=_RED)
            sheet.paste(picture, (left, top))
    if shares:
        pen.text((_GAP, foot + _BARS - 12), "dropped in\nthis share\nof all clips", _INK, font=small, anchor="ld")
    for column, share in enumerate(shares):
        left, bottom, length = margin + column * pitch[0], foot + _BARS - 12, round((_BARS - 40) * share)
        pen.rectangle((left + cell[0] // 4, bottom - length, left + cell[0] * 3 // 4, bottom), fill=_RED)
        pen.text((left + cell[0] // 2, bottom - length - 4), f"{share:.0%}", _INK, font=small, anchor="ms")
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _lines(row: dict[str, object]) -> tuple[str, ...]:
    """The text beside a clip of a data set, from its row of the manifest."""
    name = str(row["video_id"]).replace("\n", " ")
    shown = name if len(name) < 38 else "…" + name[-36:]
    label = (str(row["label"]),) if row["label"] else ()
    cuts = f", {row['cuts']} cuts" if row["cuts"] else ""
    motion = (f"motion {row['motion']:.1f}{cuts}",) if row["motion"] is not None else ()
    return (shown, f"from {row['start_seconds']:.2f} s, {row['fps']:.4g} frames/s", *motion, *label)
