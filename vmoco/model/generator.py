"""The generator G: it rates the importance of each frame of a clip, and the most important frames are dropped.

G sees frames scaled down to a few pixels and reads them in order with a ConvLSTM, so it costs a few percent of an
encoder. It is trained by the gradient of the keep mask (`importance_gradient`), not through the pixels. Complete frames
are dropped, so what counts is how the loss changes when the mask of a frame goes from 1 to 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vmoco.config import GeneratorSettings

SCORE_BOUND = 2.0
"""Largest absolute score of a frame if frames are sampled: its importance is at most e^4 = 55 times that of another."""


class Generator(nn.Module):
    """Clip -> importance of its frames.

    Args:
        settings: sizes of the network.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        super().__init__()
        hidden = settings.hidden_channels
        self.frame_size = settings.frame_size
        self.hidden_channels = hidden
        self.relative = settings.relative
        self.bounded = settings.select == "sample"
        self.frame = nn.Sequential(
            nn.Conv2d(3, hidden, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        # The four gates of a ConvLSTM (Shi et al., 2015): input, forget, candidate, output.
        self.gates = nn.Conv2d(2 * hidden, 4 * hidden, 3, padding=1)
        self.score = nn.Linear(hidden, 1, bias=False)  # a constant has no effect on the softmax

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """float (B, 3, T, H, W) -> importance (B, T), each row on the simplex; B is a micro-batch where `relative`."""
        batch, _, num_frames, _, _ = clips.shape
        # float32: the network is tiny, and a nearly uniform softmax needs the digits.
        dtype = self.score.weight.dtype
        frames = F.adaptive_avg_pool3d(clips.to(dtype), (num_frames, self.frame_size, self.frame_size))
        features = self.frame(frames.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, num_frames))
        hidden = torch.zeros_like(features[:, 0])
        cell = torch.zeros_like(hidden)
        scores = []
        for time in range(num_frames):  # recurrence: each frame is judged by what came before it
            gates = self.gates(torch.cat([features[:, time], hidden], dim=1))
            enter, forget, candidate, leave = gates.chunk(4, dim=1)
            cell = torch.sigmoid(forget + 1) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
            hidden = torch.sigmoid(leave) * torch.tanh(cell)
            scores.append(self.score(hidden.mean(dim=(2, 3))))
        together = torch.cat(scores, dim=1)
        if self.relative:
            # The state grows from zero along each clip, and edges matter more to the encoder than the middle. Both
            # order the positions of all clips in the same way, so G would soon drop the same positions everywhere.
            together = together - together.mean(dim=0, keepdim=True)
        if self.bounded:
            # Without a bound the scores would grow until the sample is always the same frames.
            together = SCORE_BOUND * torch.tanh(together / SCORE_BOUND)
        return torch.softmax(together, dim=1)


def sampling_scores(importance: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """log p + Gumbel noise: (B, T), (B, T) in [0, 1) -> float64 (B, T).

    The k frames with the largest scores are a sample without replacement: the next one is drawn in proportion to p
    among those that are left (Gumbel-top-k; Kool, van Hoof and Welling, 2019, section 3).
    """
    # In float64, and away from 0 and 1: float32 rounds a number just below 1 to 1, whose noise is infinite.
    noise = -torch.log(-torch.log(uniform.double().clamp(1e-9, 1 - 1e-9)))
    return importance.detach().double().log() + noise


def keep_mask(importance: torch.Tensor, num_dropped: int) -> torch.Tensor:
    """1 for kept frames, 0 for the `num_dropped` most important, the earlier at a tie: (B, T) -> float (B, T)."""
    order = torch.argsort(importance.detach(), dim=1, descending=True, stable=True)
    return torch.ones_like(importance).scatter(1, order[:, :num_dropped], 0.0)


def frame_fill(clips: torch.Tensor, kind: str) -> torch.Tensor:
    """What replaces dropped frames, (B, 3, T, 1, 1): a frame's own mean colour, or zero, the mean of all data."""
    if kind == "mean":
        return clips.mean(dim=(3, 4), keepdim=True)
    return clips.new_zeros(clips.shape[0], clips.shape[1], clips.shape[2], 1, 1)


def drop_frames(clips: torch.Tensor, mask: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """x~ = m * x + (1 - m) * fill: (B, 3, T, H, W), (B, T), (B, 3, T, 1, 1) -> (B, 3, T, H, W)."""
    keep = mask[:, None, :, None, None].to(clips.dtype)
    return torch.where(keep > 0, clips, fill.to(clips.dtype)).contiguous(memory_format=torch.channels_last_3d)


def importance_gradient(
    pixel_gradient: torch.Tensor, clips: torch.Tensor, fill: torch.Tensor, *, estimator: str = "mask"
) -> torch.Tensor:
    """Gradient of a loss by the importance p, straight through the choice of frames: (B, T).

    x~ = m * x + (1 - m) * fill gives dL/dm_t = sum over c, h, w of dL/dx~ * (x - fill), and dm/dp = -1, because more
    important frames are dropped. `pixel_sum` is the estimator of the released code, the sum of dL/dx~, for comparison.

    Args:
        pixel_gradient: dL/dx~, (B, 3, T, H, W).
        clips: x, (B, 3, T, H, W).
        fill: (B, 3, T, 1, 1).
        estimator: "mask" or "pixel_sum".
    """
    gradient = pixel_gradient
    if estimator == "mask":
        gradient = gradient * (clips - fill)
    return -gradient.sum(dim=(1, 3, 4))
