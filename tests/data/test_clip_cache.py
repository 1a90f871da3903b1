"""The cache of a node keeps each clip once, for all its processes, within the bound."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmoco.data.clip_cache import ClipCache


def content_of(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def put(cache: ClipCache, number: int, size: int = 1000) -> bool:
    """Asks for a clip; returns whether it had to be fetched."""
    content = content_of(number, size)
    fetched: list[int] = []

    def fetch() -> bytes:
        fetched.append(number)
        return content

    assert cache.read(hashlib.sha256(content).hexdigest(), fetch=fetch) == content
    return bool(fetched)


def test_those_not_read_for_longest_go_first(tmp_path: Path) -> None:
    """With room for ten, the eleventh removes the oldest but those that were read again meanwhile."""
    cache = ClipCache(tmp_path, max_bytes=10_000)
    for number in range(10):
        assert put(cache, number)
        time.sleep(0.01)  # times of files are what they go by
    assert not put(cache, 0)
    assert put(cache, 10)
    assert cache.size() <= 10_000
    assert not put(cache, 0)
    assert put(cache, 1)


def fill(folder: str, seed: int) -> int:
    """Asks for 300 of 60 clips; returns the most that the cache ever held."""
    cache, most = ClipCache(Path(folder), max_bytes=20_000), 0
    for number in np.random.default_rng(seed).integers(0, 60, 300):
        put(cache, int(number))
        most = max(most, cache.size())
    return most


def test_several_processes_share_it(tmp_path: Path) -> None:
    """Three fill it at once, with three times the clips that fit: each gets the right bytes, and the bound holds."""
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        most = pool.starmap(fill, [(str(tmp_path), seed) for seed in range(3)])
    assert max(most) <= 20_000
    assert not list(tmp_path.glob("??/.*.tmp"))


def test_a_clip_that_another_process_removes_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed just before the file is opened, it is fetched again; removed after that, its bytes stay readable."""
    cache, content = ClipCache(tmp_path, max_bytes=10_000), content_of(1)
    name = hashlib.sha256(content).hexdigest()
    put(cache, 1)
    mapped = cache.read(name, fetch=lambda: pytest.fail("it is there"))
    touch = os.utime

    def touch_and_remove(path: Path, *times: Any) -> None:
        touch(path, *times)
        if path.name == name:
            cache.drop(name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", touch_and_remove)
        assert put(cache, 1)
    assert not put(cache, 1), "what was fetched again is kept"
    cache.drop(name)
    assert mapped == content


def test_what_a_killed_process_left_is_counted(tmp_path: Path) -> None:
    """A wrong total says that the cache is full: then the files are counted, and the total is right again."""
    cache = ClipCache(tmp_path, max_bytes=10_000)
    for number in range(9):
        put(cache, number)
    (tmp_path / "size").write_text("100000")
    assert put(cache, 20)
    assert int((tmp_path / "size").read_text()) == cache.size() == 9000


def test_a_clip_above_the_bound_is_an_error(tmp_path: Path) -> None:
    """The message names the setting."""
    with pytest.raises(ValueError, match=r"--data\.cache .* may hold 0\.000 GiB, less than one file of 1000 bytes"):
        put(ClipCache(tmp_path, max_bytes=500), 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--data\.cache .*file cannot be used"):
        ClipCache(tmp_path / "file", max_bytes=500)
