"""What a step reports. All of it is a sum over clips until it is read, so that ranks and steps simply add up.

Which frame positions the generator drops, counted over the clips of many steps.

Two numbers say whether it still looks at the clip. The entropy of the positions is 1 where all are dropped as
often. The overlap is the share of dropped frames that two clips have in common: num_dropped / T where each clip is
judged by itself or at random, 1 where all clips lose the same frames. It compares clips with each other, because a
fixed set would have to be known beforehand, and the set of an earlier interval misses a collapse that moves.


What one interval of steps says: the numbers for the tracker and the line for a person, and what they mean.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

import torch
from torch import nn

from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader
from vmoco.model.loss import Contrast
from vmoco.model.queue import oldest_key_weight
from vmoco.train import distributed
from vmoco.train.optimizer import learning_rate
from vmoco.train.state import TrainState
from vmoco.train.system_metrics import Utilisation

_SUMS = ("clips", "loss", "positive_similarity", "negative_similarity", "accuracy", "generator_clips", "generator_loss")
_FLAGS = ("non_finite", "stop", "checkpoint")


class StepMetrics:
    """Sums over the clips of a step, on the device: reading a number waits for it, adding does not.

    Attributes:
        keys: float32 (G, D), the keys of the step.
        gradient_norm: of the query encoder, after averaging over ranks.
        generator_gradient_norm: of the generator; 0 before it starts.
        decay: t of the step.
    """

    def __init__(self, sums: torch.Tensor) -> None:
        self._sums = sums
        self.keys = sums.new_zeros(0, 0)
        self.gradient_norm = sums.new_zeros(())
        self.generator_gradient_norm = sums.new_zeros(())
        self.decay = 1.0

    @classmethod
    def zeros(cls, device: torch.device, *, num_frames: int = 0) -> StepMetrics:
        """Before the first clip; `num_frames` (T) is how many positions can be dropped."""
        return cls(torch.zeros(len(_SUMS) + len(_FLAGS) + num_frames, device=device))

    def add(self, compared: Contrast) -> None:
        """Adds the clips of a micro-batch."""
        self._sums[0] += len(compared.loss)
        self._sums[1] += compared.loss.detach().sum()
        self._sums[2] += compared.positive_similarity.sum()
        self._sums[3] += compared.negative_similarity.sum()
        self._sums[4] += compared.correct.sum()

    def add_generator(self, loss: torch.Tensor) -> None:
        """Adds the generator's loss of a micro-batch, (B,)."""
        self._sums[5] += len(loss)
        self._sums[6] += loss.sum()

    def add_dropped(self, mask: torch.Tensor) -> None:
        """Adds the frames that the generator drops from a micro-batch: those where the mask (B, T) is 0."""
        self._sums[len(_SUMS) + len(_FLAGS) :] += (mask == 0).sum(dim=0)

    def add_flags(self, *, stop: bool, checkpoint: bool = False) -> None:
        """Notes whether this rank was asked to stop or to keep its state, and whether its losses are finite."""
        self._sums[len(_SUMS)] = (~torch.isfinite(self._sums[: len(_SUMS)]).all()).float()
        self._sums[len(_SUMS) + 1] = float(stop)
        self._sums[len(_SUMS) + 2] = float(checkpoint)

    def reduce_(self, query: nn.Module, generator: nn.Module) -> None:
        """Adds up over ranks; then a gradient that is not finite counts as well (it is the same on all ranks)."""
        distributed.sum_(self._sums)
        self.gradient_norm, self.generator_gradient_norm = _gradient_norm(query), _gradient_norm(generator)
        norms = torch.stack([self.gradient_norm, self.generator_gradient_norm])
        self._sums[len(_SUMS)] += (~torch.isfinite(norms).all()).float()

    def non_finite(self) -> bool:
        """Whether a loss or gradient was not finite, here before `reduce_` and anywhere after it."""
        return bool(self._sums[len(_SUMS)] > 0)

    def mean_generator_loss(self) -> torch.Tensor:
        """L_G over the clips of all ranks, float32 scalar, after `reduce_`; for steps in which G trains."""
        return self._sums[6] / self._sums[5]

    def dropped(self) -> torch.Tensor:
        """How many clips of all ranks lost each frame to the generator, float32 (T,), after `reduce_`."""
        return self._sums[len(_SUMS) + len(_FLAGS) :]

    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return bool(self._sums[len(_SUMS) + 1] > 0)

    def checkpoint(self) -> bool:
        """Whether any rank was asked to keep the state."""
        return bool(self._sums[len(_SUMS) + 2] > 0)

    def numbers(self) -> dict[str, float]:
        """Means over the clips, by the name that they are tracked under."""
        sums = dict(zip(_SUMS, self._sums.tolist(), strict=False))
        clips = max(sums["clips"], 1)
        means = {name: sums[name] / clips for name in _SUMS[1:5]}
        if sums["generator_clips"]:
            means["generator_loss"] = sums["generator_loss"] / sums["generator_clips"]
            means["generator_gradient_norm"] = float(self.generator_gradient_norm)
        means["decay"] = self.decay
        means["gradient_norm"] = float(self.gradient_norm)
        means["embedding_std"] = embedding_std(self.keys)
        means["effective_rank"] = effective_rank(self.keys)
        return means


