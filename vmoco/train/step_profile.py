"""A profile of a few steps: a Chrome trace of what the CPU and the GPU do, which Perfetto and Chrome show.

It only listens, so it changes no number. Each of the first ranks writes a trace of its own, because a slow rank shows
only beside another one.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from vmoco.config import TrainSettings
from vmoco.train import distributed

FOLDER = "profile"
_RANKS = 8  # more traces than these nobody opens


class StepProfile:
    """Profiles the steps that `--train.profile-steps` names; a context manager around the training loop.

    Args:
        settings: of the run.
        device: of this rank.
        keep: takes a trace: its name below the run's folder, and its gzipped JSON.
    """

    def __init__(self, settings: TrainSettings, device: torch.device, keep: Callable[[str, bytes], None]) -> None:
        steps = settings.profiled_steps
        self._steps = steps if distributed.rank() < _RANKS else range(0)
        self._keep = keep
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._running: torch.profiler.profile | None = None
        self._first = self._last = 0
        self.slow_steps = {steps.stop} if steps else set[int]()
        """The step in which other ranks wait for those that write their traces."""

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            if error is None:
                self._finish(self._last)
            else:
                self._running.stop()

    def before(self, step: int) -> None:
        """Called before each step, counted from 0."""
        if step in self._steps and self._running is None:
            self._first = step
            self._running = torch.profiler.profile(activities=self._activities)
            self._running.start()

    def after(self, step: int) -> None:
        """Called after each step."""
        self._last = step
        if self._running is not None and step + 1 >= self._steps.stop:
            self._finish(step)

    def _finish(self, step: int) -> None:
        assert self._running is not None, "started by `before`"
        running, self._running = self._running, None
        running.stop()
        with tempfile.TemporaryDirectory() as place:
            path = Path(place, "trace.json")
            running.export_chrome_trace(str(path))
            content = gzip.compress(path.read_bytes(), compresslevel=3)
        rank = distributed.rank()
        self._keep(f"{FOLDER}/steps-{self._first:08d}-{step + 1:08d}-rank-{rank}.json.gz", content)
