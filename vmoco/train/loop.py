"""The training loop, on one screen. What it needs from outside it asks of a `Host`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

from vmoco.config import PretrainSettings
from vmoco.data.checked_clips import CheckedClips
from vmoco.data.contact_sheet import dropped_frames_sheet
from vmoco.data.loader import Loader, RankBatch
from vmoco.data.manifest import Manifest
from vmoco.data.mixture import Mixture
from vmoco.spool import Document
from vmoco.train import distributed
from vmoco.train.metrics import DroppedFrames, Interval
from vmoco.train.rank_times import RankTimes
from vmoco.train.state import TrainState
from vmoco.train.step import NonFiniteError, TrainStep
from vmoco.train.step_profile import StepProfile
from vmoco.train.system_metrics import Utilisation, oldest_key_similarity

_CLIPS_SHOWN = 4
_PIECE = {"cpu": 2**18, "cuda": 2**24}  # values; as int64 they fit the cache of a CPU


class Requests(NamedTuple):
    """What a rank has been asked for since the last step."""

    stop: bool = False
    """Stop after the next step."""
    checkpoint: bool = False
    """Keep the state, because a machine will be taken away."""


class Host(Protocol):
    """Runs the loop: a worker of Ray Train, or a test. Every rank calls every method, unless it says otherwise."""

    def requests(self) -> Requests:
        """What this rank has been asked for; called once before each step."""

    def show(self, line: str) -> None:
        """Prints a progress line; called on rank 0 only."""

    def track(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Takes the numbers of a step; they are empty on other ranks than 0. Must not wait for anything slow."""

    def checkpoint(self, state: TrainState, documents: Mapping[str, Document]) -> None:
        """Keeps the state, and returns when the state may change again.

        Args:
            state: finite, and equal on all ranks.
            documents: texts and pictures for the tracker, by name; empty on other ranks than 0.
        """

    def keep_file(self, name: str, content: bytes) -> None:
        """Keeps a file in the run's folder, and with the tracker if it is small; any rank may call it alone."""

    def expect_step(self, within_seconds: float) -> None:
        """A step begins, and the ranks give up if it takes longer than this."""


def train(
    settings: PretrainSettings,
    data: Manifest | Mixture,
    state: TrainState,
    *,
    device: torch.device,
    host: Host,
    checked: CheckedClips | None = None,
) -> bool:
    """Trains from the state's step to the last one.

    Args:
        settings: of the run.
        data: its data set, or several.
        state: from which it goes on; changed in place.
        device: of this rank.
        host: what the run needs of the world around it.
        checked: clips that ranks of this node have hashed.

    Returns:
        False if it stopped before the end because it was asked to. In both cases the host has the last state.

    Raises:
        NonFiniteError: a loss, a gradient or the state is not finite.
        ValueError: the data do not fit the settings, or a shard is missing.
    """
    loader = Loader(
        data,
        settings,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        start_step=state.step,
        pin_memory=device.type == "cuda",
        checked=checked,
    )
    step = TrainStep(settings, state, device)
    is_first = distributed.rank() == 0
    utilisation = Utilisation(settings, device, state.moco.query.autocast_dtype) if is_first else None
    interval = Interval(settings, state, loader, utilisation)
    ranks = RankTimes(state.step)
    dropped = DroppedFrames(settings.data.num_frames, settings.num_dropped)  # since the last checkpoint
    stopping = False
    # In these steps a rank may be minutes later than another: it resumes from a slow store, or it compiles.
    slow_steps = {state.step} | (
        compiling_steps(settings, state.step) if settings.train.speeds_up_by("compile") else set()
    )
    with StepProfile(settings.train, device, host.keep_file) as profile:
        slow_steps |= profile.slow_steps
        for batch in loader:
            limit = distributed.SLOW_STEP_SECONDS if batch.step in slow_steps else distributed.STEP_SECONDS
            distributed.wait_at_most(limit)
            host.expect_step(limit)
            requests = host.requests()
            profile.before(batch.step)
            metrics = step(batch, stop_requested=requests.stop, checkpoint_requested=requests.checkpoint)
            interval.add(metrics)
            dropped.add(metrics.dropped())
            is_last = state.step == settings.last_step
            logs = state.step % settings.train.log_every == 0 or is_last
            keeps = state.step % settings.train.checkpoint_every == 0 or is_last
            # Every rank sees the same sum of requests, so all of them stop and keep at the same step.
            stopping, asked_to_keep = step.requested(now=logs or keeps)
            profile.after(batch.step)
            if logs:
                own, waited = step.own_time.take(), loader.seconds_waited
                compared = ranks.compare(own_seconds=own, waited_seconds=waited, step=state.step)
                numbers = {}
                if is_first:
                    numbers = interval.numbers(metrics) | compared
                    if (similarity := oldest_key_similarity(step, state, loader)) is not None:
                        numbers["oldest_key_similarity"] = similarity
                    if (hardness := step.adversary_hardness(batch)) is not None:
                        numbers["adversary_hardness"] = hardness
                    host.show("  ".join([interval.line(numbers), *ranks.remarks()]))
                host.track(numbers, step=state.step)
            if keeps or stopping or asked_to_keep:
                shown = is_first and dropped.num_clips() > 0
                documents = generator_documents(batch, step, dropped, settings=settings) if shown else {}
                if is_first and ranks.num_ranks > 1:
                    documents["ranks.json"] = ranks.document(step=state.step)
                started = time.perf_counter()
                check_state(state)
                host.checkpoint(state, documents)
                interval.stalled(time.perf_counter() - started)
                dropped.begin()
            if stopping:
                break
    return not stopping or state.step == settings.last_step


