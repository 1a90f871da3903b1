"""Augmentation against torchvision and plain loops, one frame at a time; draws that follow from seeds alone."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.video import R3D_18_Weights
from torchvision.transforms.v2 import functional as reference

from vmoco.clip_settings import AugmentSettings
from vmoco.data import augment as under_test
from vmoco.data.augment import augment, draw, normalise, resized_crop, to_pixels
from vmoco.seed import UInt64Array, hash64, uniform

SIZE = 5
SETTINGS = AugmentSettings()
MOCO_V2 = AugmentSettings(jitter_probability=0.8, blur_probability=0.5, hue=0.1)
PRESET = R3D_18_Weights.KINETICS400_V1.transforms()
MEAN, STD = np.array(PRESET.mean), np.array(PRESET.std)

Image = npt.NDArray[np.float64]


def seeds(count: int) -> UInt64Array:
    return np.arange(count, dtype=np.uint64)


def random_clips(num_clips: int, num_frames: int, height: int, width: int) -> torch.Tensor:
    pixels = np.random.default_rng(5).integers(0, 256, (num_clips, num_frames, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def row(height: int, width: int, **columns: float) -> torch.Tensor:
    """A draw that changes nothing but what is given: the whole frame, unmirrored, in its own colours."""
    table = torch.zeros(1, under_test.NUM_COLUMNS)
    values = {"HEIGHT": height, "WIDTH": width, "BRIGHTNESS": 1, "CONTRAST": 1, "SATURATION": 1} | columns
    for name, value in values.items():
        table[0, getattr(under_test, name)] = value
    return table


def plain_crop(frame: npt.NDArray[np.uint8], draws: torch.Tensor, size: int) -> Image:
    """One frame (H, W, 3): every output pixel by the four stored pixels around its place, in [0, 1]."""
    names = ("TOP", "LEFT", "HEIGHT", "WIDTH", "FLIP")
    top, left, height, width, flip = (float(draws[getattr(under_test, name)]) for name in names)
    result = np.empty((size, size, 3))
    for i in range(size):
        for j in range(size):
            # Pixel centres lie at halves; beyond the outermost centres the edge goes on.
            y = min(max(top + (i + 0.5) / size * height - 0.5, 0), frame.shape[0] - 1)
            x = min(max(left + (j + 0.5) / size * width - 0.5, 0), frame.shape[1] - 1)
            above, before = math.floor(y), math.floor(x)
            below, after = min(above + 1, frame.shape[0] - 1), min(before + 1, frame.shape[1] - 1)
            upper = (1 - (x - before)) * frame[above, before] + (x - before) * frame[above, after]
            lower = (1 - (x - before)) * frame[below, before] + (x - before) * frame[below, after]
            result[i, j] = ((1 - (y - above)) * upper + (y - above) * lower) / 255
    return result[:, ::-1] if flip else result


def to_frame(image: Image) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def luma(image: Image) -> Image:
    return 0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]


def plain_hue(image: Image, turns: float) -> Image:
    """I and Q turned about Y, from the definition of YIQ: colour differences scaled and turned by 33 degrees."""
    y = luma(image)
    u, v = 0.492111 * (image[..., 2] - y), 0.877283 * (image[..., 0] - y)
    sin33, cos33 = math.sin(math.radians(33)), math.cos(math.radians(33))
    i, q = cos33 * v - sin33 * u, sin33 * v + cos33 * u
    sin, cos = math.sin(2 * math.pi * turns), math.cos(2 * math.pi * turns)
    i, q = cos * i - sin * q, sin * i + cos * q
    u, v = cos33 * q - sin33 * i, cos33 * i + sin33 * q
    red, blue = y + v / 0.877283, y + u / 0.492111
    green = (y - 0.299 * red - 0.114 * blue) / 0.587
    return np.clip(np.stack([red, green, blue], axis=-1), 0, 1)


def plain_augment(clip: npt.NDArray[np.uint8], draws: torch.Tensor, size: int) -> Image:
    """One clip (T, H, W, 3) as the docstring of the module says, frame by frame: (T, size, size, 3) in [0, 1]."""
    value = {name: float(draws[getattr(under_test, name)]) for name in ("GREY", "BRIGHTNESS", "CONTRAST")}
    images = []
    for stored in clip:
        frame = to_frame(plain_crop(stored, draws, size))
        if value["GREY"]:
            frame = reference.rgb_to_grayscale(frame, num_output_channels=3)
        frame = reference.adjust_brightness(frame, value["BRIGHTNESS"])
        images.append(frame.permute(1, 2, 0).numpy())
    mean = np.mean([luma(image) for image in images])
    for at, image in enumerate(images):
        contrasted = np.clip(value["CONTRAST"] * image + (1 - value["CONTRAST"]) * mean, 0, 1)
        frame = reference.adjust_saturation(to_frame(contrasted), float(draws[under_test.SATURATION]))
        images[at] = plain_hue(frame.permute(1, 2, 0).numpy(), float(draws[under_test.HUE]))
        if sigma := float(draws[under_test.BLUR]):
            # 13 pixels reach 3 deviations of the widest blur; a frame of fewer is mirrored as far as it goes.
            kernel_size = min(13, 2 * size - 1)
            frame = reference.gaussian_blur(to_frame(images[at]), [kernel_size, kernel_size], [sigma, sigma])
            images[at] = frame.permute(1, 2, 0).numpy()
    return np.stack(images)


def in_pixels(clips: torch.Tensor) -> Image:
    """(B, 3, T, H, W) normalised -> (B, T, H, W, 3) in [0, 1], by torchvision's figures for Kinetics."""
    return clips.permute(0, 2, 3, 4, 1).double().numpy() * STD + MEAN


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"TOP": 1, "LEFT": 2, "HEIGHT": 4, "WIDTH": 6},
        {"TOP": 2, "LEFT": 0, "HEIGHT": 3, "WIDTH": 3, "FLIP": 1},
        {"GREY": 1},
        {"BRIGHTNESS": 0.6},
        {"BRIGHTNESS": 1.4},
        {"CONTRAST": 0.6},
        {"CONTRAST": 1.4},
        {"SATURATION": 0.6},
        {"SATURATION": 1.4},
        {"HUE": 0.1},
        {"HUE": -0.4},
        {"BLUR": 0.1},
        {"BLUR": 0.7},
        {"BLUR": 2.0},
    ],
    ids=lambda columns: "-".join(columns) or "nothing",
)
def test_each_step_equals_its_plain_version(columns: dict[str, float]) -> None:
    """One change at a time, within half a grey level of 255: YIQ and luma are given to three digits only."""
    clips, draws = random_clips(1, 2, 7, 9), row(7, 9, **columns)
    found = in_pixels(augment(clips, draws, size=SIZE))
    np.testing.assert_allclose(found[0], plain_augment(clips[0].numpy(), draws[0], SIZE), rtol=0, atol=0.5 / 255)


