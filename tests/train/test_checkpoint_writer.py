"""Checkpoints are written while training goes on, completely or not at all, and the last and the best are kept."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_step import CPU, changed
from vmoco import storage
from vmoco.encoders.promotion import Score
from vmoco.presets import PRESETS
from vmoco.spool import Document, Points, Spool
from vmoco.train.checkpoint_writer import CheckpointWriter
from vmoco.train.lease import FencedError
from vmoco.train.run_folder import CHECKPOINTS, Checkpoint, RunFolder
from vmoco.train.state import STATE_TENSORS, TrainState

SETTINGS = changed(PRESETS["tiny"][1], train={"steps": 100}, generator={"start_percent": 100})


class Tracker:
    """A tracker in memory; while it is down it takes nothing."""

    def __init__(self) -> None:
        self.documents: dict[str, Document] = {}
        self.down = False

    def latest_steps(self) -> dict[str, int]:
        return {}

    def send(self, points: list[Points], documents: Mapping[str, Document]) -> None:
        if self.down:
            raise ConnectionError("no answer")
        self.documents |= documents


class Reader:
    """Stands for the evaluator: remembers what it is offered, and reads the checkpoints of some steps."""

    def __init__(self) -> None:
        self.offered: list[int] = []
        self.reading: set[int] = set()

    def submit(self, checkpoint: Checkpoint) -> None:
        self.offered.append(checkpoint.step)

    def in_use(self) -> set[int]:
        return self.reading


class Run:
    """A state, and a writer of its checkpoints into a real folder, with a real spool."""

    def __init__(self, place: Path, **train: Any) -> None:
        settings = changed(SETTINGS, train={"keep_checkpoints": 2, "keep_best": 1} | train)
        self.state = TrainState(SETTINGS, manifest_hash="data", device=CPU)
        for parameter in self.state.moco.query.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.state.query_optimizer.step()  # an optimizer makes its slots in its first step
        self.folder = RunFolder(str(place))
        self.folder.claim(lease="this job")
        self.lines: list[str] = []
        self.tracker, self.reader = Tracker(), Reader()
        self.spool = Spool(self.tracker, name="the tracker", uri=self.folder.path("spool.json"))
        self.writer = CheckpointWriter(
            self.folder,
            settings.train,
            run_id="a run",
            spool=self.spool,
            evaluator=self.reader,  # type: ignore[arg-type]
            show=self.lines.append,
        )

    def start(self, step: int) -> None:
        """Moves the state to a step, and starts to keep it."""
        self.state.step = step
        self.state.moco.queue.keys.fill_(step)
        self.writer.keep(self.state)

    def keep(self, *steps: int) -> None:
        """Keeps the state at each step, and waits for the last one."""
        for step in steps:
            self.start(step)
        self.writer.finish(steps[-1])

    def warnings(self) -> list[str]:
        return [line for line in self.lines if line.startswith("warning: ")]


def scored(value: float) -> Score:
    return Score("label-free", "these clips", value, value - 0.1, value + 0.1, "chance 10 %")


def fresh() -> TrainState:
    return TrainState(SETTINGS, manifest_hash="data", device=CPU)


def test_last_and_best_are_kept(tmp_path: Path) -> None:
    """Of six, the two newest and the best-scored one are kept; folders, list, scores and tracker agree.

    Each checkpoint is shown and offered to the evaluator once.
    """
    run = Run(tmp_path)
    for step, value in ((10, 0.2), (20, 0.9), (30, 0.5), (40, 0.1), (50, 0.3), (60, 0.0)):
        run.keep(step)
        run.folder.add_score(step, scored(value))
    run.writer.close()
    rows = json.loads((tmp_path / CHECKPOINTS).read_text())
    assert [(row["step"], row["score"]["value"]) for row in rows] == [(20, 0.9), (50, 0.3), (60, 0.0)]
    assert rows[0]["score"]["evaluation_set"] == "these clips"
    assert run.folder.steps() == [20, 50, 60]
    assert all(storage.file_sha256(f"{row['uri']}/{STATE_TENSORS}") == row["sha256"] for row in rows)
    assert run.spool.close() == ""
    assert json.loads(run.tracker.documents[CHECKPOINTS]) == rows
    assert run.reader.offered == [10, 20, 30, 40, 50, 60]
    assert [line.split(" kept in ")[0] for line in run.lines] == [
        f"checkpoint of step {step}" for step in run.reader.offered
    ]


def test_a_last_score_decides_too(tmp_path: Path) -> None:
    """The score of the last checkpoint comes after it was published: the former best one is then deleted."""
    run = Run(tmp_path, keep_checkpoints=1)
    run.keep(10)
    run.folder.add_score(10, scored(0.3))
    run.keep(20)
    assert run.folder.steps() == [10, 20]
    run.folder.add_score(20, scored(0.8))
    run.writer.close()
    assert run.folder.steps() == [20]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`keep` returns before a byte is written, and what is written is the state of that moment."""
    gate, publish = threading.Event(), storage.publish

    def slow(path: Path, uri: str) -> None:
        assert gate.wait(20)
        publish(path, uri)

    monkeypatch.setattr(storage, "publish", slow)
    run = Run(tmp_path)
    run.start(10)
    assert run.folder.steps() == []
    assert run.writer.is_writing()
    run.state.moco.queue.keys.fill_(-1)
    gate.set()
    run.writer.finish(10)
    restored = fresh()
    assert run.folder.resume(restored) is not None
    assert torch.equal(restored.moco.queue.keys, torch.full_like(restored.moco.queue.keys, 10))


