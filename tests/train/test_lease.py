"""One job at a time trains a run, and of its workers the latest group alone writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vmoco.train import lease as module
from vmoco.train.lease import LEASE, Fence, FencedError, Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat every tenth of a second, and two seconds until a job that does not beat is taken for dead."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "STILL_SECONDS", 2.0)
    monkeypatch.setattr(module, "_SETTLE_SECONDS", 0.1)


def lease(folder: Path, said: list[str] | None = None) -> Lease:
    said = [] if said is None else said
    return Lease(str(folder), on_lost=said.append, show=said.append)


def test_a_second_job_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    """It says who trains the run; after the first has ended, it may."""
    with lease(tmp_path):
        with pytest.raises(ValueError, match=rf"is being trained by process {os.getpid()} on .*: stop that job first"):
            lease(tmp_path).__enter__()
        with lease(tmp_path.parent / "another run"):
            pass
    assert not (tmp_path / LEASE).exists()
    with lease(tmp_path):
        pass


def test_a_killed_job_is_followed_at_once(tmp_path: Path) -> None:
    """On the same machine a job that is no more is known to be, although its lease is still there."""
    code = (
        "import sys, time\nfrom vmoco.train.lease import Lease\n"
        "with Lease(sys.argv[1], on_lost=print, show=print): print('held', flush=True); time.sleep(60)"
    )
    job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "held\n"
    os.kill(job.pid, signal.SIGKILL)
    time.sleep(0.2)  # not waited for: it is a zombie, as below a parent that is busy
    began = time.monotonic()
    with lease(tmp_path):
        assert time.monotonic() - began < 1
    job.wait()


def test_a_job_on_another_machine_is_followed_when_its_beat_stands_still(tmp_path: Path) -> None:
    """Nobody can ask for its process, so its beat is watched for a while."""
    holder = {"token": "other", "beat": 7, "host": "elsewhere", "pid": 1, "machine": "other"}
    (tmp_path / LEASE).write_text(json.dumps(holder))
    said: list[str] = []
    began = time.monotonic()
    with lease(tmp_path, said):
        assert 2 <= time.monotonic() - began < 6
    assert "process 1 on elsewhere" in said[0]


def test_a_job_that_lost_its_run_is_told(tmp_path: Path) -> None:
    """As when its machine slept for long: the sentence comes with the next beat, and the other's lease stays."""
    said: list[str] = []
    with lease(tmp_path, said):
        other = {"token": "other", "beat": 1, "host": "elsewhere", "pid": 1, "machine": "other"}
        (tmp_path / LEASE).write_text(json.dumps(other))
        end = time.monotonic() + 5
        while not said and time.monotonic() < end:
            time.sleep(0.05)
    assert "process 1 on elsewhere" in said[0]
    assert json.loads((tmp_path / LEASE).read_text())["token"] == "other"


def test_of_two_jobs_at_once_one_wins(tmp_path: Path) -> None:
    """Started in the same moment, one trains and the other is refused."""
    outcomes: list[str] = []
    meet = threading.Barrier(2)

    def start() -> None:
        meet.wait()
        try:
            with lease(tmp_path):
                outcomes.append("holds")
                time.sleep(1)
        except ValueError:
            outcomes.append("refused")

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["holds", "refused"]


def test_a_later_group_of_workers_fences_the_earlier_one(tmp_path: Path) -> None:
    """A rank that was cut off and lives on finds out before it writes; a group of another job never begins."""
    with lease(tmp_path) as held:
        first = Fence(str(tmp_path), lease=held.token)
        first.check()
        second = Fence(str(tmp_path), lease=held.token)
        second.check()
        with pytest.raises(FencedError, match=r"writes to this run now: these workers were cut off"):
            first.check()
        with pytest.raises(FencedError, match=r"is being trained by process"):
            Fence(str(tmp_path), lease="another job")
