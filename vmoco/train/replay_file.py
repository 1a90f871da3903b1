"""What a run writes when a step is not finite, so that `jobs/replay.py` can redo that very step.

The file holds no tensors. A step is a function of state, data, seeds and the number of ranks, so the last checkpoint
and the numbers of the steps since then are enough. A copy of the state before each step would cost memory and time in
all the steps that are fine, and on a GPU the bad step is noticed only when the next one has changed the state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import vmoco
from vmoco import storage
from vmoco.train.loop import fingerprint
from vmoco.train.run_folder import FAULTS, Checkpoint, RunFolder
from vmoco.train.state import TrainState
from vmoco.train.step import NonFiniteError

VERSION = 1


@dataclass(frozen=True)
class ReplayFile:
    """Content of the file."""

    message: str
    """The error of the run."""
    step: int
    """The step to look at, counted from 0."""
    clip_ids: Sequence[list[str]]
    """Clips of each rank's queries in that step; empty if the state after it was not finite."""
    run_folder: str
    start_step: int
    """First step to redo: that of the checkpoint."""
    checkpoint: str | None
    """URI of the checkpoint; None if the run had none, and began as its settings say."""
    checkpoint_sha256: str | None
    """Of its tensors."""
    num_ranks: int
    threads: int
    """Of each rank."""
    device: str
    """cpu or cuda."""
    autocast_dtype: str | None
    """Arithmetic of the encoders, such as bfloat16; None for float32."""
    data_uri: tuple[str, ...]
    """Place of each data set."""
    manifest_hash: str
    seed: int
    """Every random draw follows from it, from the step and from the clip."""
    state_hash: str | None
    """`state_hash` of the state before the step; None if the state had changed when the step was noticed."""
    settings: dict[str, Any]
    torch_version: str


def write(error: NonFiniteError, state: TrainState, folder: RunFolder, *, newest: Checkpoint | None, ranks: int) -> str:
    """Writes the file into the run's folder, and returns its URI.

    Args:
        error: of the run.
        state: in which it was noticed.
        folder: of the run.
        newest: the newest complete checkpoint.
        ranks: number of ranks.

    Raises:
        ValueError: it cannot be written.
    """
    settings, dtype = state.settings, state.moco.query.autocast_dtype
    content = ReplayFile(
        message=str(error),
        step=error.step,
        clip_ids=error.clip_ids,
        run_folder=folder.uri,
        start_step=newest.step if newest else 0,
        checkpoint=newest.uri if newest else None,
        checkpoint_sha256=newest.sha256 if newest else None,
        num_ranks=ranks,
        threads=torch.get_num_threads(),
        device=state.difference.device.type,
        autocast_dtype=str(dtype).removeprefix("torch.") if dtype else None,
        data_uri=settings.data.uri,
        manifest_hash=state.manifest_hash,
        seed=settings.run.seed,
        state_hash=state_hash(state) if state.step == error.step else None,
        settings=json.loads(settings.canonical_json()),
        torch_version=torch.__version__,
    )
    uri = folder.path(FAULTS, f"step-{error.step:08d}.json")
    text = json.dumps({"version": VERSION, "vmoco": vmoco.__version__, **asdict(content)}, indent=1)
    storage.write_atomic(uri, text.encode())
    return uri


def read(uri: str) -> ReplayFile:
    """Reads a file that `write` has written.

    Raises:
        ValueError: there is none, or it is of another version.
    """
    try:
        values = json.loads(storage.read_bytes(uri))
        version, writer = values.pop("version"), values.pop("vmoco")
    except FileNotFoundError:
        raise ValueError(f"{uri} does not exist: give the file that the error message of the run names") from None
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError):
        raise ValueError(
            f"{uri} is not a replay file of vmoco: give the file that the error message of the run names, "
            "RUN_FOLDER/faults/step-*.json"
        ) from None
    if version != VERSION:
        raise ValueError(f"{uri} has version {version}, this vmoco reads {VERSION}: use vmoco {writer}, which wrote it")
    places = values.pop("data_uri")
    return ReplayFile(**values, data_uri=(places,) if isinstance(places, str) else tuple(places))


def state_hash(state: TrainState) -> str:
    """A hash of the bits of the query encoder's weights and of the queue, which a step changes only at its end."""
    tensors = [*state.moco.query.parameters(), state.moco.queue.keys]
    sums = [int(fingerprint(tensor)[0]) for tensor in tensors]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]
