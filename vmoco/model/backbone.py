"""Networks from a clip to a feature (torchvision's, and small ones of the same blocks for a CPU), and how they compute.

The head maps a feature to the embedding that the loss compares. It is thrown away after pretraining.

They compute in bf16 or fp32, and if asked for in a deterministic way. CPUs always use fp32, even if they support bf16.
At small shapes their bf16 weight gradient of a 3-D convolution is computed from uninitialised memory (seen with torch
2.14.1 on AVX512-BF16: 512 channels, 3x3x3, at 2x7x7, the last layer of r3d_18 at 16x112x112;
`python -m tests.benchmarks.bf16_gradient` shows it).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import video as torchvision_video
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DSimple

from vmoco.architectures import ARCHITECTURES
from vmoco.model.transformer import build_mvit, build_swin, mvit_tokens, swin_tokens

_TORCHVISION = {
    "r3d_18": torchvision_video.r3d_18,
    "mc3_18": torchvision_video.mc3_18,
    "r2plus1d_18": torchvision_video.r2plus1d_18,
}
# Networks with an operation that has no deterministic gradient on GPUs (torch 2.14), and that operation.
_WITHOUT = {"s3d": "3-D max and average pooling", "mvit_v2_s": "3-D max pooling"}


class Backbone(nn.Module):
    """A network without its classifier.

    Args:
        trunk: module from float (B, 3, T, H, W), normalised, to (B, feature_dim).
        feature_dim: width of a feature.
    """

    def __init__(self, trunk: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.feature_dim = feature_dim

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) -> features (B, feature_dim)."""
        features: torch.Tensor = self.trunk(clips)
        return features

    def feature_maps(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) -> what is pooled into the features: (B, feature_dim, T', H', W')."""
        trunk: Any = self.trunk
        if isinstance(trunk, torchvision_video.S3D):
            maps: torch.Tensor = trunk.features(clips)
        elif isinstance(trunk, torchvision_video.VideoResNet):
            maps = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(trunk.stem(clips)))))
        else:
            maps = trunk[:-2](clips)  # without pooling and flattening
        return maps


class SwinBackbone(Backbone):
    """A Swin transformer; its features are the mean of its last tokens."""

    def forward(self, clips: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, T, H, W) -> features (B, feature_dim); `factors` (B, N) as for `transformer.Branches`."""
        pool: Any = self.trunk.avgpool
        features: torch.Tensor = pool(swin_tokens(self.trunk, clips, factors)).flatten(1)
        return features

    def feature_maps(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) -> what is pooled into the features: (B, feature_dim, T', H', W')."""
        return swin_tokens(self.trunk, clips, None)


class MvitBackbone(Backbone):
    """A multiscale vision transformer; its feature is the class token, which attends to all places."""

    def forward(self, clips: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, T, H, W) -> features (B, feature_dim); `factors` (B, N) as for `transformer.Branches`."""
        return mvit_tokens(self.trunk, clips, factors)[0][:, 0]

    def feature_maps(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) -> the last tokens by place: (B, feature_dim, T', H', W'). Their mean is not the feature."""
        tokens, shape = mvit_tokens(self.trunk, clips, None)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, shape)


def build_backbone(name: str, *, num_frames: int = 16, size: int = 224) -> Backbone:
    """A randomly initialised backbone.

    Args:
        name: of `vmoco/architectures.py`.
        num_frames: T of its training clips; decides shapes of weights only where the architecture learns positions.
        size: their height and width, likewise.

    Raises:
        ValueError: the name is not known.
    """
    if name in _TORCHVISION:
        trunk = _TORCHVISION[name](weights=None)
        feature_dim = trunk.fc.in_features
        trunk.fc = nn.Identity()
        return Backbone(trunk, feature_dim)
    if name == "s3d":
        return _s3d()
    if name.startswith("swin3d") and name in ARCHITECTURES:
        swin = build_swin(name)
        return SwinBackbone(swin, swin.num_features)
    if name == "mvit_v2_s":
        mvit = build_mvit(num_frames=num_frames, size=size)
        return MvitBackbone(mvit, 768)
    if name == "r3d_nano":
        return _nano(Conv3DSimple)
    if name == "r2plus1d_nano":
        return _nano(Conv2Plus1D)
    raise ValueError(f"--model.backbone {name!r} is not known: give one of {', '.join(ARCHITECTURES)}")