def test_unsent_points_are_on_disk_before_the_checkpoint_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed the moment the checkpoint appears has lost no point: spool.json is already there."""
    run, publish = Run(tmp_path), storage.publish
    run.tracker.down = True
    run.spool.points({"loss": 3.0}, step=10)
    on_disk: list[bool] = []

    def watched(path: Path, uri: str) -> None:
        on_disk.append("loss" in (tmp_path / "spool.json").read_text())
        publish(path, uri)

    monkeypatch.setattr(storage, "publish", watched)
    run.keep(10)
    assert on_disk == [True, True, True]


def test_a_full_disk_costs_one_checkpoint_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shown and leaves nothing half-written, and the last one stays complete; at the end of a run it is an error.

    The next checkpoint is kept.
    """
    run = Run(tmp_path)
    run.keep(10)

    def full(path: Path, uri: str) -> None:
        raise ValueError(f"cannot write {uri}: {os.strerror(errno.ENOSPC)}")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "publish", full)
        run.start(20)
        with pytest.raises(ValueError, match=r"step 20 could not be kept \(.*No space left.*resume from step 10"):
            run.writer.finish(20)
    (warning,) = run.warnings()
    assert warning.startswith("warning: a checkpoint was not kept: cannot write ")
    assert run.writer.num_failed == 1
    assert run.folder.steps() == [10]
    assert list(tmp_path.glob(".*")) == []
    run.keep(30)
    found = run.folder.resume(fresh())
    assert found is not None
    assert found.record.step == 30


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_failed_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one counts as kept; the failure is a warning, and the next checkpoint deletes the old one."""
    run = Run(tmp_path, keep_checkpoints=1, keep_best=0)
    run.keep(10)

    def refused(uri: str) -> None:
        raise PermissionError(f"{uri} is busy")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "delete_folder", refused)
        run.keep(20)
    assert run.writer.num_failed == 0
    (warning,) = run.warnings()
    assert "step-00000010 could not be deleted" in warning
    assert [row["step"] for row in json.loads((tmp_path / CHECKPOINTS).read_text())] == [20]
    assert run.folder.steps() == [10, 20]
    run.keep(30)
    assert run.folder.steps() == [30]
    assert len(run.warnings()) == 1


def test_a_group_that_was_cut_off_writes_nothing(tmp_path: Path) -> None:
    """Another group claims the folder between two checkpoints: the first one raises and changes nothing."""
    run = Run(tmp_path)
    run.keep(10)
    before = (tmp_path / CHECKPOINTS).read_bytes()
    RunFolder(str(tmp_path)).claim(lease="this job")
    run.start(20)
    with pytest.raises(FencedError):
        run.writer.finish(20)
    with pytest.raises(FencedError):
        run.folder.add_score(10, scored(1.0))
    run.writer.close()
    assert run.folder.steps() == [10]
    assert (tmp_path / CHECKPOINTS).read_bytes() == before


def test_a_group_that_is_cut_off_while_it_writes_shows_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other group claims the folder when the tensors are written: the folder never becomes a checkpoint."""
    run, sha256 = Run(tmp_path), storage.file_sha256

    def claimed(uri: str) -> str:
        if "/step-" in uri:
            RunFolder(str(tmp_path)).claim(lease="this job")
        return sha256(uri)

    monkeypatch.setattr(storage, "file_sha256", claimed)
    run.start(10)
    with pytest.raises(FencedError):
        run.writer.finish(10)
    assert run.folder.steps() == []


def test_a_checkpoint_in_use_is_not_deleted(tmp_path: Path) -> None:
    """It stays while the evaluator reads it, and goes with the next checkpoint after that."""
    run = Run(tmp_path, keep_checkpoints=1, keep_best=0)
    run.keep(10)
    run.reader.reading = {10}
    run.keep(20)
    assert run.folder.steps() == [10, 20]
    run.reader.reading = set()
    run.keep(30)
    assert run.folder.steps() == [30]


def test_storage_that_changes_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read back must be what was written; otherwise it is no checkpoint."""
    run, publish = Run(tmp_path), storage.publish

    def faulty(path: Path, uri: str) -> None:
        if path.name == STATE_TENSORS:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        publish(path, uri)

    monkeypatch.setattr(storage, "publish", faulty)
    run.start(10)
    with pytest.raises(ValueError, match="reads back as something else than was written"):
        run.writer.finish(10)
    assert run.folder.steps() == []
