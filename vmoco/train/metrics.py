"""What a run reports: the metrics of a step, the frames that the generator drops, and the numbers of an interval.

Everything is a sum over clips until it is read, so ranks and steps simply add up.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader
from vmoco.evaluate.score import effective_rank
from vmoco.model.moco import Contrast
from vmoco.model.queue import oldest_key_weight
from vmoco.train import distributed
from vmoco.train.optimizer import learning_rate
from vmoco.train.state import TrainState
from vmoco.train.system_metrics import Utilisation

_SUMS = ("clips", "loss", "positive_similarity", "negative_similarity", "accuracy", "generator_clips", "generator_loss")
_FLAGS = ("non_finite", "stop", "checkpoint")


class Flags(NamedTuple):
    """What the ranks found or were asked for in a step."""

    non_finite: bool
    """Any rank has a loss that is not finite, or the gradients, which are equal on all ranks, are not."""
    non_finite_here: bool
    """A loss of this rank is not finite."""
    stop: bool
    """Any rank was asked to stop."""
    checkpoint: bool
    """Any rank was asked to keep the state."""


class StepMetrics:
    """Sums over the clips of a step, on the device: reading a number waits for the device, adding does not.

    Attributes:
        keys: float32 (G, D), the keys of the step.
        gradient_norm: of the query encoder, after averaging over ranks.
        generator_gradient_norm: of the generator; 0 before it starts.
        decay: t of the step; a scalar on the device if it follows from the step before.
        generator_trained: whether the generator trained in the step.
        clipped: whether `gradient_norm` was above the largest that is allowed: bool scalar; None if all are.
    """

    def __init__(self, sums: torch.Tensor, *, num_sets: int = 0) -> None:
        self._sums = sums
        # Behind all other sums: of each of several data sets its clips, and then its losses.
        self._num_sets = num_sets
        self._non_finite_here = sums.new_zeros(())
        self._flags: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        self.keys = sums.new_zeros(0, 0)
        self.gradient_norm = sums.new_zeros(())
        self.generator_gradient_norm = sums.new_zeros(())
        self.decay: float | torch.Tensor = 1.0
        self.generator_trained = False
        self.clipped: torch.Tensor | None = None

    @classmethod
    def zeros(cls, device: torch.device, *, num_frames: int = 0, num_sets: int = 0) -> StepMetrics:
        """Metrics without clips.

        Args:
            device: of the sums.
            num_frames: T, number of positions that can be dropped.
            num_sets: number of data sets whose losses are told apart.
        """
        return cls(torch.zeros(len(_SUMS) + len(_FLAGS) + num_frames + 2 * num_sets, device=device), num_sets=num_sets)

    def add(self, compared: Contrast) -> None:
        """Adds the clips of a micro-batch."""
        self._sums[0] += len(compared.loss)
        self._sums[1] += compared.loss.detach().sum()
        self._sums[2] += compared.positive_similarity.sum()
        self._sums[3] += compared.negative_similarity.sum()
        self._sums[4] += compared.correct.sum()

    def add_of_sets(self, loss: torch.Tensor, data_sets: torch.Tensor) -> None:
        """Adds the losses (B,) of a micro-batch to those of their data sets; `data_sets` are numbers, int64 (B,)."""
        count = self._num_sets
        of_set = (data_sets[:, None] == torch.arange(count, device=loss.device)).float()
        self._sums[-2 * count :] += torch.cat([of_set.sum(dim=0), loss.detach() @ of_set])

    def add_generator(self, loss: torch.Tensor) -> None:
        """Adds the generator's loss of a micro-batch, (B,)."""
        self._sums[5] += len(loss)
        self._sums[6] += loss.sum()

    def add_dropped(self, mask: torch.Tensor) -> None:
        """Adds the frames that the generator drops from a micro-batch: those where the mask (B, T) is 0."""
        first = len(_SUMS) + len(_FLAGS)
        self._sums[first : first + mask.shape[1]] += (mask == 0).sum(dim=0)

    def add_flags(self, *, stop: bool, checkpoint: bool = False) -> None:
        """Adds whether this rank was asked to stop or to keep its state, and whether its losses are finite."""
        self._non_finite_here = (~torch.isfinite(self._sums[: len(_SUMS)]).all()).float()
        self._sums[len(_SUMS)] = self._non_finite_here
        self._sums[len(_SUMS) + 1] = float(stop)
        self._sums[len(_SUMS) + 2] = float(checkpoint)

    def reduce_(self, query: nn.Module, generator: nn.Module) -> None:
        """Adds up over ranks; then checks the gradients, which are the same on all ranks, for numbers not finite."""
        distributed.sum_(self._sums)
        self.gradient_norm, self.generator_gradient_norm = _gradient_norm(query), _gradient_norm(generator)
        norms = torch.stack([self.gradient_norm, self.generator_gradient_norm])
        self._sums[len(_SUMS)] += (~torch.isfinite(norms).all()).float()

    def send_flags(self) -> None:
        """After `reduce_`: starts the only copy to the host that each step needs. Does not wait for it."""
        first = len(_SUMS)
        flags = torch.stack([self._sums[first], self._non_finite_here, *self._sums[first + 1 : first + len(_FLAGS)]])
        on_host = flags.to("cpu", non_blocking=True)  # page-locked, if it comes from a GPU
        arrived = None
        if flags.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(flags.device))
        self._flags = on_host, arrived

    def flags(self) -> Flags:
        """After `send_flags`: waits until the device has come to the end of the step's gradients, and no further."""
        assert self._flags is not None, "`send_flags` comes first"
        on_host, arrived = self._flags
        if arrived is not None:
            arrived.synchronize()
        return Flags(*(value > 0 for value in on_host.tolist()))

    def mean_generator_loss(self) -> torch.Tensor:
        """L_G over the clips of all ranks, float32 scalar, after `reduce_`; for steps in which G trains."""
        return self._sums[6] / self._sums[5]

    def dropped(self) -> torch.Tensor:
        """Number of clips, over all ranks, that lost each frame to the generator: float32 (T,), after `reduce_`."""
        return self._sums[len(_SUMS) + len(_FLAGS) : len(self._sums) - 2 * self._num_sets]

    def losses_of_sets(self) -> list[float | None]:
        """Mean loss of each data set, after `reduce_`; None if the step had no clip of it."""
        clips, losses = self._sums[len(self._sums) - 2 * self._num_sets :].view(2, -1).tolist()
        return [loss / count if count else None for count, loss in zip(clips, losses, strict=True)]

    def numbers(self) -> dict[str, float]:
        """Means over the clips, by the name under which they are tracked."""
        sums = dict(zip(_SUMS, self._sums.tolist(), strict=False))
        clips = max(sums["clips"], 1)
        means = {name: sums[name] / clips for name in _SUMS[1:5]}
        means |= self.generator_numbers()
        means["decay"] = float(self.decay)
        means["gradient_norm"] = float(self.gradient_norm)
        means["embedding_std"] = embedding_std(self.keys)
        means["effective_rank"] = effective_rank(self.keys.cpu().numpy())
        return means

    def generator_numbers(self) -> dict[str, float]:
        """Loss and gradient norm of the generator, by the name under which they are tracked, if it trained."""
        if self._sums[5] == 0:
            return {}
        return {
            "generator_loss": float(self._sums[6]) / float(self._sums[5]),
            "generator_gradient_norm": float(self.generator_gradient_norm),
        }


