"""The folder of one run: what lies in it, the list of its checkpoints, and how a run resumes from them or forks.

    STORAGE/RUN.NAME/
      run.json              settings, data set, MLflow run; where the encoder is, once the run has ended
      init.safetensors      weights that the run starts from (--model.init): a copy, because an alias may move, and
                            another run deletes its old checkpoints
      lease.json            the job that holds the run                                   (vmoco/train/lease.py)
      writer.json           the group of workers that may write                          (vmoco/train/lease.py)
      checkpoints.json      the checkpoints that are kept, oldest first; MLflow has the same text
      spool.json            points that the tracker had not taken at the last checkpoint (vmoco/spool.py)
      step-00000500/        one checkpoint                                               (vmoco/train/state.py)
        state.safetensors   all tensors
        settings.json       the settings of the run
        state.json          step, data set, SHA-256 of the tensors; written last, a folder without it is no checkpoint
        damaged.json        what state.json is renamed to when the tensors do not match it
      .step-500.X.tmp/      a checkpoint that is being written; the next start removes what a kill leaves

A run resumes from the newest folder that is complete, whatever the list says: the list may be older than the folders
when a run is killed. Ray Train knows nothing of checkpoints. It counts one only after its controller has polled it, so
it would lose one that is complete on disk, and it cannot fall back to an older one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch

from vmoco import storage
from vmoco.config import PretrainSettings
from vmoco.encoders.package import CARD
from vmoco.encoders.promotion import Score
from vmoco.train import distributed
from vmoco.train.lease import Fence
from vmoco.train.state import (
    STATE_RECORD,
    STATE_SETTINGS,
    STATE_TENSORS,
    DamagedCheckpointError,
    Record,
    TrainState,
    differences,
    fixed_by_encoders,
    networks_in,
    parse_settings,
    read_settings,
)

RUN, INIT, CHECKPOINTS, SPOOL = "run.json", "init.safetensors", "checkpoints.json", "spool.json"
DAMAGED = "damaged.json"
_PREFIX = "step-"


def fixed_by_fork(settings: PretrainSettings) -> tuple[str, ...]:
    """Fields that decide which tensors a training state has: a fork must have the values of its donor."""
    return (*fixed_by_encoders(settings), "generator.hidden_channels", "moco.queue_size", "train.optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """A row of checkpoints.json: a checkpoint that is complete and kept."""

    step: int
    uri: str
    sha256: str
    """Of the file with its tensors."""
    score: Score | None = None
    """Score of its encoder, and the clips on which it was measured; None until it is scored."""


@dataclass(frozen=True)
class Resumed:
    """The checkpoint from which a run resumes."""

    record: Record
    damaged: list[str]
    """One message for each newer checkpoint that is not complete."""


class RunFolder:
    """Reads and writes the folder of one run. Several threads may use one object.

    Args:
        uri: path or URI of the folder; it does not need to exist.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._fence: Fence | None = None
        self._lock = threading.Lock()  # over the list in memory and its file
        self._kept: list[Checkpoint] = []
        self._to_delete: list[str] = []

    def path(self, *names: str) -> str:
        """URI of a file in the folder."""
        return storage.join(self.uri, *names)

    def checkpoint_uri(self, step: int) -> str:
        """URI of the checkpoint of a step; a checkpoint that is written again has the same URI."""
        return self.path(f"{_PREFIX}{step:08d}")

    # The run itself.

    def read_run(self) -> dict[str, Any] | None:
        """Content of run.json; None where the run has not begun."""
        try:
            content: dict[str, Any] = json.loads(storage.read_bytes(self.path(RUN)))
        except FileNotFoundError:
            return None
        return content

    def write_run(self, content: dict[str, Any]) -> None:
        """Writes run.json."""
        storage.write_atomic(self.path(RUN), json.dumps(content, indent=1).encode())

    # Who may write.

    def claim(self, *, lease: str) -> None:
        """Makes this group of workers the only one that may write.

        Args:
            lease: token of the job that holds the run.

        Raises:
            FencedError: another job holds the run by now.
        """
        self._fence = Fence(self.uri, lease=lease)

    def check_fence(self) -> None:
        """Returns if this group of workers may still write.

        Raises:
            FencedError: a later group has claimed the folder.
        """
        assert self._fence is not None, "claimed before anything is written"
        self._fence.check()

    # How a run starts.

    def restore(self, state: TrainState) -> list[str]:
        """Fills a new state: from the newest complete checkpoint, else from what the settings name. Each rank calls it.

        Returns:
            One message for each checkpoint that is damaged.

        Raises:
            ValueError: the checkpoint does not fit the run, or there are checkpoints and none is complete.
        """
        if found := self.resume(state):
            return found.damaged
        if state.settings.run.fork:
            fork(state.settings.run.fork, state)
        elif state.settings.model.init:
            state.begin_with(safetensors.torch.load(storage.read_bytes(self.path(INIT))))
        return []

    def resume(self, state: TrainState) -> Resumed | None:
        """Restores the newest complete checkpoint. Every rank calls it, and all ranks restore the same one.

        A damaged checkpoint is set aside, and the one before it is used. A checkpoint of other settings or data is an
        error, because skipping it would throw training away.

        Returns:
            None where there is no checkpoint: the state is unchanged.

        Raises:
            ValueError: the newest complete checkpoint is of other settings or data, or there are checkpoints and none
                is complete.
        """
        found = self._resume_newest(state) if distributed.rank() == 0 else None
        step = distributed.agree(found.record.step if found else -1)  # every rank waits for rank 0
        if distributed.rank() == 0 or step < 0:
            return found
        with local_copy(self.checkpoint_uri(step)) as checkpoint:
            return Resumed(state.load(checkpoint), [])

    def _resume_newest(self, state: TrainState) -> Resumed | None:
        damaged: list[str] = []
        for step in reversed(self.steps()):
            uri = self.checkpoint_uri(step)
            try:
                with local_copy(uri) as checkpoint:
                    return Resumed(state.load(checkpoint), damaged)
            except DamagedCheckpointError as error:
                damaged.append(str(error))
                with contextlib.suppress(FileNotFoundError):
                    storage.write_atomic(storage.join(uri, DAMAGED), storage.read_bytes(_record_of(uri)))
                    storage.delete_file(_record_of(uri))
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.uri} is complete: {'; '.join(damaged)}. Restore one from a backup, or start a "
                "new run with another --run.name"
            )
        return None

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending; their tensors have not been checked."""
        names = [name for name in storage.list_folders(self.uri) if name.startswith(_PREFIX)]
        return [int(name.removeprefix(_PREFIX)) for name in names if storage.exists(_record_of(self.path(name)))]

    # The list of checkpoints.

    def open_list(self, step: int) -> None:
        """Reads the list up to the step of this state, and removes what a kill has left behind."""
        for name in storage.list_folders(self.uri):
            if name.endswith(".tmp"):
                storage.delete_folder(self.path(name))
        storage.delete_leftovers(self.path(CHECKPOINTS))
        try:
            listed = {row.step: row for row in checkpoints_from_json(storage.read_bytes(self.path(CHECKPOINTS)))}
        except (FileNotFoundError, ValueError):  # killed between the first checkpoint and the list
            listed = {}
        self._kept = []
        for at in self.steps():
            if at == step or (at < step and at in listed):
                sha256 = json.loads(storage.read_bytes(_record_of(self.checkpoint_uri(at))))["sha256"]
                same = at in listed and listed[at].sha256 == sha256
                self._kept.append(Checkpoint(at, self.checkpoint_uri(at), sha256, listed[at].score if same else None))

    def checkpoints(self) -> list[Checkpoint]:
        """The kept checkpoints, oldest first, as of `open_list` and what was added since."""
        with self._lock:
            return list(self._kept)

    def newest(self) -> Checkpoint | None:
        """The newest kept checkpoint."""
        rows = self.checkpoints()
        return rows[-1] if rows else None

    def add(self, checkpoint: Checkpoint) -> None:
        """Lists a checkpoint as the newest one."""
        with self._lock:
            self._write_list([*(row for row in self._kept if row.step != checkpoint.step), checkpoint])

    def add_score(self, step: int, score: Score) -> None:
        """Lists the score of a checkpoint; does nothing where that checkpoint is not kept.

        Raises:
            FencedError: another group of workers writes to this folder.
        """
        self.check_fence()
        with self._lock:
            if step in [row.step for row in self._kept]:
                self._write_list([replace(row, score=score) if row.step == step else row for row in self._kept])

    def drop_old(self, *, keep: int, keep_best: int, in_use: set[int]) -> list[str]:
        """Takes the checkpoints that are not kept off the list, and deletes them.

        Args:
            keep: number of newest checkpoints to keep.
            keep_best: number of best-scored checkpoints to keep besides.
            in_use: steps that somebody is reading: they are kept too.

        Returns:
            One message for each checkpoint that could not be deleted; the next call tries again.
        """
        with self._lock:
            scored = sorted((row.score.value, row.step) for row in self._kept if row.score is not None)
            best = scored[-keep_best:] if keep_best else []
            stay = {row.step for row in self._kept[-keep:]} | {step for _, step in best} | in_use
            dropped = [row.uri for row in self._kept if row.step not in stay]
            if dropped:
                self._write_list([row for row in self._kept if row.step in stay])
            self._to_delete += dropped
        problems = []
        for uri in list(self._to_delete):
            try:
                storage.delete_folder(uri)
                self._to_delete.remove(uri)
            except OSError as error:
                problems.append(f"the old checkpoint {uri} could not be deleted ({error}); the next checkpoint retries")
        return problems

    def _write_list(self, rows: list[Checkpoint]) -> None:
        storage.write_atomic(self.path(CHECKPOINTS), checkpoints_to_json(rows).encode())
        self._kept = rows

    @contextlib.contextmanager
    def scratch(self, step: int) -> Iterator[Path]:
        """A folder to write a checkpoint into: on the disk of the run's folder, so that publishing is a rename."""
        local = storage.local_path(self.uri)
        if local is None:
            with tempfile.TemporaryDirectory() as place:
                yield Path(place)
            return
        local.mkdir(parents=True, exist_ok=True)
        place = tempfile.mkdtemp(prefix=f".step-{step}.", suffix=".tmp", dir=local)
        try:
            yield Path(place)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def checkpoints_to_json(rows: Sequence[Checkpoint]) -> str:
    """Content of checkpoints.json."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def checkpoints_from_json(text: str | bytes) -> list[Checkpoint]:
    """Inverse of `checkpoints_to_json`."""
    rows: list[dict[str, Any]] = json.loads(text)
    return [Checkpoint(**row | {"score": Score(**row["score"]) if row["score"] else None}) for row in rows]


def _record_of(uri: str) -> str:
    return storage.join(uri, STATE_RECORD)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A checkpoint as a folder on this machine: itself, or a copy that is deleted afterwards.

    Raises:
        DamagedCheckpointError: a file is missing.
    """
    if (local := storage.local_path(uri)) is not None:
        yield local
        return
    with tempfile.TemporaryDirectory() as place:
        for name in (STATE_RECORD, STATE_SETTINGS, STATE_TENSORS):
            try:
                storage.fetch(storage.join(uri, name), Path(place, name))
            except FileNotFoundError:
                raise DamagedCheckpointError(f"checkpoint {uri} has no {name}") from None
        yield Path(place)


