"""The training loop: one screen. What it needs from outside (checkpoints, tracking, printing) it asks of a `Host`."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader, RankBatch
from vmoco.data.manifest import Manifest
from vmoco.model.decay import oldest_key_weight
from vmoco.train import distributed
from vmoco.train.dropped import DroppedFrames
from vmoco.train.metrics import StepMetrics
from vmoco.train.schedule import learning_rate
from vmoco.train.sheet import contact_sheet
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep

_CLIPS_SHOWN = 4


class Host(Protocol):
    """Whoever runs the loop: Ray Train's worker, or a test. Called on every rank unless said otherwise."""

    def stop_requested(self) -> bool:
        """Whether this rank has been asked to stop after the next step."""

    def track(self, numbers: dict[str, float], *, step: int) -> None:
        """Takes the numbers of a step; rank 0 only. Must not wait for anything slow."""

    def say(self, line: str) -> None:
        """Shows a line to a person; rank 0 only."""

    def document(self, name: str, content: str | bytes) -> None:
        """Takes a text or a picture for the tracker; rank 0 only. Must not wait for anything slow."""

    def checkpoint(self, state: TrainState) -> None:
        """Keeps the state; returns when it is safe to change it."""


def train(
    settings: PretrainSettings, manifest: Manifest, state: TrainState, *, device: torch.device, host: Host
) -> bool:
    """Trains from the state's step to the last one.

    Returns:
        False where it stopped before the end because it was asked to; the state has been kept then.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        ValueError: the data do not fit the settings, or a shard is gone.
    """
    loader = Loader(
        manifest,
        settings,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        start_step=state.step,
        pin_memory=device.type == "cuda",
    )
    step = TrainStep(settings, state, device)
    report = Report(settings, state, loader)
    dropped = DroppedFrames(settings.data.num_frames, settings.num_dropped)  # since the last checkpoint
    for batch in loader:
        metrics = step(batch, stop_requested=host.stop_requested())
        report.dropped.add(metrics.dropped())
        dropped.add(metrics.dropped())
        is_last = state.step == settings.train.steps
        if distributed.rank() == 0 and (state.step % settings.train.log_every == 0 or is_last):
            numbers = report.numbers(metrics)
            host.track(numbers, step=state.step)
            host.say(report.line(numbers))
        # Every rank sees the same sum of requests, so all of them stop at the same step.
        stopping = metrics.stop()
        if stopping or state.step % settings.train.checkpoint_every == 0 or is_last:
            check_ranks_agree(state)
            if distributed.rank() == 0 and dropped.num_clips():
                show_generator(batch, step, dropped, settings=settings, host=host)
            dropped.begin()
            host.checkpoint(state)
        if stopping:
            break
    return state.step == settings.train.steps


def show_generator(
    batch: RankBatch,
    step: TrainStep,
    dropped: DroppedFrames,
    *,
    settings: PretrainSettings,
    host: Host,
) -> None:
    """Hands over what the generator does at a checkpoint: the positions that it drops, and a sheet of a few clips.

    A file for each checkpoint, so a run that starts again from one writes over nothing that still holds.
    """
    number = batch.step + 1
    name = f"generator/step-{number:08d}"
    host.document(f"{name}.json", dropped.document(step=number))
    frames, chosen = step.dropped_frames(batch, num_clips=_CLIPS_SHOWN)
    title = f"step {number}: the generator drops {settings.num_dropped} of {settings.data.num_frames} frames (red)"
    names = [clip_id[:12] for clip_id in batch.clip_ids]
    host.document(f"{name}.png", contact_sheet(frames, chosen, names=names, shares=dropped.shares(), title=title))


class Report:
    """What one interval of steps says: means, speed, and the time left."""

    def __init__(self, settings: PretrainSettings, state: TrainState, loader: Loader) -> None:
        self._settings = settings
        self._state = state
        self._loader = loader
        self.dropped = DroppedFrames(settings.data.num_frames, settings.num_dropped)
        self._begin()

    def _begin(self) -> None:
        self.dropped.begin()
        self._started, self._step, self._waited = time.perf_counter(), self._state.step, self._loader.seconds_waited

    def numbers(self, metrics: StepMetrics) -> dict[str, float]:
        """The numbers of the last step, with rates over the interval since the last call."""
        settings, moco = self._settings, self._settings.moco
        seconds = time.perf_counter() - self._started
        steps = self._state.step - self._step
        numbers = metrics.numbers() | self.dropped.numbers()
        numbers |= {
            "learning_rate": learning_rate(self._state.step - 1, settings.train.learning_rate, settings.train),
            "epoch": self._state.step * settings.train.global_batch / self._loader.plan.epoch_length,
            "clips_per_second": steps * settings.train.global_batch / seconds,
            "data_wait_share": (self._loader.seconds_waited - self._waited) / seconds,
            "queue_filled": min(1.0, self._state.step * settings.train.global_batch / moco.queue_size),
            "oldest_key_weight": oldest_key_weight(
                metrics.decay,
                queue_size=min(moco.queue_size, self._state.step * settings.train.global_batch),
                global_batch=settings.train.global_batch,
                age_unit=moco.age_unit,
            ),
        }
        self._seconds_per_step = seconds / steps
        self._begin()
        return numbers

    def line(self, numbers: dict[str, float]) -> str:
        """One line for a person."""
        steps = self._settings.train.steps
        seconds_left = round((steps - self._state.step) * self._seconds_per_step)
        parts = [f"step {self._state.step}/{steps}", f"loss {numbers['loss']:.3f}"]
        if "generator_loss" in numbers:
            parts.append(f"generator {numbers['generator_loss']:.2f}")
        parts += [
            f"accuracy {numbers['accuracy']:.0%}",
            f"{numbers['clips_per_second']:.1f} clips/s",
            f"data wait {numbers['data_wait_share']:.0%}",
            f"{seconds_left // 60}:{seconds_left % 60:02d} left",
        ]
        if numbers["queue_filled"] < 1:
            # Asked in every MoCo project: the loss rises at first, because the task grows with each key.
            parts.append(f"queue {numbers['queue_filled']:.0%} full, the loss rises until it is")
        return "  ".join(parts)


def check_ranks_agree(state: TrainState) -> None:
    """Compares a fingerprint of the whole state over the ranks: replicas that drift apart are worthless.

    Raises:
        AssertionError: they differ; this is a fault of vmoco or of the hardware.
    """
    # How many batches a normalisation has seen is each rank's own, and decides nothing.
    named = {name: tensor for name, tensor in state.tensors().items() if "num_batches_tracked" not in name}
    mine = torch.stack([_fingerprint(tensor).to(state.moco.queue.keys.device) for tensor in named.values()])
    everyone = distributed.gather_rows(mine[None], [1] * distributed.world_size())  # every rank waits for all
    differing = [name for at, name in enumerate(named) if len(everyone[:, at].unique()) > 1]
    assert not differing, f"ranks hold different states at step {state.step}: {', '.join(differing[:5])}"


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """One float64 number that changes when a value does, or when two values change places."""
    values = tensor.detach().flatten().double()
    return values @ (torch.arange(len(values), device=values.device) % 8191 + 1).double()
