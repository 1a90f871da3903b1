"""Checkpoints are written behind training's back, whole or not at all; the last and the best stay, and one is found."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_step import CPU, changed
from vmoco import storage
from vmoco.encoders.promotion import Score
from vmoco.presets import PRESETS
from vmoco.train.checkpoints import LIST, Checkpoints, Kept
from vmoco.train.lease import FencedError
from vmoco.train.resume import DAMAGED, resume, steps, uri_of
from vmoco.train.state import RECORD, TENSORS, TrainState, file_sha256

SETTINGS = changed(PRESETS["tiny"][1], train={"steps": 100}, generator={"start_percent": 100})


class Keeper:
    """A state and the checkpoints of its run, and what they said."""

    def __init__(self, folder: Path, may_write: Callable[[], None] = lambda: None, **options: Any) -> None:
        self.folder = folder
        self.state = TrainState(SETTINGS, manifest_hash="data", device=CPU)
        for parameter in self.state.moco.query.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.state.query_optimizer.step()  # an optimizer makes its slots in its first step
        self.lists: list[list[Kept]] = []
        self.said: list[str] = []
        self.before: list[int] = []
        self.checkpoints = Checkpoints(
            str(folder),
            run_id="a run",
            **{"keep": 2, "keep_best": 1} | options,
            may_write=may_write,
            before=self.before.append,
            changed=self.lists.append,
            failed=self.said.append,
        )

    def keep(self, step: int) -> None:
        """Moves the state on and keeps it."""
        self.state.step = step
        self.state.moco.queue.keys.fill_(step)
        self.checkpoints.keep(self.state)

    def keep_all(self, *numbers: int) -> None:
        for step in numbers:
            self.keep(step)
        self.checkpoints.finish(numbers[-1])


def scored(value: float) -> Score:
    return Score("label-free", "these clips", value, value - 0.1, value + 0.1, "chance 10 %")


def fresh() -> TrainState:
    return TrainState(SETTINGS, manifest_hash="data", device=CPU)


def test_last_and_best_stay(tmp_path: Path) -> None:
    """Of six, the two newest and the best-scored one are kept, with folders, list and scores that say the same."""
    keeper = Keeper(tmp_path)
    for step, value in ((10, 0.2), (20, 0.9), (30, 0.5), (40, 0.1), (50, 0.3), (60, 0.0)):
        keeper.keep_all(step)
        keeper.checkpoints.score(step, scored(value))
    keeper.checkpoints.close()
    rows = json.loads((tmp_path / LIST).read_text())
    assert [(row["step"], row["score"]["value"]) for row in rows] == [(20, 0.9), (50, 0.3), (60, 0.0)]
    assert rows[0]["score"]["evaluation_set"] == "these clips"
    assert steps(str(tmp_path)) == [20, 50, 60]
    assert all(file_sha256(Path(row["uri"], TENSORS)) == row["sha256"] for row in rows)
    assert keeper.before == [10, 20, 30, 40, 50, 60]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`keep` returns before a byte is written, and what is written is the state of then, not of now."""
    gate, publish = threading.Event(), storage.publish

    def slow(path: Path, uri: str) -> None:
        assert gate.wait(20)
        publish(path, uri)

    monkeypatch.setattr(storage, "publish", slow)
    keeper = Keeper(tmp_path)
    keeper.keep(10)
    assert steps(str(tmp_path)) == []
    keeper.state.moco.queue.keys.fill_(-1)
    gate.set()
    keeper.checkpoints.finish(10)
    restored = fresh()
    assert resume(str(tmp_path), restored) is not None
    assert torch.equal(restored.moco.queue.keys, torch.full_like(restored.moco.queue.keys, 10))


