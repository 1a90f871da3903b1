"""Augmentation of whole clips on the device: uint8 frames in, normalised floats out, no loop over clips or frames.

It has two parts, so that it is exact. `draw` turns seeds into a small table of numbers on the CPU, the same on every
machine. `augment` applies the table to pixels on any device. All frames of a clip share one row of the table.

The steps are those of MoCo v1 and v2: random resized crop, flip, grey, brightness, contrast, saturation, hue,
blur, in this fixed order. (v2 turns clips grey after the colours. On a grey clip the two orders differ only by
clamping.) Three things differ from torchvision. Contrast pulls towards the mean of the clip, not of each frame. Hue is
a rotation in YIQ space, not a shift in HSV. A crop is sampled bilinearly without antialiasing, so ingest should store
frames not much larger than the training size. Blur is in pixels of the training clip.

Every step is linear, apart from clamping, so it is computed as a matrix product: crop, flip and resize are one small
matrix for the rows and one for the columns, the blur is another, and colours are 3x3 matrices. Each clip has its own
matrices. On one CPU thread a clip has the same bits alone as in any batch. The result equals the same steps in float64
within 1e-5 of the range of a pixel.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from vmoco.clip_settings import AugmentSettings
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
    """Draws the table: float32 (B, NUM_COLUMNS), a pure function of the seeds.

    Args:
        seeds: one per clip and view.
        settings: ranges of the draws.
        height: of the stored frames, pixels.
        width: of the stored frames, pixels.
    """

    # All numbers in one call: a call for each purpose would cost more than the numbers.
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
    """Heights and widths of random resized crops, drawn as torchvision does.

    The first of ten tries that fits into the frame is taken. If none fits, it is the largest crop of an allowed ratio.

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
    all_grey: bool = False,
    blurs: bool = True,
    by_clip: bool = False,
) -> torch.Tensor:
    """Applies a table of draws.

    Args:
        frames: uint8 (B, T, H, W, 3).
        draws: float32 (B, NUM_COLUMNS) from `draw`, on the same device.
        size: height and width of the result, pixels.
        all_grey: True if every draw turns its clip grey. One channel is computed instead of three.
        blurs: False if no draw blurs: the blur is skipped. To read this from the draws would wait for the device.
        by_clip: normalise each clip by its own mean and deviation instead of those of Kinetics.

    Returns:
        float32 (B, 3, T, size, size), normalised, channels_last_3d.
    """
    clips = _grey_clips(frames, draws, size=size) if all_grey else _colour_clips(frames, draws, size=size)
    if blurs:
        clips = blurred(clips, draws)
    clips = standardise(clips) if by_clip else normalise(clips)
    return clips.expand(-1, 3, -1, -1, -1).contiguous(memory_format=torch.channels_last_3d)


def resized_crop(frames: torch.Tensor, draws: torch.Tensor, *, size: int) -> torch.Tensor:
    """Crops, mirrors and scales bilinearly: uint8 (B, T, H, W, 3) -> float32 (B, 3, T, size, size) in [0, 1]."""
    batch, num_frames, height, width, _ = frames.shape
    pixels = frames.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    rows, columns = _crop_matrices(draws, size=size, height=height, width=width)
    narrow = torch.bmm(pixels.view(batch, -1, width), columns.transpose(1, 2))
    return _down(rows, narrow.view(batch, 3, num_frames, height, size))


def _colour_clips(frames: torch.Tensor, draws: torch.Tensor, *, size: int) -> torch.Tensor:
    """All steps but the blur: float32 (B, 3, T, size, size) in [0, 1].

    Each step is a 3x3 matrix or a scale and an offset, followed by a clamp. Grey and brightness are one matrix: a mean
    of colours needs no clamp.
    """
    clips = resized_crop(frames, draws, size=size)
    batch, shape = len(clips), clips.shape
    pixels = clips.view(batch, 3, -1)
    luma, hue = _colour_constants(clips.device)
    identity = torch.eye(3, device=clips.device)
    grey, brightness, contrast, saturation = (
        draws[:, column, None, None] for column in (GREY, BRIGHTNESS, CONTRAST, SATURATION)
    )
    pixels = torch.bmm(brightness * torch.where(grey > 0, luma, identity), pixels).clamp_(0, 1)
    mean = (pixels.mean(dim=2, keepdim=True) * luma[0, :, None]).sum(dim=1, keepdim=True)
    pixels = pixels.mul_(contrast).add_((1 - contrast) * mean).clamp_(0, 1)
    pixels = torch.bmm(saturation * identity + (1 - saturation) * luma, pixels).clamp_(0, 1)
    angle = 2 * math.pi * draws[:, HUE, None, None]
    rotation = hue[0] + torch.cos(angle) * hue[1] + torch.sin(angle) * hue[2]
    return torch.bmm(rotation, pixels).clamp_(0, 1).view(shape)


def _grey_clips(frames: torch.Tensor, draws: torch.Tensor, *, size: int) -> torch.Tensor:
    """The same for grey clips, as one channel: float32 (B, 1, T, size, size). Saturation and hue have no effect."""
    batch, num_frames, height, width, channels = frames.shape
    rows, columns = _crop_matrices(draws, size=size, height=height, width=width)
    luma, _ = _colour_constants(frames.device)
    # The luma of a pixel and the columns of the crop are one sum over the numbers of a stored row, (W, 3).
    to_luma = (columns.transpose(1, 2)[:, :, None] * luma[0, :, None]).reshape(batch, width * channels, size)
    narrow = torch.bmm(frames.to(torch.float32).view(batch, num_frames * height, width * channels), to_luma)
    clips = _down(rows, narrow.view(batch, 1, num_frames, height, size))
    brightness, contrast = (draws[:, column, None, None, None, None] for column in (BRIGHTNESS, CONTRAST))
    clips = clips.mul_(brightness).clamp_(0, 1)
    mean = clips.mean(dim=(1, 2, 3, 4), keepdim=True)
    return clips.mul_(contrast).add_((1 - contrast) * mean).clamp_(0, 1)


