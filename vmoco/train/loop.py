"""The training loop: one screen. What it needs from outside (checkpoints, tracking, printing) it asks of a `Host`."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from vmoco.config import PretrainSettings
from vmoco.data.contact_sheet import dropped_frames_sheet
from vmoco.data.loader import Loader, RankBatch
from vmoco.data.manifest import Manifest
from vmoco.train import distributed
from vmoco.train.metrics import DroppedFrames, Interval
from vmoco.train.state import TrainState
from vmoco.train.step import NonFiniteError, TrainStep
from vmoco.train.system_metrics import Utilisation, oldest_key_similarity

_CLIPS_SHOWN = 4
_PIECE = 2**18  # values that fit a processor's cache as float64


class Host(Protocol):
    """Whoever runs the loop: Ray Train's worker, or a test. Called on every rank unless said otherwise."""

    def stop_requested(self) -> bool:
        """Whether this rank has been asked to stop after the next step."""

    def checkpoint_requested(self) -> bool:
        """Whether this rank has just been asked to keep the state, because its machine will be taken away."""

    def track(self, numbers: dict[str, float], *, step: int) -> None:
        """Takes the numbers of a step; empty but on rank 0. Must not wait for anything slow."""

    def say(self, line: str) -> None:
        """Shows a line to a person; rank 0 only."""

    def document(self, name: str, content: str | bytes) -> None:
        """Takes a text or a picture for the tracker; rank 0 only. Must not wait for anything slow."""

    def checkpoint(self, state: TrainState) -> None:
        """Keeps the state; returns when it is safe to change it."""

    def finish(self, state: TrainState) -> None:
        """Returns when the last state, given to `checkpoint` before, is kept for good."""


def train(
    settings: PretrainSettings, manifest: Manifest, state: TrainState, *, device: torch.device, host: Host
) -> bool:
    """Trains from the state's step to the last one.

    Returns:
        False where it stopped before the end because it was asked to; the state has been kept then.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        ValueError: the data do not fit the settings, a shard is gone, or the last state could not be kept.
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
    is_first = distributed.rank() == 0
    utilisation = Utilisation(settings, device, state.moco.query.autocast_dtype) if is_first else None
    interval = Interval(settings, state, loader, utilisation)
    dropped = DroppedFrames(settings.data.num_frames, settings.num_dropped)  # since the last checkpoint
    stopping = False
    # In these steps a rank may be minutes later than another: it resumes from a slow store, or it compiles.
    slow_steps = {state.step} | ({settings.generator_start} if settings.train.compile else set())
    for batch in loader:
        slow = batch.step in slow_steps
        distributed.wait_at_most(distributed.SLOW_STEP_SECONDS if slow else distributed.STEP_SECONDS)
        metrics = step(batch, stop_requested=host.stop_requested(), checkpoint_requested=host.checkpoint_requested())
        interval.dropped.add(metrics.dropped())
        dropped.add(metrics.dropped())
        is_last = state.step == settings.last_step
        if state.step % settings.train.log_every == 0 or is_last:
            numbers = {}
            if is_first:
                numbers = interval.numbers(metrics)
                if (similarity := oldest_key_similarity(step, state, loader)) is not None:
                    numbers["oldest_key_similarity"] = similarity
                host.say(interval.line(numbers))
            host.track(numbers, step=state.step)
        # Every rank sees the same sum of requests, so all of them stop, and keep, at the same step.
        stopping = metrics.stop()
        if stopping or is_last or metrics.checkpoint() or state.step % settings.train.checkpoint_every == 0:
            started = time.perf_counter()
            check_state(state)
            host.checkpoint(state)
            interval.stalled(time.perf_counter() - started)
            if is_first and dropped.num_clips():
                show_generator(batch, step, dropped, settings=settings, host=host)
            dropped.begin()
        if stopping:
            break
    host.finish(state)
    return not stopping or state.step == settings.last_step


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
    host.document(
        f"{name}.png", dropped_frames_sheet(frames, chosen, names=names, shares=dropped.shares(), title=title)
    )


def check_state(state: TrainState) -> None:
    """Checks that the state is worth keeping: finite, and the same on all ranks by a fingerprint of every tensor.

    Raises:
        NonFiniteError: it is not finite, on all ranks: the last update was one from a finite gradient to infinity.
        AssertionError: ranks differ; this is a fault of vmoco or of the hardware.
    """
    # How many batches a normalisation has seen is each rank's own, and decides nothing.
    named = {name: tensor for name, tensor in state.tensors().items() if "num_batches_tracked" not in name}
    mine = torch.stack([_fingerprint(tensor).to(state.moco.queue.keys.device) for tensor in named.values()])
    everyone = distributed.gather_rows(mine[None], [1] * distributed.world_size())  # every rank waits for all
    broken = [name for at, name in enumerate(named) if not everyone[:, at].isfinite().all()]
    if broken:
        raise NonFiniteError(
            f"the state after step {state.step} is not finite ({', '.join(broken[:3])}): it is not kept. Lower "
            "train.learning-rate, or set train.precision to fp32"
        )
    differing = [name for at, name in enumerate(named) if len(everyone[:, at].unique()) > 1]
    assert not differing, f"ranks hold different states at step {state.step}: {', '.join(differing[:5])}"


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """One float64 number that changes when a value does, or when two values change places."""
    # In the order of memory, which is the same on all ranks, so that nothing is copied; and piece by piece, because
    # training waits for it: float64 numbers of a whole tensor would go through memory several times.
    order = sorted(range(tensor.ndim), key=lambda dimension: -tensor.stride()[dimension])
    values = tensor.detach().permute(order).flatten()
    weights = torch.arange(min(len(values), _PIECE), device=values.device).double() % 8191 + 1
    sums = [piece.double() @ weights[: len(piece)] for piece in values.split(_PIECE)]
    found = torch.stack(sums)
    return found @ (torch.arange(len(found), device=found.device).double() % 127 + 1)
