"""Switches of `--train` that make steps faster on GPUs: none changes more than rounding, and `--train.deterministic`
switches all of them off. (`--train.pad-channels` is in `vmoco/model/padding.py`.)
"""

from __future__ import annotations

import contextlib

import torch

from vmoco.config import TrainSettings
from vmoco.model.moco import VideoMoco


def choose_kernels(settings: TrainSettings, device: torch.device) -> None:
    """Sets for this process how cuDNN chooses its algorithms."""
    if device.type == "cuda" and settings.speeds_up_by("cudnn_benchmark"):
        torch.backends.cudnn.benchmark = True


def compile_networks(moco: VideoMoco, settings: TrainSettings) -> None:
    """Has the networks that `settings` name compiled at their next forward."""
    if not settings.speeds_up_by("compile"):
        return
    generator = [moco.generator] if settings.speeds_up_by("compile_generator") else []
    if settings.speeds_up_by("compile_generator_steps"):
        from torch._functorch import config

        # Two backwards follow the forward of q. By default the first one would use the memory that it read for results.
        config.donated_buffer = False
    # In place, so that names in the state stay; inside DDP, which compiles nothing itself.
    for network in (moco.query, moco.key, *generator):
        network.compile(dynamic=False)


def uncompiled(settings: TrainSettings) -> contextlib.AbstractContextManager[object]:
    """Inside, nothing compiled runs, and nothing is compiled."""
    # Without the option torch's compiler is not even imported, which takes seconds.
    compiles = settings.speeds_up_by("compile")
    return torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()


def compared_alike(settings: TrainSettings) -> contextlib.AbstractContextManager[object]:
    """Inside, q and q_real are computed, which G compares: both compiled or both not.

    Else |q - q_real| would also contain the difference between two sets of kernels. Not, because a compiled backward
    cannot leave out the weights: the gradient of the pixels costs 2 forwards instead of 1.
    """
    both = settings.speeds_up_by("compile_generator_steps")
    return contextlib.nullcontext() if both else uncompiled(settings)