@pytest.mark.parametrize("settings", [SETTINGS, MOCO_V2], ids=["v1", "v2"])
def test_drawn_batch_equals_the_plain_version(settings: AugmentSettings) -> None:
    """Eight clips with all changes drawn at once, each by its own row; v2 leaves out some and blurs others."""
    clips = random_clips(8, 3, 20, 24)
    draws = torch.from_numpy(draw(seeds(8), settings, height=20, width=24))
    for size in (SIZE, 18):
        found = in_pixels(augment(clips, draws, size=size))
        for clip, numbers, result in zip(clips, draws, found, strict=True):
            np.testing.assert_allclose(result, plain_augment(clip.numpy(), numbers, size), rtol=0, atol=0.5 / 255)


def exact_blur(image: Image, sigma: float) -> Image:
    """Along rows, then columns: 13 weights of a Gaussian, or as many as mirroring once allows."""
    for axis in (0, 1):
        reach = min(6, image.shape[axis] - 1)
        weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
        padding = [(reach, reach) if each == axis else (0, 0) for each in range(3)]
        padded, length = np.pad(image, padding, mode="reflect"), image.shape[axis]
        shifted = [np.take(padded, range(at, at + length), axis) for at in range(2 * reach + 1)]
        image = sum(w * part for w, part in zip(weights, shifted, strict=True)) / sum(weights)
    return image