class _S3dPool(nn.Module):
    """torchvision's pooling over 2x7x7 windows, also for clips below 16x224x224, which have no complete window."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, C, T', H', W'); S3D then takes the mean over T', H' and W'."""
        frames, height, width = features.shape[2:]
        # In float32: torch has no such pooling in bfloat16 and float16 on CPUs.
        pooled = F.avg_pool3d(features.float(), (min(frames, 2), min(height, 7), min(width, 7)), stride=1)
        return pooled.to(features.dtype)


def _s3d() -> Backbone:
    """torchvision's S3D (Xie et al., 2018): 1024 features."""
    trunk = torchvision_video.s3d(weights=None)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm3d):
            # torchvision's 0.001 is TensorFlow's 0.999: after a thousand steps the running statistics would still be
            # mostly those of the random initialisation.
            module.momentum = 0.1
    feature_dim = trunk.classifier[1].in_channels
    trunk.avgpool, trunk.classifier = _S3dPool(), nn.Identity()
    return Backbone(trunk, feature_dim)


def _nano(convolution: Callable[..., nn.Module]) -> Backbone:
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
    trunk = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten())
    trunk.apply(_initialise)
    return Backbone(trunk, widths[-1])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_head(kind: str, feature_dim: int, embedding_dim: int) -> nn.Module:
    """A linear layer (MoCo, VideoMoCo) or two layers with a ReLU between (MoCo v2): (B, feature_dim) -> (B, D)."""
    if kind == "linear":
        return nn.Linear(feature_dim, embedding_dim)
    return nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, embedding_dim))


def autocast_dtype(precision: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The type for autocast (None for float32) and the reason, for the log; switches TF32 off.

    Args:
        precision: "auto", "bf16" or "fp32".
        device: where the encoders run.

    Raises:
        ValueError: the device has no usable bf16, and `precision` is "bf16".
    """
    # NVIDIA GPUs would compute fp32 convolutions in TF32, with 3 digits: fp32 means fp32 here.
    torch.backends.cudnn.allow_tf32 = False
    if precision == "fp32":
        return None, "fp32 as asked for"
    if device.type == "cpu":
        if precision == "bf16":
            raise ValueError(
                "--train.precision bf16 is not allowed on a CPU, because its bf16 weight gradients are wrong at small "
                "shapes: use auto or fp32"
            )
        return None, "fp32 because bf16 gradients are wrong on CPUs"
    name = torch.cuda.get_device_name(device)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, f"bf16 because {name} computes in it"
    if precision == "bf16":
        raise ValueError(f"--train.precision bf16, but {name} does not compute in it: use auto or fp32")
    return None, f"fp32 because {name} has no bf16 arithmetic"


def require_determinism(backbone: str, device: torch.device) -> None:
    """Makes this process use deterministic algorithms only, so the same GPUs give the same bits, at some cost in speed.

    Operations without such an algorithm raise an error from then on. CPUs are deterministic already. Call it once,
    before any other work.

    Raises:
        ValueError: the backbone has no deterministic gradient on this device.
    """
    if device.type == "cuda" and backbone in _WITHOUT:
        raise ValueError(
            f"--train.deterministic, but the gradient of {_WITHOUT[backbone]} in --model.backbone {backbone} has no "
            "deterministic algorithm on GPUs: use another backbone, or --train.no-deterministic"
        )
    # cuBLAS reads this when it first needs memory: matrix products are repeatable only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # it would choose algorithms by their speed at that moment
    # torch would fill all new memory with NaN, to find code that reads it too early: one more pass over every result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
