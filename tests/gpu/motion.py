"""Clips in which only the direction of motion tells the class, and a linear probe of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tests.dataset import drawn_clip, write_data_set
from tests.gpu.scale import Scale
from vmoco.data.manifest import Manifest
from vmoco.model.backbone import Backbone

DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))
SHAPE = (8, 40, 40, 3)


def _moving(rng: np.random.Generator, direction: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Noise that moves by two pixels a frame, uint8 (T, H, W, 3)."""
    frames, height, width, _ = SHAPE
    world = rng.integers(0, 256, (height * 3 // 4, width * 3 // 4, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    start = rng.integers(0, world.shape[0], 2)
    clip = np.empty(SHAPE, np.uint8)
    for number in range(frames):
        rows = (start[0] + 2 * number * direction[0] + np.arange(height)) % world.shape[0]
        columns = (start[1] + 2 * number * direction[1] + np.arange(width)) % world.shape[1]
        clip[number] = world[rows[:, None], columns]
    return clip


def write_motion_clips(folder: Path, scale: Scale) -> tuple[Manifest, torch.Tensor, list[int]]:
    """A data set to pretrain on, and other clips with labels for the probe: uint8 (N, T, H, W, 3)."""
    rng = np.random.default_rng(0)
    count = 256 if scale.on_gpu else 16
    clips = [
        dataclasses.replace(drawn_clip(number, 0, SHAPE), stored=_moving(rng, DIRECTIONS[number % len(DIRECTIONS)]))
        for number in range(count)
    ]
    labels = [number % len(DIRECTIONS) for number in range(2 * count)]
    probe = np.stack([_moving(rng, DIRECTIONS[label]) for label in labels])
    return write_data_set(folder, clips), torch.from_numpy(probe), labels


@torch.no_grad()
def probe_accuracy(backbone: Backbone, clips: torch.Tensor, labels: list[int], device: torch.device) -> float:
    """Accuracy of a ridge regression on features: it learns from one half of the clips, and is tested on the other."""
    backbone.eval()
    pixels = clips[:, :, 4:36, 4:36].permute(0, 4, 1, 2, 3).float() / 255
    pixels = (pixels - pixels.mean((2, 3, 4), keepdim=True)) / pixels.std((2, 3, 4), keepdim=True)
    features = torch.cat([backbone(part.to(device)).double().cpu() for part in pixels.split(64)])
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    features = torch.cat([features, features.new_ones(len(features), 1)], 1)
    answers = torch.tensor(labels)
    known, asked = slice(None, None, 2), slice(1, None, 2)
    if len(set(labels[known])) < len(set(labels)):  # labels alternate: halves by order keep all classes
        known, asked = slice(0, len(labels) // 2), slice(len(labels) // 2, None)
    wanted = torch.nn.functional.one_hot(answers[known]).double()
    gram = features[known].T @ features[known] + torch.eye(features.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, features[known].T @ wanted)
    return float(((features[asked] @ weights).argmax(1) == answers[asked]).double().mean())
