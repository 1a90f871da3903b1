"""How the frames of a clip are stored: as they are, or each as a JPEG.

The bytes of a stored clip are all that is needed to decode it, given the clip's shape, so a clip can be read by its
range in a shard, also from a remote one:

    raw    the pixels, T x H x W x C
    jpeg   T + 1 int32 little-endian: where each JPEG begins, and where the last one ends, counted from the first;
           zeros up to a multiple of 8 bytes; the T JPEGs

This is what Arrow writes for a list of binary values, so in a shard the same bytes are an Arrow column.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vmoco.job_settings import Encoding

ENCODINGS: tuple[Encoding, ...] = ("raw", "jpeg")

Frames = npt.NDArray[np.uint8]
Stored = bytes | memoryview
Shape = tuple[int, int, int, int]
"""(T, H, W, C) of a clip."""


def encode(frames: Frames, encoding: Encoding, *, quality: int) -> Stored:
    """The stored bytes of a clip: for `raw` a view of `frames`, not a copy.

    Args:
        frames: uint8 (T, H, W, 3), RGB, contiguous.
        encoding: How to store them.
        quality: Of JPEG, 1 to 100.
    """
    if encoding == "raw":
        return frames.data.cast("B")
    return pack([_jpeg(frame, quality) for frame in frames])


def decode(stored: Stored, encoding: Encoding, shape: Shape) -> Frames:
    """The pixels of a stored clip, uint8 (T, H, W, C): for `raw` a view of `stored`, not a copy.

    Raises:
        ValueError: the bytes are not a clip of that shape.
    """
    if encoding == "raw":
        pixels = np.frombuffer(stored, np.uint8)
        if pixels.size != math.prod(shape):
            raise ValueError(f"{pixels.size} bytes are not a raw clip of {'x'.join(map(str, shape))}")
        return pixels.reshape(shape)
    return decode_images(unpack(stored, num_frames=shape[0]), shape)


def decode_images(images: Sequence[Stored], shape: Shape) -> Frames:
    """The pixels of a clip from its JPEGs, uint8 (T, H, W, C).

    Raises:
        ValueError: they are not JPEGs of that shape.
    """
    import simplejpeg

    # The same pixels as Pillow's, into the clip itself and without a copy: 2.7 times as fast. torchvision is between
    # the two, and its JPEG functions are deprecated.
    frames = np.empty(shape, np.uint8)
    if len(images) != shape[0]:
        raise ValueError(f"it has {len(images)} frames, and should have {shape[0]}")
    for place, image in enumerate(images):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
            found = (height, width, 1 if colours == "Gray" else 3)
            if found == shape[1:]:
                simplejpeg.decode_jpeg(image, "RGB", buffer=frames[place])
        except ValueError as error:
            raise ValueError(f"frame {place} is no whole JPEG: {error}") from None
        if found != shape[1:]:
            raise ValueError(f"frame {place} is {found}, and should be {shape[1:]}")
    return frames


def pack(images: Sequence[bytes]) -> bytes:
    """Joins the images of a clip to its stored bytes."""
    ends = np.cumsum([0, *map(len, images)], dtype=np.int64)
    assert ends[-1] < 2**31, "a clip of 2 GiB"
    table = ends.astype("<i4").tobytes()
    return b"".join([table.ljust(_table_size(len(images)), b"\0"), *images])


def unpack(stored: Stored, *, num_frames: int) -> list[memoryview]:
    """The images in the stored bytes of a clip; views.

    Raises:
        ValueError: the bytes are no such clip.
    """
    view, start = memoryview(stored).cast("B"), _table_size(num_frames)
    if len(view) < start:
        raise ValueError(f"{len(view)} bytes are too few for {num_frames} frames")
    ends = np.frombuffer(view[: 4 * (num_frames + 1)], "<i4")
    if ends[0] or (np.diff(ends) <= 0).any() or start + ends[-1] != len(view):
        raise ValueError("the table of its frames does not fit its size")
    return [view[start + low : start + high] for low, high in itertools.pairwise(ends)]


def _table_size(num_frames: int) -> int:
    return (4 * (num_frames + 1) + 7) // 8 * 8


def _jpeg(frame: Frames, quality: int) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(frame).save(content, "JPEG", quality=quality)
    return content.getvalue()
