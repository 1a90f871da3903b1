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


def decode(stored: Stored, encoding: Encoding, shape: Shape, numbers: Sequence[int] | None = None) -> Frames:
    """The pixels of a stored clip, or of some of its frames; no others are decoded.

    Args:
        stored: bytes of the clip.
        encoding: how it is stored.
        shape: (T, H, W, C) of the stored clip.
        numbers: of the frames that are wanted, in order; all when left out.

    Returns:
        uint8 (len(numbers), H, W, C); of a raw clip a view of `stored` where the numbers are a `range`.

    Raises:
        ValueError: the bytes are not a clip of that shape.
    """
    numbers = range(shape[0]) if numbers is None else numbers
    if encoding == "raw":
        pixels = np.frombuffer(stored, np.uint8)
        if pixels.size != math.prod(shape):
            raise ValueError(f"{pixels.size} bytes are not a raw clip of {'x'.join(map(str, shape))}")
        pixels = pixels.reshape(shape)
        if isinstance(numbers, range):
            return pixels[numbers.start : numbers.stop : numbers.step]
        return pixels[list(numbers)]
    images = unpack(stored, num_frames=shape[0])
    frames = np.empty((len(numbers), *shape[1:]), np.uint8)
    for place, number in enumerate(numbers):
        _decode_image(images[number], frames[place], number=number)
    return frames


def decode_small(stored: Stored, shape: Shape, *, factor: int) -> npt.NDArray[np.float32]:
    """The frames of a JPEG clip in grey, about `factor` times smaller: float32 (T, h, w), 0 to 255.

    JPEGs are decoded at that size, which is several times as fast as to decode them completely.

    Raises:
        ValueError: the bytes are not a clip of that shape.
    """
    import simplejpeg

    images, (_, height, width, _) = unpack(stored, num_frames=shape[0]), shape
    size = {"min_height": max(1, height // factor), "min_width": max(1, width // factor)}
    small = []
    for number, image in enumerate(images):
        try:
            small.append(simplejpeg.decode_jpeg(image, "GRAY", **size)[..., 0])
        except ValueError as error:
            raise ValueError(f"frame {number} is not a complete JPEG: {error}") from None
    return np.stack(small).astype(np.float32)


def _decode_image(image: Stored, target: Frames, *, number: int) -> None:
    """Decodes a JPEG into uint8 (H, W, C); `number` is that of the frame, for errors."""
    import simplejpeg

    # The same pixels as Pillow's, into the clip itself and without a copy: 2.7 times as fast. torchvision is between
    # the two, and its JPEG functions are deprecated.
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        found = (height, width, 1 if colours == "Gray" else 3)
        if found == target.shape:
            simplejpeg.decode_jpeg(image, "RGB", buffer=target)
    except ValueError as error:
        raise ValueError(f"frame {number} is not a complete JPEG: {error}") from None
    if found != target.shape:
        raise ValueError(f"frame {number} is {found}, and should be {target.shape}")


def pack(images: Sequence[bytes]) -> bytes:
    """Joins the images of a clip to its stored bytes."""
    ends = np.cumsum([0, *map(len, images)], dtype=np.int64)
    assert ends[-1] < 2**31, "a clip of 2 GiB"
    table = ends.astype("<i4").tobytes()
    return b"".join([table.ljust(_table_size(len(images)), b"\0"), *images])


def unpack(stored: Stored, *, num_frames: int) -> list[memoryview]:
    """The images in the stored bytes of a clip; views.

    Raises:
        ValueError: the bytes are not such a clip.
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
