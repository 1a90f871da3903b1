"""What makes steps faster on GPUs, and where it must stay out: `torch.compile`."""

from __future__ import annotations

import contextlib

import torch

from vmoco.config import TrainSettings
from vmoco.model.moco import VideoMoco


def compile_networks(moco: VideoMoco, settings: TrainSettings) -> None:
    """Has the encoders compiled at their next forward, if `--train.compile` asks for it."""
    if settings.compile:
        # In place, so that names in the state stay; inside DDP, which compiles nothing itself.
        for encoder in (moco.query, moco.key):
            encoder.compile(dynamic=False)


def uncompiled(settings: TrainSettings) -> contextlib.AbstractContextManager[object]:
    """Inside, networks run without what `compile_networks` made, and nothing is compiled."""
    # Without the option torch's compiler is not even imported, which takes seconds.
    return torch.compiler.set_stance("force_eager") if settings.compile else contextlib.nullcontext()
