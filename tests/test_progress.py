"""Progress lines."""

from __future__ import annotations

from typing import Any

import pytest

from vmoco.progress import Progress, clock_text


class Job:
    """A progress with a clock that stands still until the test moves it, and its lines."""

    def __init__(self, title: str, **options: Any) -> None:
        self.now, self.lines = 100.0, list[str]()
        self.progress = Progress(self.lines.append, title, clock=lambda: self.now, **options)

    def add(self, done: int = 1, *, after: float, **options: Any) -> None:
        self.now += after
        self.progress.add(done, **options)


def test_lines_come_at_most_once_a_second_and_at_the_end() -> None:
    """Lines are a second apart, and the last one comes when everything is done, however early."""
    job = Job("ingest  cut", total=130, unit="videos", counts=["rejected", "clips"], rate="clips", total_work=1300)
    job.add(10, after=0.0, work=100, clips=90, reused=True)
    for _ in range(5):
        job.add(1, after=0.4, work=10, rejected=1, clips=4)
    assert job.lines == ["ingest  cut 13/130 videos  rejected 3  clips 102  10.0 clips/s  0:46 left"]
    job.add(115, after=0.1, work=1150)
    assert job.lines[1:] == ["ingest  cut 130/130 videos  rejected 5  clips 110  9.5 clips/s  0:00 left"]


def test_things_are_the_work_and_the_rate_where_nothing_else_is_given() -> None:
    """The time left follows from the number of things, and hours are printed as hours."""
    job = Job("check  read", total=3601, unit="shards", counts=["wrong"], every_seconds=3.0)
    job.add(after=2.9)
    assert job.lines == []
    job.add(9, after=17.1, wrong=2)
    assert job.lines == ["check  read 10/3601 shards  wrong 2  0.5 shards/s  1:59:42 left"]


def test_what_was_reused_tells_no_time() -> None:
    """Before anything new is done there is no estimate; when all of it was there, nothing is left."""
    job = Job("embed  made", total=2, unit="parts")
    job.add(after=5, reused=True)
    job.add(after=5, reused=True)
    assert job.lines == ["embed  made 1/2 parts  0.0 parts/s", "embed  made 2/2 parts  0.0 parts/s  0:00 left"]


def test_a_count_that_was_not_announced_is_a_mistake() -> None:
    """A count has its place in the line from the start."""
    with pytest.raises(KeyError):
        Job("embed  made", total=2, unit="parts").add(after=0, clips=1)
    with pytest.raises(AssertionError):
        Job("embed  made", total=2, unit="parts", rate="clips")


def test_durations() -> None:
    """Minutes and seconds, with hours where there are some."""
    assert [clock_text(seconds) for seconds in (0, 59.9, 725, 11_220)] == ["0:00", "0:59", "12:05", "3:07:00"]
