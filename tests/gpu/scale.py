"""How large the sections are: as a run on a GPU, or so small that a CPU goes through all of them in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.dataset import make_data_set
from vmoco.config import PretrainSettings
from vmoco.data.frames import Encoding
from vmoco.data.manifest import Manifest
from vmoco.presets import PRESETS


@dataclass(frozen=True)
class Scale:
    """Sizes of what is run, and where."""

    device: torch.device
    backbone: str
    num_frames: int
    """Of a training clip."""
    size: int
    """Height and width of a training clip."""
    micro_batch: int
    steps: int
    """Steps whose time is taken, after as many to get warm."""
    arms: tuple[str, ...]
    """Of the ablation."""
    seeds: int
    arm_steps: int

    @property
    def on_gpu(self) -> bool:
        """Whether anything here tells about GPUs."""
        return self.device.type == "cuda"

    def settings(self, **groups: dict[str, Any]) -> PretrainSettings:
        """`recommended` in this size, one micro-batch, with a generator that trains from the first step on."""
        values = PRESETS["recommended"][1].model_dump()
        own: dict[str, dict[str, Any]] = {
            "data": {"num_frames": self.num_frames, "stride": 1, "positives": "same_clip"},
            "augment": {"size": self.size},
            "model": {"backbone": self.backbone},
            "generator": {"start_percent": 0.0},
            "moco": {"queue_size": 65536 if self.on_gpu else 64},
            "train": {
                **{"steps": 10_000, "epochs": None, "warmup_percent": None, "learning_rate": 1e-3},
                **{"global_batch": self.micro_batch, "micro_batch": self.micro_batch},
            },
            "scaling": {"num_workers": 1, "device": "gpu" if self.on_gpu else "cpu"},
        }
        for fields in (own, groups):
            for group, changes in fields.items():
                values[group] |= changes
        return PretrainSettings(**values)

    def data_set(self, folder: Path, *, num_frames: int | None = None, encoding: Encoding = "raw") -> Manifest:
        """Clips of drawn videos, somewhat larger than training clips."""
        side = self.size * 8 // 7
        return make_data_set(
            folder,
            num_videos=64 if self.on_gpu else 8,
            num_frames=num_frames or self.num_frames,
            height=side,
            width=side * 4 // 3,
            encoding=encoding,
        )

    def synchronise(self) -> None:
        """Waits until the device has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


REAL = Scale(torch.device("cuda"), "r2plus1d_18", 16, 112, 32, 12, ("moco", "random", "adversarial"), 3, 300)
TINY = Scale(torch.device("cpu"), "r2plus1d_nano", 8, 32, 4, 2, ("moco", "adversarial"), 1, 3)

Result = dict[str, Any]
Section = Callable[[Scale, Path], Result]