def hardness(whole: torch.Tensor, *, by_generator: torch.Tensor, at_random: torch.Tensor) -> float | None:
    """Mean 1 - cosine between clips and the same without the generator's frames, over that without random ones.

    Args:
        whole: float32 (B, D), unit rows: embeddings of the complete clips.
        by_generator: the same of the clips without the frames that the generator chooses.
        at_random: the same without as many random frames.

    Returns:
        Above 1 if the generator is an adversary; None if random drops change nothing.
    """
    # Of unit vectors, 1 - cosine is half the squared distance, which keeps its digits when both are nearly equal.
    chosen, random = ((each - whole).square().sum(dim=1).mean() for each in (by_generator, at_random))
    return float(chosen / random) if random > 0 else None


def _gradient_norm(module: nn.Module) -> torch.Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else next(module.parameters()).new_zeros(())


def embedding_std(embeddings: torch.Tensor) -> float:
    """Spread of unit vectors (B, D): 1 when even over the sphere, 0 when collapsed onto one point."""
    deviation = embeddings.std(dim=0, correction=0).square().sum().sqrt()  # at most 1 for unit rows
    return float(deviation)


class DroppedFrames:
    """Counts which frame positions the generator drops, over the clips of many steps since `begin`.

    Two numbers show whether the generator looks at the clip. The entropy of the positions is 1 if all are dropped
    equally often. The overlap is the share of dropped frames that two clips have in common: num_dropped / T if each
    clip is judged by itself or at random, 1 if all clips lose the same frames.

    Args:
        num_frames: T.
        num_dropped: frames dropped from each clip.
    """

    def __init__(self, num_frames: int, num_dropped: int) -> None:
        self._num_frames = num_frames
        self._num_dropped = num_dropped
        self.begin()

    def begin(self) -> None:
        """Starts counting at zero."""
        self._counts: torch.Tensor | None = None

    def add(self, counts: torch.Tensor) -> None:
        """Adds the clips of a step, float32 (T,): how many lost each frame. Does not wait for the device."""
        # float64: a long interval has more clips than float32 counts exactly.
        self._counts = counts.double() if self._counts is None else self._counts + counts

    def num_clips(self) -> int:
        """Clips from which the generator has dropped frames."""
        return 0 if self._counts is None else round(float(self._counts.sum()) / max(self._num_dropped, 1))

    def shares(self) -> list[float]:
        """Share of clips that lost each position."""
        assert self._counts is not None, "`num_clips` is above 0"
        return (self._counts / self.num_clips()).tolist()

    def numbers(self) -> dict[str, float]:
        """Entropy and overlap, by the name under which they are tracked; empty before the generator starts."""
        clips = self.num_clips()
        if self._counts is None or clips < 2:
            return {}
        counts = self._counts.cpu()
        share = counts / counts.sum()
        entropy = float(-torch.special.xlogy(share, share).sum()) / math.log(self._num_frames)
        # Of all ordered pairs of clips, n_t (n_t - 1) both lost position t. A fixed set to compare with would have to
        # be known beforehand, and the set of an earlier interval misses a collapse that moves.
        overlap = float((counts * (counts - 1)).sum()) / (clips * (clips - 1) * self._num_dropped)
        return {"dropped_entropy": entropy, "dropped_overlap": overlap}

    def document(self, *, step: int) -> str:
        """The histogram as JSON."""
        content = {"step": step, "clips": self.num_clips(), "dropped_share": self.shares(), **self.numbers()}
        return json.dumps(content, indent=1)