def exact_augment(clip: npt.NDArray[np.uint8], draws: torch.Tensor, size: int) -> Image:
    """One clip in float64, one step after the other: (T, H, W, 3) -> (T, size, size, 3) in [0, 1]."""
    names = ("GREY", "BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "BLUR")
    grey, brightness, contrast, saturation, hue, sigma = (float(draws[getattr(under_test, name)]) for name in names)
    images = np.stack([plain_crop(frame, draws, size) for frame in clip])
    if grey:
        images = np.repeat(luma(images)[..., None], 3, axis=-1)
    images = np.clip(brightness * images, 0, 1)
    images = np.clip(contrast * images + (1 - contrast) * luma(images).mean(), 0, 1)
    images = np.clip(saturation * images + (1 - saturation) * luma(images)[..., None], 0, 1)
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    y, i, q = np.moveaxis(images @ to_yiq.T, -1, 0)
    sin, cos = math.sin(2 * math.pi * hue), math.cos(2 * math.pi * hue)
    turned = np.stack([y, cos * i - sin * q, sin * i + cos * q], axis=-1)
    images = np.clip(turned @ np.linalg.inv(to_yiq).T, 0, 1)
    return np.stack([exact_blur(image, sigma) for image in images]) if sigma else images


@pytest.mark.parametrize("by_clip", [False, True], ids=["kinetics", "by-clip"])
@pytest.mark.parametrize("all_grey", [False, True], ids=["some-grey", "all-grey"])
@pytest.mark.parametrize("settings", [SETTINGS, MOCO_V2], ids=["v1", "v2"])
def test_result_equals_float64(settings: AugmentSettings, all_grey: bool, by_clip: bool) -> None:
    """Within 1e-5 of the range of a pixel: mirrored or not, grey, jittered and blurred in all combinations drawn."""
    settings = settings.model_copy(update={"grey_probability": 1.0 if all_grey else 0.5})
    clips, size = random_clips(16, 2, 14, 18), 11
    draws = torch.from_numpy(draw(seeds(16), settings, height=14, width=18))
    blurs = settings.blur_probability > 0
    found = augment(clips, draws, size=size, all_grey=all_grey, blurs=blurs, by_clip=by_clip)
    for clip, numbers, result in zip(clips, draws, found.permute(0, 2, 3, 4, 1).double().numpy(), strict=True):
        expected = exact_augment(clip.numpy(), numbers, size)
        mean, std = (expected.mean(), expected.std()) if by_clip else (MEAN, STD)
        np.testing.assert_allclose(result * std + mean, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_clip", [False, True], ids=["kinetics", "by-clip"])
@pytest.mark.parametrize("all_grey", [False, True], ids=["some-grey", "all-grey"])
@pytest.mark.parametrize("size", [7, 32])
def test_result_does_not_depend_on_the_other_clips(size: int, all_grey: bool, by_clip: bool) -> None:
    """On one CPU thread: alone, in a batch of 3, 8 or 24, and at another place in it, a clip has the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = MOCO_V2.model_copy(update={"grey_probability": 1.0 if all_grey else 0.2})
        clips = random_clips(24, 4, 40, 48)
        draws = torch.from_numpy(draw(seeds(24), settings, height=40, width=48))
        whole = augment(clips, draws, size=size, all_grey=all_grey, by_clip=by_clip)
        for count in (1, 3, 8):
            parts = zip(clips.split(count), draws.split(count), strict=True)
            found = torch.cat([augment(c, d, size=size, all_grey=all_grey, by_clip=by_clip) for c, d in parts])
            assert torch.equal(found, whole), f"in batches of {count}"
        turned = augment(clips.roll(5, 0), draws.roll(5, 0), size=size, all_grey=all_grey, by_clip=by_clip)
        assert torch.equal(turned.roll(-5, 0), whole)
    finally:
        torch.set_num_threads(threads)


def test_blur_meets_its_own_clip_alone() -> None:
    """Beside blurred clips, one of deviation 0 keeps its bits; the others are as blurred as each would be alone.

    Where nobody blurs, leaving the work out gives the same bits.
    """
    clips = random_clips(1, 2, 24, 24).expand(4, -1, -1, -1, -1)
    draws = torch.cat([row(24, 24, BLUR=sigma) for sigma in (0.0, 0.5, 0.0, 2.0)])
    together = augment(clips, draws, size=20)
    still = augment(clips[:1], draws[:1], size=20, blurs=False)
    assert torch.equal(together[0], still[0])
    assert torch.equal(together[2], still[0])
    for at in (1, 3):
        alone = augment(clips[:1], draws[at : at + 1], size=20)
        torch.testing.assert_close(together[at], alone[0], rtol=0, atol=1e-5)
    spread = [float(clip.std()) for clip in together]
    assert spread[0] > 1.2 * spread[1] > 1.2 * 1.2 * spread[3]


def test_whole_frame_at_its_own_size_is_the_frame() -> None:
    """A crop of everything, not scaled, gives the stored pixels; mirrored, it gives them from right to left."""
    clips = random_clips(1, 2, 6, 6)
    expected = clips.permute(0, 4, 1, 2, 3).float() / 255
    torch.testing.assert_close(resized_crop(clips, row(6, 6), size=6), expected, rtol=0, atol=1e-6)
    mirrored = resized_crop(clips, row(6, 6, FLIP=1), size=6)
    torch.testing.assert_close(mirrored, expected.flip(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [SETTINGS, MOCO_V2], ids=["v1", "v2"])
@pytest.mark.parametrize("size", [7, 32])
def test_frames_of_a_clip_are_changed_alike(size: int, settings: AugmentSettings) -> None:
    """Frames that are equal stay equal, in each of 16 clips; the same frame in two clips does not.

    Up to rounding: on some CPUs the last rows of a matrix product are added up in another order than the others.
    """
    frames = random_clips(1, 1, 40, 48).expand(16, 5, -1, -1, -1)
    clips = augment(frames, torch.from_numpy(draw(seeds(16), settings, height=40, width=48)), size=size)
    for time in range(1, 5):
        torch.testing.assert_close(clips[:, :, 0], clips[:, :, time], rtol=0, atol=2e-6)
    first_frames = clips[:, :, 0].flatten(1)
    assert torch.pdist(first_frames).min() > 0.1


def test_clips_are_normalised_by_themselves_where_that_is_asked_for() -> None:
    """Against plain numpy over each clip alone; a darker and flatter copy gives the same, and one colour zeros."""
    frames = random_clips(2, 3, 12, 12)
    frames[1] = frames[0] // 2 + 20
    draws = torch.cat([row(12, 12, BRIGHTNESS=0.9)] * 3)
    clips = torch.cat([frames, torch.full((1, 3, 12, 12, 3), 77, dtype=torch.uint8)])
    found = augment(clips, draws, size=SIZE, by_clip=True)
    plain = plain_augment(clips[0].numpy(), draws[0], SIZE)
    expected = ((plain - plain.mean()) / plain.std()).transpose(3, 0, 1, 2)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.05)  # half a grey level was rounded away
    assert found[2].abs().max() < 1e-3
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


def test_result_is_laid_out_for_the_encoders() -> None:
    """float32 (B, 3, T, size, size), channels_last_3d, normalised as torchvision's video models want it."""
    clips = augment(random_clips(2, 4, 20, 30), torch.cat([row(20, 30)] * 2), size=16)
    assert clips.shape == (2, 3, 4, 16, 16)
    assert clips.dtype == torch.float32
    assert clips.is_contiguous(memory_format=torch.channels_last_3d)
    pixels = torch.rand(1, 3, 2, 4, 4)
    expected = reference.normalize(pixels.transpose(1, 2), list(PRESET.mean), list(PRESET.std)).transpose(1, 2)
    torch.testing.assert_close(normalise(pixels), expected)
    assert torch.equal(to_pixels(normalise(pixels)), (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1))


@given(order=st.permutations(range(12)), chosen=st.integers(0, 11), settings=st.sampled_from([SETTINGS, MOCO_V2]))
def test_draws_are_a_pure_function_of_seeds(order: list[int], chosen: int, settings: AugmentSettings) -> None:
    """A seed gives the same row alone, or in a batch in any order, bit for bit."""
    whole = draw(seeds(12), settings, height=40, width=48)
    assert whole.dtype == np.float32
    assert np.array_equal(draw(seeds(12)[order], settings, height=40, width=48), whole[order])
    assert np.array_equal(draw(seeds(12)[[chosen]], settings, height=40, width=48), whole[[chosen]])


def plain_draw(seed: int, settings: AugmentSettings, *, height: int, width: int) -> list[float]:
    """The row of one seed, number by number, in the order of the columns."""

    def number(*purpose: str | int) -> float:
        return float(uniform(np.array([seed], np.uint64), hash64("augment", *purpose))[0])

    limit = min(max(width / height, 3 / 4), 4 / 3)
    crop = min(height, round(width / limit)), min(width, round(height * limit))
    for at in range(10):
        area = height * width * (settings.min_area + (1 - settings.min_area) * number("area", at))
        ratio = (4 / 3) ** (2 * number("ratio", at) - 1)
        tried = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if tried[0] <= height and tried[1] <= width:
            crop = tried
            break
    jittered = number("jitter") < settings.jitter_probability
    spreads = {"brightness": settings.brightness, "contrast": settings.contrast, "saturation": settings.saturation}
    return [
        math.floor(number("top") * (height - crop[0] + 1)),
        math.floor(number("left") * (width - crop[1] + 1)),
        *crop,
        number("flip") < settings.flip_probability,
        number("grey") < settings.grey_probability,
        *(1 + spread * (2 * number(name) - 1) if jittered else 1 for name, spread in spreads.items()),
        settings.hue * (2 * number("hue") - 1) if jittered else 0,
        0.1 + 1.9 * number("sigma") if number("blur") < settings.blur_probability else 0,
    ]


@pytest.mark.parametrize("settings", [SETTINGS, MOCO_V2], ids=["v1", "v2"])
@pytest.mark.parametrize(("height", "width"), [(128, 171), (100, 40)])
def test_drawn_table_equals_the_plain_version(settings: AugmentSettings, height: int, width: int) -> None:
    """Each column holds the number that is drawn for its own purpose, bit for bit."""
    table = draw(seeds(200), settings, height=height, width=width)
    plain = [plain_draw(seed, settings, height=height, width=width) for seed in range(200)]
    assert np.array_equal(table, np.array(plain, np.float32))


@given(height=st.integers(16, 200), width=st.integers(16, 200), min_area=st.sampled_from([0.05, 0.2, 0.6, 1.0]))
def test_crops_lie_inside_the_frame(height: int, width: int, min_area: float) -> None:
    """For any frame: inside, of a ratio in 3/4 to 4/3 and a share of the area in min_area to 1, up to whole pixels.

    Where no try of that size and shape fits, the crop is the largest of an allowed shape, so it touches two sides.
    """
    settings = AugmentSettings(min_area=min_area)
    table = draw(seeds(50), settings, height=height, width=width)
    for top, left, h, w in table[:, :4].astype(int).tolist():
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert (w - 0.5) / (h + 0.5) <= 4 / 3
        assert (w + 0.5) / (h - 0.5) >= 3 / 4
        assert h * w >= min_area * height * width - (h + w) or h == height or w == width
    assert np.array_equal(table[:, :4], table[:, :4].round())


def test_crops_move_over_the_whole_frame() -> None:
    """Both shares and places vary: areas reach from near min_area to near 1, and crops touch all four sides."""
    table = draw(seeds(2000), SETTINGS, height=128, width=171).astype(np.float64)
    top, left, height, width = table[:, :4].T
    shares = height * width / (128 * 171)
    assert shares.min() < 0.25
    assert shares.max() > 0.85
    assert 0.45 < np.median(shares) < 0.65  # even between 0.2 and 1, less what does not fit
    assert min(top) == min(left) == 0
    assert max(top + height) == 128
    assert max(left + width) == 171


def test_shares_and_ranges_of_the_draws() -> None:
    """Over 4000 seeds: flip half, grey a fifth (three standard deviations); jitters fill their ranges and no more."""
    table = draw(seeds(4000), SETTINGS, height=40, width=48).astype(np.float64)
    assert table[:, under_test.FLIP].mean() == pytest.approx(0.5, abs=0.024)
    assert table[:, under_test.GREY].mean() == pytest.approx(0.2, abs=0.02)
    for column in (under_test.BRIGHTNESS, under_test.CONTRAST, under_test.SATURATION):
        assert 0.6 <= table[:, column].min() < 0.61
        assert 1.39 < table[:, column].max() <= 1.4 + 1e-6
        assert table[:, column].mean() == pytest.approx(1, abs=0.012)
    assert np.abs(table[:, under_test.HUE]).max() == pytest.approx(0.4, abs=0.002)
    correlation = np.corrcoef(table[:, under_test.FLIP : under_test.BLUR].T)
    assert np.abs(correlation - np.eye(6)).max() < 0.07
    assert (table[:, under_test.BLUR] == 0).all()


def test_shares_and_ranges_of_the_draws_of_moco_v2() -> None:
    """Over 4000 seeds: 80 % jittered in all four colours at once, half blurred by 0.1 to 2 pixels, independently.

    What is drawn in both versions is the same number: v2 leaves out and adds, and changes nothing else.
    """
    table = draw(seeds(4000), MOCO_V2, height=40, width=48).astype(np.float64)
    colours = table[:, [under_test.BRIGHTNESS, under_test.CONTRAST, under_test.SATURATION, under_test.HUE]]
    untouched = (colours == [1, 1, 1, 0]).all(axis=1)
    assert ((colours == [1, 1, 1, 0]).any(axis=1) == untouched).all()
    assert untouched.mean() == pytest.approx(0.2, abs=0.02)
    blur = table[:, under_test.BLUR]
    assert (blur > 0).mean() == pytest.approx(0.5, abs=0.024)
    assert 0.1 <= blur[blur > 0].min() < 0.11
    assert 1.98 < blur.max() <= 2
    assert blur[blur > 0].mean() == pytest.approx(1.05, abs=0.04)
    together = np.corrcoef(np.stack([untouched, blur > 0, table[:, under_test.GREY], table[:, under_test.FLIP]]))
    assert np.abs(together - np.eye(4)).max() < 0.07
    before = draw(seeds(4000), SETTINGS, height=40, width=48)
    assert np.array_equal(table[:, : under_test.BRIGHTNESS], before[:, : under_test.BRIGHTNESS])
    assert np.array_equal(table[~untouched, under_test.CONTRAST], before[~untouched, under_test.CONTRAST])


def test_nothing_is_drawn_where_nothing_is_asked_for() -> None:
    """With all ranges at 0 and min_area 1, every draw is the whole frame, up to a rounded pixel, in its own colours."""
    still = AugmentSettings(
        min_area=1, grey_probability=0, brightness=0, contrast=0, saturation=0, hue=0, flip_probability=0
    )
    table = torch.from_numpy(draw(seeds(20), still, height=40, width=48))
    assert torch.equal(table[:, under_test.FLIP :], row(40, 48)[:, under_test.FLIP :].expand(20, -1))
    assert (table[:, : under_test.FLIP] - row(40, 48)[:, : under_test.FLIP]).abs().max() <= 1
