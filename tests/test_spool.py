"""A spool loses no point and sends none twice, whatever the tracker and the process do, and never waits."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from vmoco import spool as module
from vmoco.spool import Document, Points, RefusedError, Spool


class Notebook:
    """A tracker that records what it receives, and can be switched off."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, float, int]] = []
        self.documents: dict[str, Document] = {}
        self.down = False

    def latest_steps(self) -> dict[str, int]:
        self._answer()
        return {name: max(row[1] for row in self.rows if row[0] == name) for name, *_ in self.rows}

    def send(self, points: list[Points], documents: Mapping[str, Document]) -> None:
        self._answer()
        for row in points:
            for name, value in row.numbers.items():
                entry = (name, row.step, value, row.time_ms)
                if entry not in self.rows:  # as MLflow does
                    self.rows.append(entry)
        self.documents |= documents

    def _answer(self) -> None:
        if self.down:
            raise ConnectionError("nobody there")

    def steps(self, name: str) -> list[int]:
        return [step for found, step, *_ in self.rows if found == name]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once."""
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.02)


def wait_for(condition: object, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.01)


def test_what_was_not_taken_outlives_the_process(tmp_path: Path) -> None:
    """Saved with a checkpoint while the tracker is down, points and documents arrive from the next process, once.

    The first process dies without a word: nothing of it but the file is left.
    """
    tracker, file = Notebook(), str(tmp_path / "spool.json")
    first = Spool(tracker, name="t", uri=file)
    first.points({"loss": 3.0}, step=10)
    wait_for(lambda: tracker.steps("loss") == [10])
    tracker.down = True
    for step in (20, 30):
        first.points({"loss": 1.0 / step}, step=step)
    first.document("list.json", "two")
    first.document("sheet.png", bytes(range(256)))
    first.save()
    first.points({"loss": 0.1}, step=40)  # after the checkpoint of step 30: made again by the resumed run
    died = Notebook()
    died.rows, died.documents = list(tracker.rows), dict(tracker.documents)

    second = Spool(died, name="t", uri=file)
    for step in (40, 50):
        second.points({"loss": 1.0 / step}, step=step)
    assert second.close() == ""
    assert died.steps("loss") == [10, 20, 30, 40, 50]
    assert died.documents == {"list.json": "two", "sheet.png": bytes(range(256))}
    assert not Path(file).exists()


def test_points_that_are_made_again_are_sent_once(tmp_path: Path) -> None:
    """A run killed at 45 and resumed from 32 makes 35 to 45 again: the tracker keeps those of before, then goes on."""
    tracker = Notebook()
    first = Spool(tracker, name="t", uri=str(tmp_path / "spool.json"))
    for step in range(5, 50, 5):
        first.points({"loss": float(step), "accuracy": 0.5}, step=step)
    first.points({"score": 1.0}, step=16)
    assert first.close() == ""
    second = Spool(tracker, name="t", uri=str(tmp_path / "spool.json"))
    for step in range(35, 65, 5):
        second.points({"loss": float(step), "accuracy": 0.5}, step=step)
    second.points({"score": 2.0}, step=32)  # comes late, below the steps of the others, and is new all the same
    assert second.close() == ""
    assert tracker.steps("loss") == tracker.steps("accuracy") == list(range(5, 65, 5))
    assert tracker.steps("score") == [16, 32]


def test_points_by_the_clock_are_all_sent(tmp_path: Path) -> None:
    """Those of a run that repeats steps are new, with their own times; those that waited on disk arrive once."""
    tracker, file = Notebook(), str(tmp_path / "spool.json")
    first = Spool(tracker, name="t", uri=file)
    first.points({"cpu": 1.0}, step=40, time_ms=1000, once=True)
    wait_for(lambda: tracker.steps("cpu") == [40])
    tracker.down = True
    first.points({"cpu": 2.0}, step=40, time_ms=2000, once=True)
    first.save()
    died = Notebook()
    died.rows = [*tracker.rows, ("cpu", 40, 2.0, 2000)]  # the tracker took it after the file was written
    second = Spool(died, name="t", uri=file)
    second.points({"cpu": 3.0}, step=32, time_ms=3000, once=True)
    assert second.close() == ""
    assert died.rows == [("cpu", 40, 1.0, 1000), ("cpu", 40, 2.0, 2000), ("cpu", 32, 3.0, 3000)]


def test_a_tracker_that_is_down_costs_no_time(tmp_path: Path) -> None:
    """A thousand points are queued in no time; `close` gives up after its own, says where they are, and keeps them."""
    tracker = Notebook()
    tracker.down = True
    spool = Spool(tracker, name="the tracker", uri=str(tmp_path / "spool.json"))
    began = time.perf_counter()
    for step in range(1000):
        spool.points({"loss": 1.0}, step=step)
    assert time.perf_counter() - began < 0.5
    said = spool.close(timeout=0.1)
    assert (
        "1000 points or documents could not be sent to the tracker the tracker: ConnectionError: nobody there" in said
    )
    tracker.down = False
    assert Spool(tracker, name="t", uri=str(tmp_path / "spool.json")).close() == ""
    assert sorted(set(tracker.steps("loss"))) == list(range(1000))


def test_a_process_that_was_cut_off_sends_nothing(tmp_path: Path) -> None:
    """Another group of workers repeats this part of the run, so the old points do not count."""
    tracker = Notebook()

    def cut_off() -> None:
        raise RuntimeError("others write to this run now")

    spool = Spool(tracker, name="t", uri=str(tmp_path / "spool.json"), may_send=cut_off)
    spool.points({"loss": 1.0}, step=1)
    assert spool.close() == ""
    assert tracker.rows == []
    assert not (tmp_path / "spool.json").exists()


class Strict(Notebook):
    """Refuses for good a document that is too large, and a number whose name is not valid."""

    def send(self, points: list[Points], documents: Mapping[str, Document]) -> None:
        if any(len(content) > 100 for content in documents.values()):
            raise RefusedError("413 too large")
        if any("bad name" in row.numbers for row in points):
            raise RefusedError("400 not a valid name")
        super().send(points, documents)


def test_what_is_refused_for_good_blocks_nothing(tmp_path: Path) -> None:
    """It is reported once and kept in a separate file. All other points arrive, and `close` has nothing left."""
    tracker, warnings = Strict(), list[str]()
    spool = Spool(tracker, name="t", uri=str(tmp_path / "spool.json"), warn=warnings.append)
    spool.document("large.png", bytes(200))
    for step in (10, 20):
        spool.points({"loss": 1.0, "bad name": 2.0}, step=step)
    spool.document("small.json", "fits")
    assert spool.close() == ""
    assert tracker.steps("loss") == [10, 20]
    assert tracker.documents == {"small.json": "fits"}
    assert list(spool.set_aside) == ["the metric bad name", "the document large.png"]
    assert ["the metric bad name for good (400" in warnings[0], "large.png for good (413" in warnings[1]] == [True] * 2
    assert len(warnings) == 2, "a name that is refused at every step is reported once"
    refused = json.loads((tmp_path / "spool-refused.json").read_text())
    assert list(refused["files"]) == ["large.png"]
    assert [row[0] for row in refused["points"]] == [10, 20]
    assert not (tmp_path / "spool.json").exists()
