"""Threads are as many as the cores that a process is given, and ranks of one node share them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.dataset import make_data_set
from vmoco.data import check
from vmoco.data.cores import own_cores
from vmoco.data.shard_reader import ClipReader


@pytest.mark.parametrize(
    ("given", "ranks", "cores"),
    [(16, None, 16), (16, "1", 16), (16, "8", 2), (15, "8", 1), (4, "8", 1), (1, None, 1), (6, "", 6), (6, "0", 6)],
)
def test_ranks_share_the_cores_of_a_node(
    monkeypatch: pytest.MonkeyPatch, given: int, ranks: str | None, cores: int
) -> None:
    """Not those of the machine: a container may have a few of 256. Without an affinity, as on macOS, all count."""
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(given)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert own_cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: given)
    assert own_cores() == cores


@pytest.mark.parametrize(("given", "ranks", "threads"), [(64, "1", 8), (64, "16", 4), (2, "1", 2), (2, "2", 1)])
def test_a_reader_takes_no_more_threads_than_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int, ranks: str, threads: int
) -> None:
    """Eight at most; one reads without a pool; a number that is asked for is taken."""
    manifest = make_data_set(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(given)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    pool = ClipReader.of(manifest)._pool
    assert (pool._max_workers if pool else 1) == threads
    asked = ClipReader.of(manifest, threads=3)._pool
    assert asked is not None
    assert asked._max_workers == 3


def test_the_check_of_a_data_set_takes_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the process is given, not those of the machine."""
    manifest, pools = make_data_set(tmp_path), list[int]()

    def pool(threads: int) -> ThreadPoolExecutor:
        pools.append(threads)
        return ThreadPoolExecutor(threads)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    monkeypatch.setattr(check, "ThreadPoolExecutor", pool)
    assert check.check(manifest.uri) == []
    assert pools == [5]
