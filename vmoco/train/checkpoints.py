"""The checkpoints of a run: written while training goes on, the last few and the best kept, the newest whole one found.

    training thread   snapshot (a copy in memory) ..... next steps ..............................
    writer thread                 write, publish, read back and compare, list, remove what is not kept

Ray Train is not told of them. It takes a checkpoint for real only once its controller has asked for it, so a run that
is killed soon after would lose one that is whole on disk; and it cannot fall back to an older one. The folder itself
is the truth: `step-<number>/` with a record whose hashes fit. `checkpoints.json` beside them lists what is kept.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vmoco import storage
from vmoco.encoders.promotion import Score
from vmoco.train.resume import steps, uri_of
from vmoco.train.state import RECORD, SETTINGS, TENSORS, Snapshot, TrainState

LIST = "checkpoints.json"
"""The kept checkpoints, in the run's folder and, the same, in MLflow."""


@dataclass(frozen=True)
class Kept:
    """A checkpoint that is whole and kept."""

    step: int
    uri: str
    sha256: str
    """Of its tensors' file."""
    score: Score | None = None
    """Of its encoder by the evaluation during training, and on which clips."""


class Checkpoints:
    """Keeps the states of one run; of the ranks, the first has one.

    Args:
        folder: URI of the run's folder.
        run_id: MLflow run, for the records.
        keep: newest checkpoints that are kept.
        keep_best: best-scored checkpoints that are kept besides.
        may_write: raises where this group of workers has lost its right to the folder.
        before: called before a checkpoint becomes visible, with its step; what must not be lost is kept then.
        changed: called with the kept checkpoints, oldest first, whenever they have changed.
        failed: called with a sentence when one could not be written; training goes on.

    Attributes:
        num_failed: checkpoints that could not be written.
    """

    def __init__(
        self,
        folder: str,
        *,
        run_id: str | None,
        keep: int,
        keep_best: int,
        may_write: Callable[[], None],
        before: Callable[[int], None],
        changed: Callable[[list[Kept]], None],
        failed: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._run_id = run_id
        self._keep = keep
        self._keep_best = keep_best
        self._may_write = may_write
        self._before = before
        self._changed = changed
        self._failed = failed
        self._kept: list[Kept] = []
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None
        self._snapshot: Snapshot | None = None
        self._error: BaseException | None = None
        self.num_failed = 0

    def resumed(self, step: int) -> list[Kept]:
        """Takes the list up again, up to the step that was resumed, and removes what a kill has left behind."""
        for name in storage.list_folders(self._folder):
            if name.endswith(".tmp"):
                storage.delete_folder(storage.join(self._folder, name))
        storage.delete_leftovers(storage.join(self._folder, LIST))
        listed = {row.step: row for row in _read_list(self._folder)}
        for at in steps(self._folder):
            uri = uri_of(self._folder, at)
            record = json.loads(storage.read_bytes(storage.join(uri, RECORD)))
            before = listed.get(at)
            score = before.score if before and before.sha256 == record["sha256"] else None
            if at == step or (at < step and before is not None):
                self._kept.append(Kept(at, uri, record["sha256"], score))
        return list(self._kept)

    def keep(self, state: TrainState) -> None:
        """Copies the state and returns; the copy is written in the background.

        Waits only where the checkpoint before is still being written: there is memory for one copy.

        Raises:
            FencedError: another group of workers has taken the run over.
        """
        self._wait()
        self._snapshot = snapshot = state.snapshot(reuse=self._snapshot)
        self._writing = self._thread.submit(self._write, snapshot)

    def is_writing(self) -> bool:
        """Whether a state is still being written."""
        return self._writing is not None and not self._writing.done()

    def finish(self, step: int) -> None:
        """Waits until the last state is kept.

        Raises:
            ValueError: it could not be written.
        """
        self._wait()
        newest = self._kept[-1].step if self._kept else None
        if newest != step:
            before = f"the run can go on from step {newest}" if newest is not None else "the run has no checkpoint"
            raise ValueError(f"the checkpoint of step {step} could not be kept ({self._error}): {before}")

    def close(self) -> None:
        """Ends the thread, when what it does is done."""
        self._thread.shutdown(wait=True)

    @contextlib.contextmanager
    def hold(self, step: int) -> Iterator[None]:
        """Inside, the checkpoint of a step is not removed."""
        with self._lock:
            self._held.add(step)
        try:
            yield
        finally:
            with self._lock:
                self._held.discard(step)

    def score(self, step: int, score: Score) -> None:
        """Notes the score of a kept checkpoint, in the background; one that is kept no more is left out."""

        def note() -> None:
            if step in [row.step for row in self._kept]:
                self._list([replace(row, score=score) if row.step == step else row for row in self._kept])

        self._thread.submit(self._guarded, note)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
        if isinstance(self._error, RuntimeError):  # fenced, as a rule: nothing that this rank does counts any more
            raise self._error

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            self._may_write()
            work()
        except RuntimeError as error:
            self._error = error
        except (OSError, ValueError) as error:
            self._error = error
            self.num_failed += 1
            self._failed(f"not kept: {error}")

    def _write(self, snapshot: Snapshot) -> None:
        self._guarded(lambda: self._publish(snapshot))

    def _publish(self, snapshot: Snapshot) -> None:
        uri = uri_of(self._folder, snapshot.step)
        with self._scratch(snapshot.step) as place:
            record = snapshot.write(place, run_id=self._run_id)
            self._before(snapshot.step)
            storage.delete_file(storage.join(uri, RECORD))  # without it a folder is no checkpoint
            storage.make_folder(uri)
            for name in (TENSORS, SETTINGS):
                storage.publish(place / name, storage.join(uri, name))
            if storage.file_sha256(storage.join(uri, TENSORS)) != record.sha256:
                raise ValueError(f"{uri} was written and reads back as something else: the storage is faulty")
            self._may_write()
            storage.publish(place / RECORD, storage.join(uri, RECORD))
        others = [row for row in self._kept if row.step != record.step]
        self._list([*others, Kept(record.step, uri, record.sha256)])

    @contextlib.contextmanager
    def _scratch(self, step: int) -> Iterator[Path]:
        """A folder on the disk of the run's folder, so that publishing is renaming; or on this machine's."""
        local = storage.local_path(self._folder)
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

    def _list(self, rows: list[Kept]) -> None:
        """Writes the list of those of the rows that are kept, and removes the others."""
        newest = rows[-self._keep :]
        scored = sorted((row.score.value, row.step) for row in rows if row.score is not None)
        best = scored[-self._keep_best :] if self._keep_best else []
        stay = {row.step for row in newest} | {step for _, step in best}
        with self._lock:
            stay |= self._held
        self._kept = [row for row in rows if row.step in stay]
        storage.write_atomic(storage.join(self._folder, LIST), list_text(self._kept).encode())
        self._changed(list(self._kept))
        for row in rows:
            if row.step not in stay:
                storage.delete_folder(row.uri)


def list_text(rows: list[Kept]) -> str:
    """The list as JSON."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def parse_list(text: str | bytes) -> list[Kept]:
    """What `list_text` wrote."""
    rows: list[dict[str, Any]] = json.loads(text)
    return [Kept(**row | {"score": Score(**row["score"]) if row["score"] else None}) for row in rows]


def _read_list(folder: str) -> list[Kept]:
    try:
        return parse_list(storage.read_bytes(storage.join(folder, LIST)))
    except (FileNotFoundError, ValueError):  # killed between its first checkpoint and the list
        return []