def _crop_matrices(draws: torch.Tensor, *, size: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bilinear crop of a frame X as two products, rows @ X @ columns^T: (B, size, H) and (B, size, W).

    The columns also mirror, and divide by 255.
    """
    at = (torch.arange(size, device=draws.device) + 0.5) / size
    across = torch.where(draws[:, FLIP, None] > 0, 1 - at, at)  # mirrored clips read their columns backwards

    def tents(centres: torch.Tensor, length: int) -> torch.Tensor:
        # A pixel weighs 1 minus its distance. Beyond the centres of the outermost pixels their colour continues.
        distances = centres.clamp(0, length - 1)[:, :, None] - torch.arange(length, device=draws.device)
        return (1 - distances.abs()).clamp(min=0)

    rows = tents(draws[:, TOP, None] + at * draws[:, HEIGHT, None] - 0.5, height)
    columns = tents(draws[:, LEFT, None] + across * draws[:, WIDTH, None] - 0.5, width)
    return rows, columns / 255


def _down(matrices: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
    """The matrix of each clip times all its frames: (B, N, H), (B, C, T, H, W) -> (B, C, T, N, W)."""
    batch, channels, num_frames, height, width = clips.shape
    each = matrices[:, None].expand(-1, channels * num_frames, -1, -1).reshape(-1, matrices.shape[1], height)
    return torch.bmm(each, clips.view(-1, height, width)).view(batch, channels, num_frames, -1, width)


def blurred(clips: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of whole clips, each by its own deviation, edges mirrored: (B, C, T, size, size) -> the same.

    Separable: the product with one symmetric matrix per clip along the rows, and with the same along the columns.
    """
    batch, size = len(clips), clips.shape[-1]
    matrices = _blur_matrices(draws, size=size)
    along = torch.bmm(clips.view(batch, -1, size), matrices.transpose(1, 2))
    return _down(matrices, along.view(clips.shape))


def _blur_matrices(draws: torch.Tensor, *, size: int) -> torch.Tensor:
    """(B, size, size): what each pixel of a row (dim 2) adds to each blurred pixel (dim 1)."""
    reach = min(_REACH, size - 1)
    offsets = torch.arange(-reach, reach + 1, device=draws.device)
    # A deviation of 0.01 pixels leaves one weight, exactly 1.
    kernel = torch.exp(-0.5 * (offsets / draws[:, BLUR, None].clamp(min=0.01)).square())
    kernel = F.pad((kernel / kernel.sum(dim=1, keepdim=True))[:, reach:], (0, 1))  # by distance; 0 beyond the reach
    at = torch.arange(size, device=draws.device)
    target, source = at[:, None], at[None, :]
    # A pixel is seen at its place, and mirrored at the first and at the last pixel of its row, which are seen once.
    last = size - 1
    before = torch.where(source > 0, target + source, size)
    after = torch.where(source < last, 2 * last - target - source, size)
    direct, before, after = (d.clamp(max=reach + 1) for d in ((target - source).abs(), before, after))
    return kernel[:, direct] + kernel[:, before] + kernel[:, after]


def normalise(clips: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W) in [0, 1] -> zero mean and unit deviation over Kinetics, channels_last_3d.

    One channel, (B, 1, T, H, W), stands for three equal ones.
    """
    mean, std = _pixel_constants(clips.device)
    return (clips - mean).div_(std).contiguous(memory_format=torch.channels_last_3d)


def standardise(clips: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) -> zero mean and unit deviation over each clip, colours and frames alike, channels_last_3d."""
    apart = clips - clips.mean(dim=(1, 2, 3, 4), keepdim=True)
    deviation = apart.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
    # A clip of one colour becomes zero: a deviation below a third of a grey level is noise.
    return (apart / deviation.clamp(min=1e-3)).contiguous(memory_format=torch.channels_last_3d)


def to_pixels(clips: torch.Tensor) -> torch.Tensor:
    """Inverts `normalise`, to look at clips: float (B, 3, T, H, W) -> uint8 (B, T, H, W, 3).

    After `standardise` it gives the same picture, in Kinetics' brightness and contrast.
    """
    mean, std = _pixel_constants(clips.device)
    return ((clips * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


# Cached: a copy from the host to a GPU makes the host wait.
@functools.cache
def _pixel_constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of Kinetics, (3, 1, 1, 1)."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return mean, std


@functools.cache
def _colour_constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix that turns colours grey, (3, 3), and three matrices P, Q and R, (3, 3, 3).

    P + cos(a) Q + sin(a) R rotates the colour plane of YIQ by the angle a and keeps luma.
    """
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    parts = np.zeros((3, 3, 3))
    parts[0, 0, 0] = 1
    parts[1, 1, 1] = parts[1, 2, 2] = 1
    parts[2, 1, 2], parts[2, 2, 1] = -1, 1
    rotations = np.linalg.inv(to_yiq) @ parts @ to_yiq
    grey = np.tile(_LUMA, (3, 1))
    return torch.tensor(grey, dtype=torch.float32, device=device), torch.tensor(
        rotations, dtype=torch.float32, device=device
    )