def check_fork(settings: PretrainSettings, manifest_hash: str) -> None:
    """Checks, by the small files alone, that a run can start from the checkpoint that `run.fork` names.

    The settings of the method may differ from the donor's, so that a schedule can be changed on the way. The networks,
    the length of the queue, the kind of optimizer and the data may not.

    Raises:
        ValueError: it cannot.
    """
    uri = settings.run.fork
    assert uri is not None, "the caller checks that there is a fork"
    record, donor = _small_files(uri, flag="--run.fork")
    if record["manifest_hash"] != manifest_hash:
        raise ValueError(
            f"--run.fork {uri} was trained on data set {record['manifest_hash']}, --data.uri is {manifest_hash}: give "
            "the data set that it was trained on"
        )
    if record["step"] >= settings.last_step:
        raise ValueError(
            f"--run.fork {uri} is at step {record['step']}, and this run ends at {settings.last_step}: raise "
            "--train.steps or --train.stop-after"
        )
    if changed := differences(donor, settings, only=fixed_by_fork(settings)):
        raise ValueError(f"--run.fork {uri} has other tensors ({changed}): set these as they were")


def _small_files(uri: str, *, flag: str) -> tuple[dict[str, Any], PretrainSettings]:
    """The record and the settings of a checkpoint."""
    try:
        record: dict[str, Any] = json.loads(storage.read_bytes(_record_of(uri)))
        settings = parse_settings(storage.read_bytes(storage.join(uri, STATE_SETTINGS)), uri)
    except FileNotFoundError:
        raise ValueError(
            f"{flag} {uri} is not a checkpoint: give the folder of one, as checkpoints.json of a run lists them"
        ) from None
    return record, settings


