"""Computes (2+1)D convolutions with channels padded to a multiple of 8, which the tensor cores of GPUs need in bf16.

R(2+1)D has 45, 144, 230, 288, 460, 576, 921 and 1152 channels between its two convolutions, so that it has as many
weights as a 3-D network. The padding is zeros, made anew in each forward: parameters, gradients and statistics keep the
shapes of torchvision, and so do checkpoints, optimizers and exported encoders. A padded channel is always zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.video.resnet import Conv2Plus1D, R2Plus1dStem

MULTIPLE = 8


class PaddedConv2Plus1D(Conv2Plus1D):
    """torchvision's convolution over space, normalisation, ReLU and convolution over time."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W'), as without padding up to rounding."""
        return _factored(clips, *self)


class PaddedStem(R2Plus1dStem):
    """torchvision's first layers, of which the first four are such a convolution."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) -> (B, 64, T, H', W'), as without padding up to rounding."""
        features = _factored(clips, *list(self)[:4])
        for layer in list(self)[4:]:
            features = layer(features)
        return features


def pad_channels(network: nn.Module) -> None:
    """Has a network compute with padded channels from now on, in place. Others than R(2+1)D have nothing to pad."""
    for module in network.modules():
        # Only the forward changes: the module keeps its parameters, their names, and who holds it.
        if type(module) is Conv2Plus1D:
            module.__class__ = PaddedConv2Plus1D
        elif type(module) is R2Plus1dStem:
            module.__class__ = PaddedStem


def _factored(
    clips: torch.Tensor, spatial: nn.Conv3d, norm: nn.BatchNorm3d, activation: nn.Module, temporal: nn.Conv3d
) -> torch.Tensor:
    assert spatial.bias is None, "a bias would have to be padded too"
    assert temporal.bias is None
    more = -spatial.out_channels % MULTIPLE
    # F.pad takes the last dimension first: output channels are dimension 0 of a weight, input channels dimension 1.
    weight = F.pad(spatial.weight, (0, 0) * 4 + (0, more))
    between = F.conv3d(clips, weight, None, spatial.stride, spatial.padding)
    between = activation(_normalised(between, norm, more))
    weight = F.pad(temporal.weight, (0, 0) * 3 + (0, more))
    return F.conv3d(between, weight, None, temporal.stride, temporal.padding)


def _normalised(features: torch.Tensor, norm: nn.BatchNorm3d, more: int) -> torch.Tensor:
    """What `norm` does, of features with `more` channels of zeros, which stay zeros: their scale and offset are 0."""
    assert norm.momentum is not None, "torchvision's networks have no cumulative mean"
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = F.pad(norm.running_mean, (0, more)), F.pad(norm.running_var, (0, more), value=1.0)
    updates = norm.training and norm.track_running_stats
    reads = updates or not norm.training
    result = F.batch_norm(
        features,
        mean if reads else None,
        variance if reads else None,
        F.pad(norm.weight, (0, more)),
        F.pad(norm.bias, (0, more)),
        norm.training,
        norm.momentum,
        norm.eps,
    )
    if updates:
        assert norm.num_batches_tracked is not None
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.copy_(mean[: norm.num_features])
            norm.running_var.copy_(variance[: norm.num_features])
    return result