@pytest.mark.parametrize("damage", ["flip", "cut", "no tensors", "no record", "half a record"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    """Whatever is broken, the one before is taken; it is said and counted, and the damaged one is asked no more."""
    keeper = Keeper(tmp_path)
    keeper.keep_all(10, 20)
    folder = Path(uri_of(str(tmp_path), 20))
    content = (folder / TENSORS).read_bytes()
    if damage == "flip":
        (folder / TENSORS).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "cut":
        (folder / TENSORS).write_bytes(content[: len(content) // 2])
    elif damage == "no tensors":
        (folder / TENSORS).unlink()
    elif damage == "no record":
        (folder / RECORD).unlink()
    else:
        (folder / RECORD).write_text((folder / RECORD).read_text()[:40])
    state = fresh()
    found = resume(str(tmp_path), state)
    assert found is not None
    assert (found.record.step, state.step) == (10, 10)
    if damage == "no record":  # never finished, so nothing is wrong
        assert found.damaged == []
        return
    assert len(found.damaged) == 1
    assert "step-00000020" in found.damaged[0]
    assert (folder / DAMAGED).exists()
    again = resume(str(tmp_path), fresh())
    assert again is not None
    assert again.damaged == []


def test_no_whole_checkpoint_is_an_error_and_no_new_beginning(tmp_path: Path) -> None:
    """A run whose checkpoints are all broken is not silently begun anew; one that has none is."""
    assert resume(str(tmp_path), fresh()) is None
    Keeper(tmp_path).keep_all(10)
    Path(uri_of(str(tmp_path), 10), TENSORS).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*step-00000010 has no state\.safetensors"):
        resume(str(tmp_path), fresh())


def test_a_checkpoint_of_other_settings_is_no_damage(tmp_path: Path) -> None:
    """It is refused, though an older one would fit."""
    Keeper(tmp_path).keep_all(10)
    other = TrainState(changed(SETTINGS, moco={"temperature": 0.2}), manifest_hash="data", device=CPU)
    other.step = 20
    Path(uri_of(str(tmp_path), 20)).mkdir()
    other.save(Path(uri_of(str(tmp_path), 20)))
    with pytest.raises(ValueError, match=r"moco\.temperature 0\.2 -> 0\.07"):
        resume(str(tmp_path), fresh())


def test_a_full_disk_costs_one_checkpoint_and_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, leaves nothing half-written and the last one whole; at the end of a run it is an error."""
    keeper = Keeper(tmp_path)
    keeper.keep_all(10)

    def full(path: Path, uri: str) -> None:
        raise ValueError(f"cannot write {uri}: {os.strerror(errno.ENOSPC)}")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "publish", full)
        keeper.keep(20)
        with pytest.raises(ValueError, match=r"step 20 could not be kept \(.*No space left.*go on from step 10"):
            keeper.checkpoints.finish(20)
    assert len(keeper.said) == 1 == keeper.checkpoints.num_failed
    assert steps(str(tmp_path)) == [10]
    assert list(tmp_path.glob(".*")) == []
    keeper.keep_all(30)
    found = resume(str(tmp_path), fresh())
    assert found is not None
    assert found.record.step == 30


def test_a_group_that_was_cut_off_writes_nothing(tmp_path: Path) -> None:
    """Fenced between two checkpoints, it ends with the sentence; folder and list stay as the other group left them."""
    allowed = [True]

    def may_write() -> None:
        if not allowed[0]:
            raise FencedError("others write to this run now")

    keeper = Keeper(tmp_path, may_write)
    keeper.keep_all(10)
    before = (tmp_path / LIST).read_bytes()
    allowed[0] = False
    keeper.keep(20)
    with pytest.raises(FencedError):
        keeper.checkpoints.finish(20)
    assert steps(str(tmp_path)) == [10]
    assert (tmp_path / LIST).read_bytes() == before


def test_a_checkpoint_that_is_looked_at_is_not_removed(tmp_path: Path) -> None:
    """Held, it outlives its turn, and goes with the next list after it was let go."""
    keeper = Keeper(tmp_path, keep=1, keep_best=0)
    keeper.keep_all(10)
    with keeper.checkpoints.hold(10):
        keeper.keep_all(20)
        assert steps(str(tmp_path)) == [10, 20]
    keeper.keep_all(30)
    assert steps(str(tmp_path)) == [30]


def test_a_resumed_list_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    """Scores stay, later rows go, and what a kill has left half-written is cleared away."""
    keeper = Keeper(tmp_path, keep=3)
    keeper.keep_all(10, 20, 30)
    keeper.checkpoints.score(20, scored(0.5))
    keeper.checkpoints.close()
    (tmp_path / ".step-40.x.tmp").mkdir()
    again = Keeper(tmp_path, keep=3)
    assert [(row.step, row.score) for row in again.checkpoints.resumed(20)] == [(10, None), (20, scored(0.5))]
    assert not (tmp_path / ".step-40.x.tmp").exists()
    assert [(row.step, row.score) for row in Keeper(tmp_path).checkpoints.resumed(30)][-1] == (30, None)
