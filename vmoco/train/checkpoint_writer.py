"""Writes checkpoints in the background, while the next steps run.

    training thread   keep: copy the state in memory | next steps ...............................
    writer thread                                    | publish: write, check, list, offer, delete

Training waits only for the copy, and for the previous checkpoint where that is still being written: there is memory for
one copy. `_publish` is the whole way of a checkpoint, from top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from vmoco import storage
from vmoco.config import TrainSettings
from vmoco.spool import Spool
from vmoco.train.lease import FencedError
from vmoco.train.run_folder import CHECKPOINTS, Checkpoint, RunFolder, checkpoints_to_json
from vmoco.train.state import STATE_RECORD, STATE_SETTINGS, STATE_TENSORS, Snapshot, TrainState

if TYPE_CHECKING:
    from vmoco.train.evaluation import Evaluator  # imports Ray, which a test of the writer does not need


class CheckpointWriter:
    """Publishes the states of one run; only the first rank has one.

    Args:
        folder: of the run; this group of workers has claimed it.
        settings: how many checkpoints are kept.
        run_id: MLflow run, for the records of the checkpoints.
        spool: points and documents for the tracker.
        evaluator: scores each new checkpoint; None where checkpoints are not scored.
        show: prints a line.

    Attributes:
        num_failed: number of checkpoints that could not be published.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: TrainSettings,
        *,
        run_id: str | None,
        spool: Spool,
        evaluator: Evaluator | None,
        show: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._run_id = run_id
        self._spool = spool
        self._evaluator = evaluator
        self._show = show
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._publishing: Future[None] | None = None
        self._snapshot: Snapshot | None = None
        self._error: Exception | None = None
        self.num_failed = 0

    def keep(self, state: TrainState) -> None:
        """Copies the state and returns; the copy is published in the background.

        Raises:
            FencedError: another group of workers writes to the folder.
        """
        self._wait()
        self._snapshot = snapshot = state.snapshot(reuse=self._snapshot)
        self._publishing = self._thread.submit(self._try_to_publish, snapshot)

    def is_writing(self) -> bool:
        """Whether a checkpoint is being published."""
        return self._publishing is not None and not self._publishing.done()

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, once the one that is being published is complete.

        Raises:
            FencedError: another group of workers writes to the folder.
        """
        self._wait()
        return self._folder.newest()

    def finish(self, step: int) -> None:
        """Waits until the checkpoint of the last step is published.

        Raises:
            ValueError: it could not be published.
            FencedError: another group of workers writes to the folder.
        """
        newest = self.newest()
        if newest is None or newest.step != step:
            before = f"the run can resume from step {newest.step}" if newest else "the run has no checkpoint"
            raise ValueError(f"the checkpoint of step {step} could not be kept ({self._error}): {before}")

    def close(self) -> None:
        """Ends the thread, after a last look at which checkpoints are kept: scores may have come since."""
        if self._folder.newest() is not None:
            self._thread.submit(self._drop_old)
        self._thread.shutdown(wait=True)

    def _wait(self) -> None:
        if self._publishing is not None:
            self._publishing.result()
        if isinstance(self._error, FencedError):  # nothing that this rank does counts any more
            raise self._error

    def _try_to_publish(self, snapshot: Snapshot) -> None:
        try:
            self._publish(snapshot)
        except FencedError as error:
            self._error = error
        except (OSError, ValueError) as error:  # a full disk costs one checkpoint, not the run
            self._error = error
            self.num_failed += 1
            self._show(f"warning: a checkpoint was not kept: {error}")

    def _publish(self, snapshot: Snapshot) -> None:
        """The way of a checkpoint from a copy in memory to the list of kept checkpoints."""
        folder = self._folder
        uri = folder.checkpoint_uri(snapshot.step)
        folder.check_fence()
        with folder.scratch(snapshot.step) as scratch:
            record = snapshot.write(scratch, run_id=self._run_id)
            # Before the checkpoint is visible: a run that resumes from it does not make these points again.
            self._spool.save()
            storage.delete_file(storage.join(uri, STATE_RECORD))  # without it a folder is no checkpoint
            storage.make_folder(uri)
            for name in (STATE_TENSORS, STATE_SETTINGS):
                storage.publish(scratch / name, storage.join(uri, name))
            if storage.file_sha256(storage.join(uri, STATE_TENSORS)) != record.sha256:
                raise ValueError(f"{uri} reads back as something else than was written: the storage is faulty")
            folder.check_fence()  # again, because writing takes a while
            storage.publish(scratch / STATE_RECORD, storage.join(uri, STATE_RECORD))
        checkpoint = Checkpoint(record.step, uri, record.sha256)
        folder.add(checkpoint)
        self._show(f"checkpoint of step {checkpoint.step} kept in {uri}")
        if self._evaluator is not None:
            self._evaluator.submit(checkpoint)
        self._drop_old()

    def _drop_old(self) -> None:
        """Deletes what is not kept, and sends the list to the tracker; the next checkpoint retries what fails."""
        folder, in_use = self._folder, self._evaluator.in_use() if self._evaluator else set()
        folder.check_fence()
        keep, keep_best = self._settings.keep_checkpoints, self._settings.keep_best
        try:
            problems = folder.drop_old(keep=keep, keep_best=keep_best, in_use=in_use)
        except (OSError, ValueError) as error:
            problems = [f"old checkpoints were not deleted ({error}); the next checkpoint retries"]
        self._spool.document(CHECKPOINTS, checkpoints_to_json(folder.checkpoints()))
        for problem in problems:
            self._show(f"warning: {problem}")