def _gradient_norm(module: nn.Module) -> torch.Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else next(module.parameters()).new_zeros(())


def embedding_std(embeddings: torch.Tensor) -> float:
    """Spread of unit vectors (B, D): 1 when even over the sphere, 0 when collapsed onto one point."""
    deviation = embeddings.std(dim=0, correction=0).square().sum().sqrt()  # at most 1 for unit rows
    return float(deviation)


def effective_rank(embeddings: torch.Tensor) -> float:
    """Directions that embeddings (B, D) use: e to the entropy of their singular values (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(embeddings.float() - embeddings.float().mean(dim=0))
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(shares * (shares + 1e-12).log()).sum()))


class DroppedFrames:
    """Counts since `begin`.

    Args:
        num_frames: T.
        num_dropped: frames dropped from each clip.
    """

    def __init__(self, num_frames: int, num_dropped: int) -> None:
        self._num_frames = num_frames
        self._num_dropped = num_dropped
        self.begin()

    def begin(self) -> None:
        """Starts to count anew."""
        self._counts: torch.Tensor | None = None

    def add(self, counts: torch.Tensor) -> None:
        """Adds the clips of a step, float32 (T,): how many lost each frame. Does not wait for the device."""
        # float64: the clips of a long interval are more than float32 counts exactly
        self._counts = counts.double() if self._counts is None else self._counts + counts

    def num_clips(self) -> int:
        """Clips from which the generator has dropped frames."""
        return 0 if self._counts is None else round(float(self._counts.sum()) / max(self._num_dropped, 1))

    def shares(self) -> list[float]:
        """Of each position, the share of clips that lost it."""
        assert self._counts is not None, "counted before"
        return (self._counts / self.num_clips()).tolist()

    def numbers(self) -> dict[str, float]:
        """Entropy and overlap, by the name that they are tracked under; empty before the generator starts."""
        clips = self.num_clips()
        if self._counts is None or clips < 2:
            return {}
        counts = self._counts.cpu()
        share = counts / counts.sum()
        entropy = float(-torch.special.xlogy(share, share).sum()) / math.log(self._num_frames)
        # of all ordered pairs of clips, those that both lost position t: n_t (n_t - 1)
        overlap = float((counts * (counts - 1)).sum()) / (clips * (clips - 1) * self._num_dropped)
        return {"dropped_entropy": entropy, "dropped_overlap": overlap}

    def document(self, *, step: int) -> str:
        """The histogram as JSON."""
        content = {"step": step, "clips": self.num_clips(), "dropped_share": self.shares(), **self.numbers()}
        return json.dumps(content, indent=1)


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
