"""How the frames of a clip are stored."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.dataset import make_data_set
from vmoco.data.frames import Frames, decode, encode, pack, unpack
from vmoco.data.loader import Loader
from vmoco.presets import PRESETS

SHAPE = (5, 24, 32, 3)


def gradient() -> Frames:
    y, x = np.mgrid[0:24, 0:32]
    return np.stack([np.stack([x * 7, y * 9, np.full_like(x, 40 * t)], axis=-1) for t in range(5)]).astype(np.uint8)


def test_raw_is_the_pixels_and_no_copy() -> None:
    """The stored bytes are the pixels in order, and decoding is a view of them."""
    stored = encode(gradient(), "raw", quality=1)
    assert stored == gradient().tobytes()
    assert not decode(stored, "raw", SHAPE).flags.owndata
    np.testing.assert_array_equal(decode(stored, "raw", SHAPE), gradient())


def test_jpeg_is_near_and_nearer_with_quality() -> None:
    """At quality 95 the pixels are within 3 of 255 on average, at 30 further; equal frames give equal bytes."""
    errors = []
    for quality in (95, 30):
        stored = encode(gradient(), "jpeg", quality=quality)
        assert stored == encode(gradient(), "jpeg", quality=quality)
        errors.append(np.abs(decode(stored, "jpeg", SHAPE).astype(int) - gradient()).mean())
    assert errors[0] < 3 < errors[1] + 2
    assert errors[0] < errors[1]


@pytest.mark.parametrize("quality", [30, 92, 100])
@pytest.mark.parametrize(("height", "width"), [(24, 32), (17, 33), (1, 1)])
def test_jpeg_pixels_are_those_of_another_decoder(quality: int, height: int, width: int) -> None:
    """Pillow finds the very same pixels in the stored images, also where sizes are odd."""
    clip = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    stored = encode(clip, "jpeg", quality=quality)
    plain = [np.asarray(Image.open(io.BytesIO(image))) for image in unpack(stored, num_frames=3)]
    np.testing.assert_array_equal(decode(stored, "jpeg", clip.shape), plain)


def test_a_damaged_jpeg_is_refused() -> None:
    """Cut off, of one colour, or no JPEG at all: the frame is named."""
    whole = [bytes(image) for image in unpack(encode(gradient(), "jpeg", quality=90), num_frames=5)]
    grey = io.BytesIO()
    Image.fromarray(gradient()[0, :, :, 0]).save(grey, "JPEG")
    for damaged in (whole[3][:-20], b"no image", grey.getvalue()):
        with pytest.raises(ValueError, match=r"frame 3 is (not a complete JPEG: |\(24, 32, 1\), and should be)"):
            decode(pack([*whole[:3], damaged, whole[4]]), "jpeg", SHAPE)


@pytest.mark.parametrize("num_frames", [1, 2, 7])
def test_images_come_back_in_order(num_frames: int) -> None:
    """What is packed is unpacked, whatever the sizes."""
    images = [bytes([number]) * (number * 3 + 1) for number in range(num_frames)]
    assert [bytes(image) for image in unpack(pack(images), num_frames=num_frames)] == images


def test_what_is_no_clip_is_refused() -> None:
    """Another size, a wrong table, another shape: a ValueError that says so."""
    raw, jpeg = encode(gradient(), "raw", quality=1), encode(gradient(), "jpeg", quality=90)
    with pytest.raises(ValueError, match="11519 bytes are not a raw clip of 5x24x32x3"):
        decode(raw[1:], "raw", SHAPE)
    for damaged in (jpeg[:10], jpeg[:-1], b"\1" + jpeg[1:], jpeg + b"x"):
        with pytest.raises(ValueError, match=r"bytes are too few|table of its frames"):
            decode(damaged, "jpeg", SHAPE)
    with pytest.raises(ValueError, match=r"frame 0 is \(24, 32, 3\), and should be \(24, 30, 3\)"):
        decode(jpeg, "jpeg", (5, 24, 30, 3))


def test_the_loader_reads_both(tmp_path: Path) -> None:
    """The same batches from a raw and from a JPEG data set: the same clips and windows, pixels as JPEG left them."""
    raw = Loader(make_data_set(tmp_path / "raw"), PRESETS["tiny"][1], rank=0, world_size=1).batch(3)
    manifest = make_data_set(tmp_path / "jpeg", encoding="jpeg")
    jpeg = Loader(manifest, PRESETS["tiny"][1], rank=0, world_size=1).batch(3)
    assert jpeg.clip_ids == raw.clip_ids
    difference = (jpeg.query.frames.int() - raw.query.frames.int()).abs().float()
    assert 0 < difference.mean() < 16  # noise is the worst that JPEG can be given
    assert (jpeg.query.draws == raw.query.draws).all()
    stored = sum(manifest.table["num_bytes"].to_pylist())
    assert stored < 0.7 * sum(make_data_set(tmp_path / "again").table["num_bytes"].to_pylist())