def compiling_steps(settings: PretrainSettings, first: int) -> set[int]:
    """Steps from `first` on in which an encoder meets inputs of a new kind: the generator trains, or no longer does."""
    start = max(first, settings.generator_start)
    trains = start + (settings.generator_start - start) % settings.generator.every
    return {settings.generator_start, trains, trains + 1}


def generator_documents(
    batch: RankBatch, step: TrainStep, dropped: DroppedFrames, *, settings: PretrainSettings
) -> dict[str, Document]:
    """What the generator does at a checkpoint: the positions that it drops (JSON), and a contact sheet of a few clips.

    Each checkpoint has files of its own, so a run that resumes from one overwrites nothing that is still true.
    """
    number = batch.step + 1
    name = f"generator/step-{number:08d}"
    frames, chosen = step.dropped_frames(batch, num_clips=_CLIPS_SHOWN)
    title = f"step {number}: the generator drops {settings.num_dropped} of {settings.data.num_frames} frames (red)"
    names = [clip_id[:12] for clip_id in batch.clip_ids]
    sheet = dropped_frames_sheet(frames, chosen, names=names, shares=dropped.shares(), title=title)
    return {f"{name}.json": dropped.document(step=number), f"{name}.png": sheet}


def check_state(state: TrainState) -> None:
    """Checks that the state is worth keeping: finite, and the same bits on all ranks.

    Raises:
        NonFiniteError: it is not finite, on all ranks: the last update went from a finite gradient to infinity.
        AssertionError: ranks differ; this is a fault of vmoco or of the hardware.
    """
    # Each rank has its own count of the batches that a normalisation has seen, and it decides nothing.
    named = {name: tensor for name, tensor in state.tensors().items() if "num_batches_tracked" not in name}
    device = state.moco.queue.keys.device
    mine = torch.stack([torch.stack(fingerprint(tensor)).to(device) for tensor in named.values()])  # int64 (N, 2)
    # Every rank waits for all. One transfer, because each read of a number waits for the device.
    everyone = distributed.gather_rows(mine[None], [1] * distributed.world_size()).cpu()
    broken = [name for name, finite in zip(named, everyone[:, :, 1].all(dim=0).tolist(), strict=True) if not finite]
    if broken:
        raise NonFiniteError(
            f"the state after step {state.step} is not finite ({', '.join(broken[:3])}): it is not kept. Lower "
            "--train.learning-rate, or set --train.precision fp32",
            step=state.step - 1,
        )
    equal = (everyone[:, :, 0] == everyone[:1, :, 0]).all(dim=0).tolist()
    differing = [name for name, same in zip(named, equal, strict=True) if not same]
    assert not differing, f"ranks hold different states at step {state.step}: {', '.join(differing[:5])}"


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A checksum of the bits, and 1 if all values are finite (else 0): two int64 scalars on the tensor's device.

    The checksum is the sum of bits[i] * (2 i + 1), modulo 2**64. It changes when a value changes, or when two values
    change places. Integers add up to the same sum in any order, so CPUs and GPUs of different types agree.
    """
    # In the order of memory, which is the same on all ranks, so that nothing is copied; and piece by piece, because
    # training waits for it, and int64 copies of a whole tensor would pass through memory several times.
    order = sorted(range(tensor.ndim), key=lambda dimension: -tensor.stride()[dimension])
    values = tensor.detach().permute(order).flatten()
    size = _PIECE.get(values.device.type, _PIECE["cpu"])
    weights = torch.arange(1, 2 * min(len(values), size) + 1, 2, device=values.device)
    checksum, finite = weights.new_zeros(()), weights.new_ones(())
    for piece in values.split(size):
        bits = piece.view(_BITS[piece.element_size()]).long()
        checksum += (bits * weights[: len(piece)]).sum()
        finite *= piece.isfinite().all()
        weights += 2 * size
    return checksum, finite
