"""Augmentation of whole clips on the device: uint8 frames in, normalised floats out, no loop over clips or frames.

Split in two so that it is exact: `draw` turns seeds into a small table of numbers on the CPU (the same on every
machine), and `augment` applies the table to pixels wherever they are. All frames of a clip share one row of the table.

The steps are those of MoCo v1 and v2: random resized crop, flip, grey, brightness, contrast, saturation, hue,
blur, in this fixed order (v2 turns clips grey after the colours; on a grey clip both orders differ by clamping
alone). Departures from torchvision: contrast pulls towards the mean of the clip, not of each frame; hue is a
rotation in YIQ space, not a shift in HSV; a crop is sampled bilinearly without antialiasing, so ingest should
store frames not much larger than the training size. Blur is in pixels of the training clip.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from vmoco.config import AugmentSettings
from vmoco.seed import UInt64Array, hash64, uniforms

# Columns of the table of draws. A crop is in pixels of the stored frame.
TOP, LEFT, HEIGHT, WIDTH, FLIP, GREY, BRIGHTNESS, CONTRAST, SATURATION, HUE, BLUR = range(11)
NUM_COLUMNS = 11

# Mean and standard deviation of Kinetics-400 pixels in [0, 1], as torchvision's video models use them.
PIXEL_MEAN = (0.43216, 0.394666, 0.37645)
PIXEL_STD = (0.22803, 0.22145, 0.216989)

_LUMA = (0.299, 0.587, 0.114)
_CROP_TRIES = 10
_PURPOSES = ("jitter", "flip", "grey", "brightness", "contrast", "saturation", "hue", "sigma", "blur", "top", "left")
# Standard deviation of the blur in pixels (MoCo v2), and the reach of its kernel: 3 of the largest.
_SIGMAS = (0.1, 2.0)
_REACH = 6


def draw(seeds: UInt64Array, settings: AugmentSettings, *, height: int, width: int) -> npt.NDArray[np.float32]:
    """The table of draws: float32 (B, NUM_COLUMNS), a pure function of the seeds.

    Args:
        seeds: one per clip and view.
        settings: ranges of the draws.
        height: of the stored frames, pixels.
        width: of the stored frames, pixels.
    """

    # All numbers in one go: a call for each purpose would cost more than the numbers.
    salts = [hash64("augment", purpose) for purpose in _PURPOSES]
    salts += [hash64("augment", what, at) for what in ("area", "ratio") for at in range(_CROP_TRIES)]
    drawn = uniforms(seeds, salts)
    numbers = {purpose: drawn[:, at] for at, purpose in enumerate(_PURPOSES)}
    jittered = numbers["jitter"] < settings.jitter_probability

    def around_one(purpose: str, spread: float) -> npt.NDArray[np.float64]:
        return np.where(jittered, 1 + spread * (2 * numbers[purpose] - 1), 1)

    table = np.empty((len(seeds), NUM_COLUMNS), np.float64)
    crop_height, crop_width = _crop_shapes(drawn[:, len(_PURPOSES) :], settings.min_area, height=height, width=width)
    table[:, TOP] = np.floor(numbers["top"] * (height - crop_height + 1))
    table[:, LEFT] = np.floor(numbers["left"] * (width - crop_width + 1))
    table[:, HEIGHT], table[:, WIDTH] = crop_height, crop_width
    table[:, FLIP] = numbers["flip"] < settings.flip_probability
    table[:, GREY] = numbers["grey"] < settings.grey_probability
    table[:, BRIGHTNESS] = around_one("brightness", settings.brightness)
    table[:, CONTRAST] = around_one("contrast", settings.contrast)
    table[:, SATURATION] = around_one("saturation", settings.saturation)
    table[:, HUE] = np.where(jittered, settings.hue * (2 * numbers["hue"] - 1), 0)
    sigma = _SIGMAS[0] + (_SIGMAS[1] - _SIGMAS[0]) * numbers["sigma"]
    table[:, BLUR] = np.where(numbers["blur"] < settings.blur_probability, sigma, 0)
    return table.astype(np.float32)


def _crop_shapes(
    numbers: npt.NDArray[np.float64], min_area: float, *, height: int, width: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Heights and widths of random resized crops as torchvision draws them: the first of ten tries that fits, else the
    largest that does.

    Args:
        numbers: float64 (B, 2 * tries) in [0, 1): areas, then ratios.
        min_area: share of the frame.
        height: of the frame.
        width: of the frame.
    """
    areas, ratios = np.split(numbers, 2, axis=1)
    area = height * width * (min_area + (1 - min_area) * areas)
    ratio = np.exp((2 * ratios - 1) * math.log(4 / 3))
    widths, heights = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (widths <= width) & (heights <= height)
    first, rows, any_fits = fits.argmax(axis=1), np.arange(len(numbers)), fits.any(axis=1)
    limit = min(max(width / height, 3 / 4), 4 / 3)
    return (
        np.where(any_fits, heights[rows, first], min(height, round(width / limit))),
        np.where(any_fits, widths[rows, first], min(width, round(height * limit))),
    )


