"""What one interval of steps says: the numbers for the tracker and the line for a person, and what they mean."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader
from vmoco.model.decay import oldest_key_weight
from vmoco.train.dropped import DroppedFrames
from vmoco.train.metrics import StepMetrics
from vmoco.train.schedule import learning_rate
from vmoco.train.state import TrainState
from vmoco.train.utilisation import Utilisation

NOTE = """`loss` rises at first: each key that enters the queue makes the task harder. It means something once
`queue_filled` is 1. Losses cannot be compared between settings of the queue, the drops or the decay; scores can.

- `score/retrieval`: share of held-out clips whose nearest clip of another time is of the same video, seen without
  colour; it chooses the best checkpoint. `score/retrieval_by_colour`: what mean colour alone reaches. `score/knn`:
  share of held-out clips that their neighbours class right, where the data set has labels. `checkpoints.json` has the
  scores of the kept checkpoints with their intervals, and the hash of the clips on which they were measured.
- `effective_rank`, `embedding_std`: directions that the embeddings use, and their spread; both fall in a collapse.
- `accuracy`: share of queries whose own key beats all negatives.
- `oldest_key_similarity`: cosine between the oldest keys of the queue and what the key encoder makes of their clips
  now. Where it is low the queue is too long for the momentum. `oldest_key_weight`: what the decay leaves of them.
- `dropped_entropy`, `dropped_overlap`: 1 and the dropped share where the generator looks at each clip; 0 and 1 where it
  always drops the same frames.
- `data_wait_share`, `checkpoint_stall_share`: time in which training stood still for data and for checkpoints.
- `mfu`: arithmetic of the encoders over what a large matrix product reaches on this device.
- `restarts`, `checkpoints_damaged`, `checkpoints_failed`, `evaluations_failed`: counted since the job began, mostly 0.
"""
"""Shown in the tracker above a run's metrics: what they mean, and what looks wrong and is not."""


class Interval:
    """Sums over the steps since the last report."""

    def __init__(
        self, settings: PretrainSettings, state: TrainState, loader: Loader, utilisation: Utilisation | None
    ) -> None:
        """Begins; `utilisation` is left out where nobody reports."""
        self._settings = settings
        self._state = state
        self._loader = loader
        self._utilisation = utilisation
        self.dropped = DroppedFrames(settings.data.num_frames, settings.num_dropped)
        self._last_stall = 0.0
        self._begin()

    def _begin(self) -> None:
        self.dropped.begin()
        self._started, self._step, self._waited = time.perf_counter(), self._state.step, self._loader.seconds_waited
        self._stalled = 0.0

    def stalled(self, seconds: float) -> None:
        """Adds the time in which a checkpoint held training up."""
        self._stalled += seconds
        self._last_stall = seconds

    def numbers(self, metrics: StepMetrics) -> dict[str, float]:
        """The numbers of the last step, with rates over the interval since the last call."""
        settings, moco, step = self._settings, self._settings.moco, self._state.step
        seconds = time.perf_counter() - self._started
        steps = step - self._step
        keys_seen = step * settings.train.global_batch
        numbers = metrics.numbers() | self.dropped.numbers() | memory(self._state.difference.device)
        numbers |= {
            "learning_rate": learning_rate(step - 1, settings.train.learning_rate, settings.train),
            "epoch": keys_seen / self._loader.plan.epoch_length,
            "clips_per_second": steps * settings.train.global_batch / seconds,
            "data_wait_share": (self._loader.seconds_waited - self._waited) / seconds,
            "checkpoint_stall_share": self._stalled / seconds,
            "checkpoint_stall_seconds": self._last_stall,
            "queue_filled": min(1.0, keys_seen / moco.queue_size),
            "oldest_key_weight": oldest_key_weight(
                metrics.decay,
                queue_size=min(moco.queue_size, keys_seen),
                global_batch=settings.train.global_batch,
                age_unit=moco.age_unit,
            ),
        }
        if self._utilisation is not None:
            numbers["mfu"] = self._utilisation.share(step - 1, seconds / steps)
        self._seconds_per_step = seconds / steps
        self._begin()
        return numbers

    def line(self, numbers: dict[str, float]) -> str:
        """One line for a person."""
        steps = self._settings.last_step
        seconds_left = round((steps - self._state.step) * self._seconds_per_step)
        parts = [f"step {self._state.step}/{steps}", f"loss {numbers['loss']:.3f}"]
        if "generator_loss" in numbers:
            parts.append(f"generator {numbers['generator_loss']:.2f}")
        parts += [
            f"accuracy {numbers['accuracy']:.0%}",
            f"{numbers['clips_per_second']:.1f} clips/s",
            f"data wait {numbers['data_wait_share']:.0%}",
            f"{_clock(seconds_left)} left",
        ]
        if numbers["queue_filled"] < 1:
            # Asked in every MoCo project: the loss rises at first, because the task grows with each key.
            parts.append(f"queue {numbers['queue_filled']:.0%} full, the loss rises until it is")
        return "  ".join(parts)


def memory(device: torch.device) -> dict[str, float]:
    """Memory of this process, in GiB: what it holds now, and on a GPU the most that it has held."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    numbers = {"memory_gib": pages * resource.getpagesize() / 2**30}
    if device.type == "cuda":
        numbers["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return numbers


def _clock(seconds: int) -> str:
    minutes, hours = seconds // 60, seconds // 3600
    return f"{hours}:{minutes % 60:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
