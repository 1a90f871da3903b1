"""Finds the checkpoint that a run goes on from: the newest one in its folder that is whole.

A checkpoint is `step-<number>/` with a record whose hashes fit; the folder itself is asked, and no list. One that is
damaged is set aside and said, and the one before is taken. One of other settings or data is an error: to pass it over
would throw training away.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmoco import storage
from vmoco.train import distributed
from vmoco.train.state import RECORD, SETTINGS, TENSORS, DamagedCheckpointError, Record, TrainState

DAMAGED = "damaged.json"
"""What the record of a checkpoint that was found damaged is renamed to: it stays to be looked at, and is none."""
_PREFIX = "step-"


def uri_of(folder: str, step: int) -> str:
    """Where the checkpoint of a step lies in its run's folder; written again it has the same place."""
    return storage.join(folder, f"{_PREFIX}{step:08d}")


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A checkpoint as a folder on this machine: itself, or a copy that goes away.

    Raises:
        DamagedCheckpointError: a file is missing.
    """
    if (local := storage.local_path(uri)) is not None:
        yield local
        return
    with tempfile.TemporaryDirectory() as place:
        for name in (RECORD, SETTINGS, TENSORS):
            try:
                storage.fetch(storage.join(uri, name), Path(place, name))
            except FileNotFoundError:
                raise DamagedCheckpointError(f"checkpoint {uri} has no {name}") from None
        yield Path(place)


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    record: Record
    damaged: list[str]
    """A sentence for each newer checkpoint that was not whole."""


def resume(folder: str, state: TrainState) -> Resumed | None:
    """Restores the newest whole checkpoint of a run; every rank calls it, and all take the same one.

    Returns:
        None where there is no checkpoint: the state is as it was.

    Raises:
        ValueError: the newest whole checkpoint is of other settings or data, or there are some and none is whole.
    """
    found: Resumed | None = None
    if distributed.rank() == 0:
        found = _newest_whole(folder, state)
    step = distributed.agree(found.record.step if found else -1)  # every rank waits for rank 0 to have found one
    if distributed.rank() == 0 or step < 0:
        return found
    with local_copy(uri_of(folder, step)) as place:
        return Resumed(state.load(place), [])


def _newest_whole(folder: str, state: TrainState) -> Resumed | None:
    damaged: list[str] = []
    for step in reversed(steps(folder)):
        uri = uri_of(folder, step)
        try:
            with local_copy(uri) as place:
                return Resumed(state.load(place), damaged)
        except DamagedCheckpointError as error:
            damaged.append(str(error))
            _set_aside(uri)
    if damaged:
        raise ValueError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}. Bring one back, or give another run.name to "
            "begin anew"
        )
    return None


def _set_aside(uri: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        storage.write_atomic(storage.join(uri, DAMAGED), storage.read_bytes(storage.join(uri, RECORD)))
        storage.delete_file(storage.join(uri, RECORD))


def steps(folder: str) -> list[int]:
    """Steps of the checkpoints in a run's folder, whole or not, ascending; one without a record is none."""
    names = [name for name in storage.list_folders(folder) if name.startswith(_PREFIX)]
    return [int(name.removeprefix(_PREFIX)) for name in names if storage.exists(storage.join(folder, name, RECORD))]