def augment(
    frames: torch.Tensor,
    draws: torch.Tensor,
    *,
    size: int,
    blurs: bool = True,
    by_clip: bool = False,
) -> torch.Tensor:
    """Applies a table of draws.

    Args:
        frames: uint8 (B, T, H, W, 3).
        draws: float32 (B, NUM_COLUMNS) from `draw`, on the same device.
        size: height and width of the result, pixels.
        blurs: False where no draw blurs, to save the work; asking the draws would wait for the device.
        by_clip: normalise each clip by its own mean and deviation instead of Kinetics'.

    Returns:
        float32 (B, 3, T, size, size), normalised, channels_last_3d.
    """
    clips = resized_crop(frames, draws, size=size)
    clips = _blend(clips, _grey(clips), 1 - draws[:, GREY])
    clips = _blend(clips, torch.zeros_like(clips), draws[:, BRIGHTNESS])
    clips = _blend(clips, _grey(clips).mean(dim=(1, 2, 3, 4), keepdim=True), draws[:, CONTRAST])
    clips = _blend(clips, _grey(clips), draws[:, SATURATION])
    clips = torch.einsum("bij,bjthw->bithw", _hue_rotation(draws[:, HUE]), clips).clamp(0, 1)
    if blurs:
        clips = blurred(clips, draws)
    return standardise(clips) if by_clip else normalise(clips)


def resized_crop(frames: torch.Tensor, draws: torch.Tensor, *, size: int) -> torch.Tensor:
    """Crops, mirrors and scales by one bilinear sampling: float32 (B, 3, T, size, size) in [0, 1]."""
    batch, num_frames, height, width, channels = frames.shape
    pixels = frames.permute(0, 1, 4, 2, 3).reshape(batch, num_frames * channels, height, width)
    at = (torch.arange(size, device=frames.device) + 0.5) / size
    across = torch.where(draws[:, FLIP, None] > 0, 1 - at, at)  # mirrored clips read their columns backwards
    x = (draws[:, LEFT, None] + across * draws[:, WIDTH, None]) * (2 / width) - 1
    y = (draws[:, TOP, None] + at * draws[:, HEIGHT, None]) * (2 / height) - 1
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
    # All frames of a clip are channels of one image here: they cannot be cropped differently.
    sampled = F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    return sampled.view(batch, num_frames, channels, size, size).transpose(1, 2) / 255


def blurred(clips: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of whole clips, each by its own deviation, edges mirrored: (B, 3, T, H, W) -> the same.

    Separable: once down the columns and once along the rows. A deviation of 0 is no blur.
    """
    batch, channels, num_frames, height, width = clips.shape
    reach = min(_REACH, height - 1, width - 1)
    offsets = torch.arange(-reach, reach + 1, device=clips.device)
    # A deviation of 0.01 pixels leaves one weight, exactly 1.
    kernel = torch.exp(-0.5 * (offsets / draws[:, BLUR, None].clamp(min=0.01)).square())
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    # All colours and frames are images whose channels are the clips: each clip meets its own kernel, and no other.
    images = clips.permute(1, 2, 0, 3, 4).reshape(channels * num_frames, batch, height, width)
    images = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    images = F.conv2d(images, kernel[:, None, :, None], groups=batch)
    images = F.conv2d(images, kernel[:, None, None, :], groups=batch)
    return images.view(channels, num_frames, batch, height, width).permute(2, 0, 1, 3, 4)


def normalise(clips: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W) in [0, 1] -> zero mean and unit deviation over Kinetics, channels_last_3d."""
    mean = clips.new_tensor(PIXEL_MEAN).view(3, 1, 1, 1)
    std = clips.new_tensor(PIXEL_STD).view(3, 1, 1, 1)
    return ((clips - mean) / std).contiguous(memory_format=torch.channels_last_3d)


def standardise(clips: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W) -> zero mean and unit deviation over each clip, colours and frames alike, channels_last_3d."""
    apart = clips - clips.mean(dim=(1, 2, 3, 4), keepdim=True)
    deviation = apart.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
    # A clip of one colour becomes zero; a third of a grey level is no contrast worth keeping.
    return (apart / deviation.clamp(min=1e-3)).contiguous(memory_format=torch.channels_last_3d)


def to_pixels(clips: torch.Tensor) -> torch.Tensor:
    """What `normalise` was given, to look at: (B, 3, T, H, W) -> uint8 (B, T, H, W, 3).

    After `standardise` it is the same picture in Kinetics' brightness and contrast.
    """
    mean = clips.new_tensor(PIXEL_MEAN).view(3, 1, 1, 1)
    std = clips.new_tensor(PIXEL_STD).view(3, 1, 1, 1)
    return ((clips * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def _grey(clips: torch.Tensor) -> torch.Tensor:
    return torch.einsum("c,bcthw->bthw", clips.new_tensor(_LUMA), clips).unsqueeze(1)


def _blend(clips: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight * clips + (1 - weight) * other, one weight per clip, kept in [0, 1] as pixels are."""
    weight = weight.view(-1, 1, 1, 1, 1)
    return (weight * clips + (1 - weight) * other).clamp(0, 1)


def _hue_rotation(turns: torch.Tensor) -> torch.Tensor:
    """(B, 3, 3) matrices that rotate the colour plane of YIQ and leave luma alone."""
    to_yiq = turns.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)
    one, zero = torch.ones_like(turns), torch.zeros_like(turns)
    rotation = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=-1).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq
