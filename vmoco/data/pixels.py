"""Makes the stored picture of a decoded frame, as a player shows it.

    deinterlaced  ->  scaled  ->  RGB  ->  HDR converted  ->  cropped  ->  turned and mirrored

Only frames that need it are deinterlaced or converted; for all others scaling is the one step that touches pixels. A
frame that shrinks is scaled in its codec's planes, and made RGB at the small size, which costs less than the reverse.
"""

from __future__ import annotations

import collections
import contextlib
import gc
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation, VideoReformatter

from vmoco.data.frames import Frames
from vmoco.data.hdr import Primaries, Transfer, to_sdr
from vmoco.data.ledger import VideoError
from vmoco.job_settings import Hdr

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


def _rows(plane: Any, kind: str, height: int) -> npt.NDArray[Any]:
    """The rows of a plane, with the padding of each; a view."""
    return np.frombuffer(memoryview(plane), kind).reshape(-1, plane.line_size // np.dtype(kind).itemsize)[:height]


def _side_data(frame: Any) -> Any:
    try:
        return frame.side_data
    except ValueError:
        # PyAV gives none of the side data where one kind is newer than its names, such as EXIF (31) of FFmpeg 8.
        setattr(SideData, "_missing_", classmethod(_unnamed))  # noqa: B010 -- mypy
        return frame.side_data


def _unnamed(kinds: Any, number: int) -> Any:
    """A kind of side data without a name, as `Enum._missing_` gives it."""
    member = object.__new__(kinds)
    member._name_, member._value_ = f"UNNAMED_{number}", number
    return kinds._value2member_map_.setdefault(number, member)


def _display_matrix(frame: Any) -> Matrix:
    data = _side_data(frame).get(SideData.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    values = np.frombuffer(data, np.int32).tolist()
    return values[0], values[1], values[3], values[4]


MAX_PIXELS = 8192 * 4352
"""Pixels of the largest frame, decoded or scaled: a damaged header may state any size, and memory must hold it."""

# swscale's bilinear filter widens when it shrinks a frame, so it is antialiased: with chroma at full width it is within
# 52 to 58 dB of torch's antialiased resize of the RGB frame (area: 38 to 53 dB, 20 % faster; decoding takes 2 to 5
# times as long as either), through planes of 10 bits within 51 to 57. With the last two flags it gives the same bytes
# on every CPU.
SCALING = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
# What a frame is scaled to before it is RGB: 10 bits cost as much as 8 and 1 dB (8: 4 dB), 16 bits cost more.
_PLANES = "yuv444p10le"
_LIMITED, _FULL = 1, 2  # FFmpeg's numbers of the ranges of colours


# FFmpeg's numbers of the transfer functions of HDR, and of primaries other than those of BT.2020.
_TRANSFERS: dict[int, Transfer] = {16: "pq", 18: "hlg"}
_PRIMARIES: dict[int, Primaries] = {1: "bt709", 12: "p3"}

# FFmpeg's numbers of the matrices from which swscale converts to RGB: RGB itself, BT.709, none stated, FCC, BT.601
# twice, SMPTE 240, BT.2020. For constant luminance that of BT.2020 is the nearest.
_MATRICES = {0, 1, 2, 4, 5, 6, 7, 9}
_NEAREST_MATRIX = {10: 9}
_NO_MATRIX = 2


class Scaler:
    """Scales the frames of one video to cover height x width."""

    def __init__(self, *, height: int, width: int, hdr: Hdr = "tonemap") -> None:
        self._height, self._width, self._hdr = height, width, hdr
        self.pixel_aspect: Fraction | None = None
        self.notes: set[str] = set()
        """What was done to the frames beyond scaling, as in `Timeline.notes`."""
        # They keep swscale's tables from frame to frame.
        self._shrinking, self._converting = VideoReformatter(), VideoReformatter()
        self._covers: dict[tuple[int, int, int], tuple[int, int]] = {}
        self._matrices: dict[int, Matrix] = {}

    def scale(self, frame: Any) -> Frames:
        """The frame as it is stored, turned upright and cropped in the middle: uint8 (H, W, 3), RGB.

        Raises:
            VideoError: it is HDR, which is not wanted, or too large.
        """
        transfer = _TRANSFERS.get(frame.color_trc) if self._hdr != "keep" else None
        if transfer and self._hdr == "reject":
            raise VideoError("decode", "hdr", f"its colours are HDR ({transfer.upper()}), and --hdr is reject")
        if frame.colorspace not in _MATRICES:
            self.notes.add(f"unknown-matrix: FFmpeg does not convert from its colour matrix {int(frame.colorspace)}")
            frame.colorspace = _NEAREST_MATRIX.get(frame.colorspace, _NO_MATRIX)
        matrix = self._matrix(frame)
        turned = is_turned(matrix)
        height, width = (self._width, self._height) if turned else (self._height, self._width)
        shape = (frame.width, frame.height, turned)
        tall, wide = self._covers.get(shape) or self._covers.setdefault(shape, self._cover(frame, height, width))
        scaled = self._converting.reformat(
            # HDR is converted from as many bits as it has.
            frame if transfer else self._shrunk(frame, tall, wide),
            width=wide,
            height=tall,
            # Not rgb48le: swscale wraps some of its values around, with chroma at full width.
            format="gbrp16le" if transfer else "rgb24",
            interpolation=SCALING,
            threads=1,
        )
        if transfer:
            green, blue, red = (_rows(plane, "<u2", tall)[:, :wide] for plane in scaled.planes)
            pixels = np.stack([red, green, blue], axis=-1)
        else:
            pixels = _rows(scaled.planes[0], "u1", tall)[:, : wide * 3].reshape(tall, wide, 3)
        top, left = (tall - height) // 2, (wide - width) // 2
        if is_mirrored(matrix):
            self.notes.add("mirrored: its display matrix mirrors the picture")
        picture = pixels[top : top + height, left : left + width]
        if transfer:
            self.notes.add(f"tone-mapped: its colours are HDR ({transfer.upper()})")
            picture = to_sdr(picture, transfer, _PRIMARIES.get(frame.color_primaries, "bt2020"))
        return upright(picture, matrix)

    def _shrunk(self, frame: Any, height: int, width: int) -> Any:
        """A frame of luma and chroma at this size, in planes; any other, and one that is no larger, as it is."""
        pixels = frame.format.name
        if (
            not pixels.startswith("yuv")
            or pixels.startswith("yuva")
            or not (frame.height > height and frame.width > width)
        ):
            return frame
        colours = _FULL if frame.color_range == _FULL or pixels.startswith("yuvj") else _LIMITED
        small = self._shrinking.reformat(
            frame,
            width=width,
            height=height,
            format=_PLANES,
            interpolation=SCALING,
            src_color_range=colours,
            dst_color_range=colours,
            threads=1,  # as for decoding
        )
        small.colorspace, small.color_range = frame.colorspace, colours
        return small

    def next_picture(self) -> None:
        """Says that the next frame may be turned in another way than the last one, as one picture of a folder may."""
        self._matrices.clear()
        gc.collect(0)  # see _matrix

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


def is_interlaced(frame: Any) -> bool:
    """Whether a frame holds two fields, and is large enough for FFmpeg's deinterlacer."""
    return bool(frame.interlaced_frame) and frame.width >= 8 and frame.height >= 8


class Deinterlacer:
    """Makes one frame of the two fields of each interlaced frame, with FFmpeg's filter bwdif; leaves other frames.

    A frame comes out after the next one went in, because the filter looks at both neighbours.
    """

    def __init__(self) -> None:
        self._graph: Any = None
        self._shape: tuple[int, int, str] | None = None
        self._waiting: collections.deque[int] = collections.deque()

    def push(self, name: int, frame: Any) -> Iterator[tuple[int, Any]]:
        """Puts a frame in; gives the frames that are done, each with its name."""
        shape = (frame.width, frame.height, frame.format.name)
        if self._graph is not None and shape != self._shape:
            yield from self.flush()
        if self._graph is None:
            if not is_interlaced(frame):
                yield name, frame
                return
            self._graph, self._shape = _deinterlacing(frame), shape
        self._waiting.append(name)
        self._graph.push(frame)
        yield from self._done()

    def flush(self) -> Iterator[tuple[int, Any]]:
        """Gives the frames that are still inside."""
        if self._graph is not None:
            self._graph.push(None)
            yield from self._done()
            self._graph = None

    def _done(self) -> Iterator[tuple[int, Any]]:
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                frame = self._graph.pull()
                yield self._waiting.popleft(), frame


def _deinterlacing(frame: Any) -> Any:
    graph = av.filter.Graph()
    size: dict[str, Any] = {"width": frame.width, "height": frame.height, "format": frame.format.name}
    nodes = [graph.add_buffer(**size, time_base=Fraction(1, 1000))]
    nodes.append(graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced:threads=1"))
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph
