"""The network of an encoder, and what it does to frames first, with torch and torchvision alone.

`jobs/export.py --to huggingface` copies this file and `modeling_vmoco.py` beside the weights, so that transformers can
load an encoder where vmoco is not installed. So this file imports nothing of vmoco. It repeats
`vmoco/model/backbone.py`, and the preprocessing of `vmoco/encoders/encoder.py`; each export compares the features of
the two, and is refused if a bit differs.

Shape letters: B clips, T frames, H W pixels, S the encoder's size, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import video
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DSimple, VideoResNet

_RESNETS = {"r3d_18": video.r3d_18, "mc3_18": video.mc3_18, "r2plus1d_18": video.r2plus1d_18}
_NANO = {"r3d_nano": Conv3DSimple, "r2plus1d_nano": Conv2Plus1D}
NETWORKS = (*_RESNETS, "s3d", *_NANO)
"""Names of the networks that can be built here."""
S3D_FRAMES = 5
"""Fewest frames for S3D: it halves time three times, the last time without padding."""


class VideoNetwork(nn.Module):
    """A video network without classifier, with the preprocessing that it was trained with.

    Args:
        name: one of NETWORKS; its weights have the keys of torchvision, under `trunk.`.
        size: height and width in pixels to which frames are scaled.
        mean: of red, green and blue in [0, 1], subtracted from pixels.
        std: divides pixels after that.
        standardise: scale each clip to zero mean and unit deviation instead.

    Raises:
        ValueError: the name is not known.
    """

    def __init__(
        self, name: str, *, size: int, mean: Sequence[float], std: Sequence[float], standardise: bool = False
    ) -> None:
        super().__init__()
        if name not in NETWORKS:
            raise ValueError(f"network {name!r} is not known: give one of {', '.join(NETWORKS)}")
        self.name, self.size, self.standardise = name, size, standardise
        # Numbers, and no buffers: transformers builds a network without memory, and fills only what is in the file.
        self.mean, self.std = tuple(mean), tuple(std)
        self.trunk = _trunk(name)

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps (B, D, T', H', W') and their mean, the features (B, D), both of the type of the weights.

        Args:
            clips: raw frames, uint8 (B, T, H, W, 3), RGB, of any size; or what `preprocess` makes of them, float
                (B, 3, T, S, S).

        Raises:
            ValueError: clips of another shape or type, or too short.
        """
        if not clips.is_floating_point():
            clips = self.preprocess(clips)
        if clips.ndim != 5 or clips.shape[1] != 3:
            raise ValueError(
                f"clips are {clips.dtype} {tuple(clips.shape)}: give uint8 (clips, frames, height, width, 3), or "
                "normalised float (clips, 3, frames, height, width)"
            )
        if self.name == "s3d" and clips.shape[2] < S3D_FRAMES:
            raise ValueError(f"clips have {clips.shape[2]} frames: give at least {S3D_FRAMES}, which an s3d needs")
        trunk: Any = self.trunk
        if self.name == "s3d":
            maps = trunk.features(clips)
            # torchvision pools over 2x7x7, which small clips do not fill. In float32, which all devices can pool.
            window = [min(have, most) for have, most in zip(maps.shape[2:], (2, 7, 7), strict=True)]
            pooled = F.avg_pool3d(maps.float(), window, stride=1).to(maps.dtype)
            return maps, pooled.mean(dim=(2, 3, 4))
        if isinstance(trunk, VideoResNet):
            maps = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(trunk.stem(clips)))))
            return maps, trunk.avgpool(maps).flatten(1)
        maps = trunk[:-2](clips)  # without pooling and flattening
        return maps, trunk[-2:](maps)

    def preprocess(self, frames: torch.Tensor) -> torch.Tensor:
        """Raw frames, uint8 (B, T, H, W, 3), RGB -> (B, 3, T, S, S) of the type of the weights, computed in float32.

        Frames are cut to their middle square, scaled with antialiasing, and normalised.

        Raises:
            ValueError: frames of another shape or type.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3 or not frames.numel():
            raise ValueError(
                f"frames are {frames.dtype} {tuple(frames.shape)}: give uint8 RGB, of shape (clips, frames, height, "
                "width, 3)"
            )
        device, dtype = frames.device, torch.float32
        for weights in self.parameters():  # a loop, because torch 2.7 does not compile `next` of a generator
            device, dtype = weights.device, weights.dtype
            break
        side = min(frames.shape[2:4])
        top, left = (frames.shape[2] - side) // 2, (frames.shape[3] - side) // 2
        square = frames[:, :, top : top + side, left : left + side]
        pixels = square.permute(0, 1, 4, 2, 3).flatten(0, 1).to(device).float() / 255
        scaled = F.interpolate(
            pixels, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )
        clips = scaled.unflatten(0, square.shape[:2]).transpose(1, 2)
        if self.standardise:
            apart = clips - clips.mean(dim=(1, 2, 3, 4), keepdim=True)
            deviation = apart.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
            # A clip of one colour becomes zero: a deviation below a third of a grey level is noise.
            normalised = (apart / deviation.clamp(min=1e-3)).contiguous(memory_format=torch.channels_last_3d)
        else:
            mean, std = (
                torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1, 1)
                for values in (self.mean, self.std)
            )
            normalised = (clips - mean) / std
        return normalised.to(dtype)


def _trunk(name: str) -> nn.Module:
    """The network with random weights, without its classifier."""
    trunk: nn.Module
    if name in _RESNETS:
        trunk = _RESNETS[name](weights=None)
        trunk.fc = nn.Identity()
        return trunk
    if name == "s3d":
        trunk = video.s3d(weights=None)
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.momentum = 0.1  # torchvision's 0.001 is TensorFlow's 0.999
        trunk.classifier = nn.Identity()
        return trunk
    return _nano(_NANO[name])


def _nano(convolution: Callable[..., nn.Module]) -> nn.Module:
    """A stem and three residual blocks of torchvision's, each halving time and space: 128 features."""
    widths = (16, 32, 64, 128)
    stem = nn.Sequential(
        nn.Conv3d(3, widths[0], (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
        nn.BatchNorm3d(widths[0]),
        nn.ReLU(inplace=True),
    )
    blocks = []
    for narrow, wide in pairwise(widths):
        shortcut = nn.Sequential(nn.Conv3d(narrow, wide, 1, stride=2, bias=False), nn.BatchNorm3d(wide))
        blocks.append(BasicBlock(narrow, wide, convolution, stride=2, downsample=shortcut))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten())