NOTE = """`loss` rises at first, because each key that enters the queue makes the task harder. It can be read once
`queue_filled` is 1. Losses cannot be compared between settings of the queue, the drops or the decay; scores can.

- `score/retrieval`: share of held-out clips whose nearest clip of another time is of the same video, seen without
  colour; it chooses the best checkpoint. `score/retrieval_by_colour`: the same by mean colour alone. `score/arrow`:
  share of held-out clips that are nearer to another clip of their video than to that clip played backwards. 0.5 is
  chance: then the encoder sees no motion, or the clips of a video move independently of each other. `score/knn`:
  share of held-out clips whose class their neighbours predict, where the data set has labels. `score/speed`,
  `score/order` (with `--evaluation.motion`): share of clips of which a linear probe tells the playback speed (chance
  0.33) or whether its halves are exchanged (0.5). `checkpoints.json` has the scores of the kept checkpoints with their
  intervals, and the hash of the clips on which they were measured.
- `effective_rank`, `embedding_std`: directions that the embeddings use, and their spread; both fall in a collapse.
- `loss_of_NAME`, `score/retrieval_of_NAME`, `clips_of_NAME`, `epoch_of_NAME`: of each of several data sets: its loss
  in the step, its score, its draws since the start of the run, and how often it was gone through. `loss`,
  `score/retrieval` and `epoch` are of all sets together.
- `accuracy`: share of queries whose own key beats all negatives.
- `oldest_key_similarity`: cosine between the oldest keys of the queue and the keys of the same clips by the key encoder
  of now. If it is low, the queue is too long for the momentum. `oldest_key_weight`: weight of these keys by the decay.
- `dropped_entropy`, `dropped_overlap`: 1 and the dropped share if the generator looks at each clip; 0 and 1 if it
  always drops the same frames.
- `adversary_hardness`: change of the embedding by the frames that the generator drops, over the change by as many
  random frames, on one micro-batch. Below 1 the generator is no adversary.
- `gradient_norm`: of the encoder in the last step, before it is clipped. `clipped_share`: share of steps in which it
  was above `--train.clip-gradient-norm`. If it stays near 1, all steps have one length: raise the limit.
- `data_wait_share`, `checkpoint_stall_share`: share of time in which training waits for data and for checkpoints.
- `slowest_step_seconds`, `median_step_seconds`: own work of a rank in a step, up to where it waits for others, of the
  `slowest_rank` and of the median. `most_data_wait_share` is that of `most_data_wait_rank`. `ranks.json` has all ranks
  with their hosts. If one rank is much slower than the median, look at its machine.
- `mfu`: arithmetic of the encoders over that of a large matrix product on this device.
- `restarts`, `checkpoints_damaged`, `checkpoints_failed`, `evaluations_failed`: counted since the job began, mostly 0.
"""
"""Shown in the tracker above the metrics of a run: what they mean, and what looks wrong but is not."""


