"""The slowest rank, and the one that waits most for data, are found by name although all steps take equally long."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from tests.dataset import make_data_set
from tests.ranks import run_on_ranks
from tests.train.test_loop import SETTINGS, Notes
from tests.train.test_step import CPU, changed
from vmoco.data.manifest import Manifest
from vmoco.train import distributed
from vmoco.train import loop as module
from vmoco.train.loop import train
from vmoco.train.rank_times import OwnTime, RankTimes, Times
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep

SLEEP = 0.15


def train_with_a_slow_rank(uri: str, slow: int) -> tuple[dict[int, dict[str, float]], list[str], str]:
    """Six steps in which one rank sleeps before it encodes: the points, lines and ranks.json of this rank."""

    class SlowStep(TrainStep):
        def _augmented(self, view, micro):  # type: ignore[no-untyped-def]
            time.sleep(SLEEP if distributed.rank() == slow else 0)
            return super()._augmented(view, micro)

    module.TrainStep = SlowStep  # type: ignore[misc]
    settings, manifest = changed(SETTINGS, train={"steps": 6, "checkpoint_every": 6}), Manifest.load(uri)
    host = Notes()
    train(settings, manifest, TrainState(settings, manifest_hash=manifest.hash, device=CPU), device=CPU, host=host)
    return host.points, host.lines, str(host.documents.get("ranks.json"))


def test_a_slow_rank_is_found_although_all_wait_for_it(tmp_path: Path) -> None:
    """Rank 1 sleeps twice in a step: its own work is longer by that, and rank 0, which waits as long, is not blamed."""
    make_data_set(tmp_path)
    (points, lines, document), (other, _, nothing) = run_on_ranks(2, train_with_a_slow_rank, str(tmp_path), 1)
    last = points[6]
    assert last["slowest_rank"] == 1
    assert 2 * SLEEP < last["slowest_step_seconds"] < 4 * SLEEP
    assert last["median_step_seconds"] < last["slowest_step_seconds"] - 0.9 * SLEEP
    assert 0 <= last["most_data_wait_share"] < 1
    assert f"rank 1 on {socket.gethostname()} is " in lines[-1]
    assert lines[-1].endswith("times slower than the others")
    rows = json.loads(document)["ranks"]
    assert [(row["rank"], row["host"]) for row in rows] == [(0, socket.gethostname()), (1, socket.gethostname())]
    assert rows[1]["step_seconds"] == last["slowest_step_seconds"] > rows[0]["step_seconds"] + SLEEP
    assert (other[6], nothing) == ({}, "None"), "the first rank alone reports"


def test_a_rank_alone_reports_itself_and_no_remark() -> None:
    """One process exchanges nothing."""
    ranks = RankTimes(5)
    numbers = ranks.compare(own_seconds=3.0, waited_seconds=0.0, step=7)
    assert numbers["slowest_step_seconds"] == numbers["median_step_seconds"] == 1.5
    assert numbers["slowest_rank"] == numbers["most_data_wait_rank"] == 0
    assert ranks.remarks() == []


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([Times(1.0, 0.0), Times(1.1, 0.05), Times(1.0, 0.0)], []),
        ([Times(1.0, 0.0), Times(1.0, 0.0), Times(3.0, 0.0)], ["rank 2 on c is 3.0 times slower than the others"]),
        ([Times(1.0, 0.0), Times(1.0, 0.4), Times(1.0, 0.0)], ["rank 1 on b waits for data 40% of the time"]),
        # All wait alike: the number that is always in the line says it.
        ([Times(1.0, 0.4), Times(1.0, 0.4), Times(1.0, 0.4)], []),
    ],
)
def test_a_line_names_what_stands_out(times: list[Times], said: list[str]) -> None:
    """A rank beside others that are alike, and nothing where all are."""
    ranks = RankTimes(0)
    ranks._hosts, ranks._newest = ["a", "b", "c"], times
    assert ranks.remarks() == said


def test_time_is_added_up_between_begin_and_end() -> None:
    """A second `end` adds nothing, and `take` starts again at zero."""
    clock = OwnTime(CPU)
    clock.begin()
    time.sleep(0.05)
    clock.end()
    time.sleep(0.05)
    clock.end()
    assert 0.05 <= clock.take() < 0.1
    assert clock.take() == 0