def fork(uri: str, state: TrainState) -> None:
    """Fills a new state with a checkpoint of another run; every rank calls it.

    With equal settings the new run continues exactly as the other run would.

    Raises:
        ValueError: the checkpoint is damaged, or does not fit.
    """
    with local_copy(uri) as checkpoint:
        donor = TrainState(
            read_settings(checkpoint),
            manifest_hash=state.manifest_hash,
            device=state.difference.device,
            autocast_dtype=state.moco.query.autocast_dtype,
        )
        donor.load(checkpoint)
    state.take_over(donor)


def is_checkpoint(uri: str) -> bool:
    """Whether `model.init` is a checkpoint; otherwise it is an encoder: a folder, or a name in the registry."""
    return not uri.startswith(("models:/", "runs:/")) and not storage.exists(storage.join(uri, CARD))


def check_init(settings: PretrainSettings) -> None:
    """Checks, by the small files alone, that a run can start from the checkpoint that `model.init` names, if it is one.

    Only the encoders must have the shapes of the checkpoint's. Everything else may differ, also the data set.

    Raises:
        ValueError: it cannot.
    """
    uri = settings.model.init
    assert uri is not None, "the caller checks it"
    if not is_checkpoint(uri):
        return
    if not storage.exists(_record_of(uri)):
        raise ValueError(
            f"--model.init {uri} is neither an encoder nor a checkpoint: it has no {CARD} and no {STATE_RECORD}. Give "
            "models:/NAME@ALIAS, the folder of an encoder, or a uri from the checkpoints.json of a run"
        )
    donor = _small_files(uri, flag="--model.init")[1]
    if changed := differences(donor, settings, only=fixed_by_encoders(settings)):
        raise ValueError(f"--model.init {uri} has other encoders ({changed}): set these as they were")


def begin_from(uri: str, state: TrainState) -> None:
    """Starts a new training from a checkpoint: what `--model.init CHECKPOINT` does, without Ray and MLflow.

    The checkpoint's query and key encoder are kept, with their heads and batch-normalisation statistics; the generator
    is kept if its shapes fit. All else stays as in a new state: step 0, the learning rate and the order of the data of
    the state's settings, new optimizers, an empty queue. The queue starts empty because its keys have ages and videos
    of the other training, whose data set and length of queue may be others; it is full after K / G steps.

    Args:
        uri: of the checkpoint, a folder that `TrainState.save` wrote.
        state: new; changed in place. Its settings may differ in all but the shapes of the encoders.

    Raises:
        ValueError: it is not a checkpoint, it is damaged, or its encoders have other shapes.
    """
    with local_copy(uri) as checkpoint:
        state.begin_with(networks_in(checkpoint, state.settings))