class Interval:
    """Sums over the steps since the last report; makes the numbers for the tracker and the progress line."""

    def __init__(
        self, settings: PretrainSettings, state: TrainState, loader: Loader, utilisation: Utilisation | None
    ) -> None:
        """Starts an interval; `utilisation` is None on ranks that do not report."""
        self._settings = settings
        self._state = state
        self._loader = loader
        self._utilisation = utilisation
        self.dropped = DroppedFrames(settings.data.num_frames, settings.num_dropped)
        self._last_stall = 0.0
        self._trained: StepMetrics | None = None
        self._begin()

    def _begin(self) -> None:
        self.dropped.begin()
        self._started, self._step, self._waited = time.perf_counter(), self._state.step, self._loader.seconds_waited
        self._stalled = 0.0
        self._clipped: torch.Tensor | None = None

    def add(self, metrics: StepMetrics) -> None:
        """Adds a step. Does not wait for the device."""
        self.dropped.add(metrics.dropped())
        if metrics.generator_trained:
            self._trained = metrics
        if metrics.clipped is not None:
            clipped = metrics.clipped.float()
            self._clipped = clipped if self._clipped is None else self._clipped + clipped

    def stalled(self, seconds: float) -> None:
        """Adds the time in which training waited for a checkpoint."""
        self._stalled += seconds
        self._last_stall = seconds

    def numbers(self, metrics: StepMetrics) -> dict[str, float]:
        """The numbers of the last step, with rates over the interval since the last call.

        The generator's are those of the last step in which it trained (`--generator.every`).
        """
        settings, moco, step = self._settings, self._settings.moco, self._state.step
        seconds = time.perf_counter() - self._started
        steps = step - self._step
        keys_seen = step * settings.train.global_batch
        numbers = metrics.numbers() | self.dropped.numbers() | memory(self._state.difference.device)
        if self._trained is not None:
            numbers |= self._trained.generator_numbers()
        numbers |= {
            "learning_rate": learning_rate(step - 1, settings.train.learning_rate, settings.train),
            "epoch": keys_seen / self._loader.plan.epoch_length,
            "clips_per_second": steps * settings.train.global_batch / seconds,
            "data_wait_share": (self._loader.seconds_waited - self._waited) / seconds,
            "checkpoint_stall_share": self._stalled / seconds,
            "checkpoint_stall_seconds": self._last_stall,
            "queue_filled": min(1.0, keys_seen / moco.queue_size),
            "oldest_key_weight": oldest_key_weight(
                numbers["decay"],
                queue_size=min(moco.queue_size, keys_seen),
                global_batch=settings.train.global_batch,
                age_unit=moco.age_unit,
            ),
        }
        if not self._loader.mixture.is_one:
            numbers |= self._numbers_of_sets(metrics)
        if self._clipped is not None:
            numbers["clipped_share"] = float(self._clipped) / steps
        if self._utilisation is not None:
            numbers["mfu"] = self._utilisation.share(step - 1, seconds / steps)
        self._seconds_per_step = seconds / steps
        self._begin()
        return numbers

    def _numbers_of_sets(self, metrics: StepMetrics) -> dict[str, float]:
        """What is tracked of each of several data sets."""
        plan, names = self._loader.plan, self._loader.mixture.names
        numbers: dict[str, float] = {}
        drawn, lengths = plan.drawn(self._state.step).tolist(), plan.epoch_lengths
        for name, clips, length in zip(names, drawn, lengths, strict=True):
            numbers |= {f"clips_of_{name}": clips, f"epoch_of_{name}": clips / length}
        losses = zip(names, metrics.losses_of_sets(), strict=True)
        return numbers | {f"loss_of_{name}": loss for name, loss in losses if loss is not None}

    def line(self, numbers: dict[str, float]) -> str:
        """The progress line."""
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
            # Every MoCo project is asked why: the task becomes harder with each key.
            parts.append(f"queue {numbers['queue_filled']:.0%} full, the loss rises until it is")
        return "  ".join(parts)


def memory(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB: now, and on a GPU the most so far."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    numbers = {"memory_gib": pages * resource.getpagesize() / 2**30}
    if device.type == "cuda":
        numbers["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return numbers


def _clock(seconds: int) -> str:
    minutes, hours = seconds // 60, seconds // 3600
    return f"{hours}:{minutes % 60:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
