"""Redoes the step of a replay file, and says where its first value that is not finite appears.

The ranks of the run become processes of this machine, by gloo on CPUs, or each on a GPU of its own. Then the steps have
the bits of the run, on the same type of CPU or GPU. In fewer processes the math is the same: the order of the clips,
their augmentation and the queue do not depend on the number of ranks, and only sums are rounded in another way.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vmoco import storage
from vmoco.config import PretrainSettings
from vmoco.data.fit import check_fits
from vmoco.data.loader import Loader
from vmoco.data.mixture import Mixture
from vmoco.job import show as show_line
from vmoco.model.backbone import autocast_dtype, require_determinism
from vmoco.progress import Progress
from vmoco.train import distributed
from vmoco.train.first_non_finite import Finding, WatchedStep
from vmoco.train.replay_file import ReplayFile, read, state_hash
from vmoco.train.run_folder import INIT, RunFolder, fork, local_copy
from vmoco.train.speed import choose_kernels, uncompiled
from vmoco.train.state import Record, TrainState
from vmoco.train.step import NonFiniteError


@dataclass(frozen=True)
class Outcome:
    """What a replay has found."""

    findings: list[Finding]
    """In the order in which they appear, of all ranks."""
    step: int
    """Last step that was redone, counted from 0."""
    error: str
    """The error that the step raises again; empty if it was finite."""
    is_exact: bool | None
    """Whether the state before the step has the bits of the run; None where the run could not tell."""


def replay(
    uri: str, *, ranks: int | None = None, data_uri: Sequence[str] = (), show: Callable[[str], None] = show_line
) -> Outcome:
    """Redoes the steps from the checkpoint to the step of a replay file.

    Args:
        uri: of the file.
        ranks: number of processes; None takes as many as the run had, if this machine can.
        data_uri: place of each data set, if it is another one now.
        show: prints a line.

    Raises:
        ValueError: the file, the checkpoint or the data set cannot be used.
    """
    found = read(uri)
    if data_uri:
        if len(data_uri) != len(found.data_uri):
            raise ValueError(
                f"--data {' '.join(data_uri)} does not fit the run: it has read {len(found.data_uri)} data sets "
                f"({', '.join(found.data_uri)}); give the place of each, in this order"
            )
        found = replace(found, data_uri=tuple(storage.absolute_uri(each) for each in data_uri))
    settings = settings_of(found)
    _check(found, settings)
    # A GPU of its own for each rank, as in the run.
    on_gpu = found.device == "cuda" and torch.cuda.device_count() >= (ranks or 1)
    possible = found.num_ranks if found.device == "cpu" or torch.cuda.device_count() >= found.num_ranks else 1
    num_ranks = possible if ranks is None else ranks
    if not 1 <= num_ranks <= settings.num_micro_batches:
        raise ValueError(
            f"--ranks {ranks} is not allowed: a step has {settings.num_micro_batches} micro-batches, so 1 to "
            f"{settings.num_micro_batches} processes can share it"
        )
    for line in _introduce(found, num_ranks=num_ranks, on_gpu=on_gpu):
        show(line)
    with tempfile.TemporaryDirectory() as place:
        args = (num_ranks, place, found, "cuda" if on_gpu else "cpu")
        if num_ranks == 1:
            _redo(0, *args)  # here, so that a debugger sees it
        else:
            mp.start_processes(_redo, args=args, nprocs=num_ranks, daemon=True, start_method="spawn")
        outcomes = [_outcome(Path(place, f"{rank}.json")) for rank in range(num_ranks)]
    findings = sorted((each for one in outcomes for each in one.findings), key=lambda each: (each.look, each.rank))
    return replace(outcomes[0], findings=findings)


def settings_of(found: ReplayFile) -> PretrainSettings:
    """The settings of the run, with the places of its data sets."""
    settings = PretrainSettings(**found.settings)
    return settings.model_copy(update={"data": settings.data.model_copy(update={"uri": found.data_uri})})


def _check(found: ReplayFile, settings: PretrainSettings) -> None:
    """Checks what the replay needs before it starts any process.

    Raises:
        ValueError: something is missing, or is not what the run had.
    """
    mixture = Mixture.load(settings.data)
    if mixture.hash != found.manifest_hash:
        raise ValueError(
            f"data set {mixture.uri} has hash {mixture.hash}, and the run was on {found.manifest_hash}: give the "
            "place of that data set by --data"
        )
    check_fits(mixture, settings)
    if found.checkpoint is None:
        return
    with local_copy(found.checkpoint) as place:
        record = Record.read(place)
    if record.sha256 != found.checkpoint_sha256:
        raise ValueError(
            f"checkpoint {found.checkpoint} was written again since the step was not finite, so the steps from it may "
            "have other bits: restore it from a backup, or replay the newest file in the folder of the run"
        )


def _introduce(found: ReplayFile, *, num_ranks: int, on_gpu: bool) -> list[str]:
    start = f"checkpoint {found.checkpoint}" if found.checkpoint else "the start of the run"
    count = f"{num_ranks} processes" if num_ranks > 1 else "one process"
    lines = [
        f"replays step {found.step} of {found.run_folder}: {count} on {'GPUs' if on_gpu else 'CPUs'}, from {start}",
        f"the run said: {found.message}",
    ]
    differs = []
    if num_ranks != found.num_ranks:
        differs.append(f"the run had {found.num_ranks} ranks")
    if found.device == "cuda" and not on_gpu:
        differs.append(f"the run was on GPUs, in {found.autocast_dtype or 'float32'}")
    if torch.__version__ != found.torch_version:
        differs.append(f"the run had torch {found.torch_version}, here is {torch.__version__}")
    if differs:
        lines.append(f"warning: {', '.join(differs)}: the math is the same, and the rounding is not")
    return lines


def _redo(rank: int, num_ranks: int, place: str, found: ReplayFile, device_type: str) -> None:
    """One rank of the run; writes its outcome into a file."""
    torch.set_num_threads(found.threads)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{place}/meet",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=distributed.SLOW_STEP_SECONDS),
    )
    try:
        outcome = _redo_steps(found, device)
    finally:
        dist.destroy_process_group()
    Path(place, f"{rank}.json").write_text(json.dumps(asdict(outcome)))


def _redo_steps(found: ReplayFile, device: torch.device) -> Outcome:
    settings, rank = settings_of(found), distributed.rank()
    if settings.train.deterministic:
        require_determinism(settings.model.backbone, device)
    choose_kernels(settings.train, device)
    dtype, _ = autocast_dtype("auto", device)  # as in a run it also switches TF32 off
    if device.type == found.device:  # what is right on a GPU may not be so on a CPU
        dtype = getattr(torch, found.autocast_dtype) if found.autocast_dtype else None
    state = TrainState(settings, manifest_hash=found.manifest_hash, device=device, autocast_dtype=dtype)
    _begin(state, found)
    loader = Loader(
        Mixture.load(settings.data),
        settings,
        rank=rank,
        world_size=distributed.world_size(),
        start_step=state.step,
        pin_memory=device.type == "cuda",
    )
    step = WatchedStep(settings, state, device, rank=rank)
    first = lambda line: show_line(line) if rank == 0 else None  # noqa: E731
    progress = Progress(first, "replay  redone", total=found.step + 1 - state.step, unit="steps", every_seconds=5.0)
    is_exact = None
    for batch in loader:
        is_it = batch.step == found.step
        if is_it and found.state_hash is not None:
            is_exact = state_hash(state) == found.state_hash
        error = ""
        try:
            if is_it:
                step.watch(batch, key_clip_ids=_key_clip_ids(loader, settings, batch.step))
                with uncompiled(settings.train):  # hooks do not see into compiled networks
                    step(batch)
            else:
                step(batch)
            step.requested(now=True)
        except NonFiniteError as raised:
            error = str(raised)
        if is_it:
            step.unwatch()
        # A state that is not finite was seen at the next checkpoint, perhaps long after the update that made it so.
        if not error:
            step.look_at_state()
        progress.add()
        if error or step.findings or is_it:
            return Outcome(step.findings, batch.step, error, is_exact)
    raise ValueError(f"step {found.step} lies behind the end of the run: the replay file is damaged")


def _begin(state: TrainState, found: ReplayFile) -> None:
    """Fills a new state as the run began, or with the checkpoint."""
    if found.checkpoint is not None:
        with local_copy(found.checkpoint) as checkpoint:
            state.load(checkpoint)
    elif state.settings.run.fork:
        fork(state.settings.run.fork, state)
    elif state.settings.model.init:
        state.begin_with(safetensors.torch.load(storage.read_bytes(RunFolder(found.run_folder).path(INIT))))


def _key_clip_ids(loader: Loader, settings: PretrainSettings, step: int) -> list[str]:
    """Clip of each of this rank's keys."""
    draws = loader.plan.batch(step)[loader.plan.key_order(step)]
    clips = draws.clip if step < settings.two_clips_start else loader.plan.second_clips(draws)
    share = loader.plan.share(distributed.rank(), distributed.world_size())
    return loader.clip_ids(clips[share])


def _outcome(path: Path) -> Outcome:
    values = json.loads(path.read_text())
    return Outcome(**values | {"findings": [Finding(**each) for each in values["findings"]]})
