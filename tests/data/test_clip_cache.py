"""Remote clips are fetched by their range, once for a node, checked, and kept within the bound."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest

from tests.dataset import make_data_set
from vmoco import storage
from vmoco.data import shard_reader
from vmoco.data.clip_cache import ClipCache
from vmoco.data.frames import Frames
from vmoco.data.manifest import Manifest
from vmoco.data.shard import ShardReader
from vmoco.data.shard_reader import ClipReader


def content_of(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def put(cache: ClipCache, number: int, size: int = 1000) -> bool:
    """Asks for a clip; returns whether it had to be fetched."""
    content = content_of(number, size)
    fetched: list[int] = []

    def fetch() -> bytes:
        fetched.append(number)
        return content

    assert cache.get(hashlib.sha256(content).hexdigest(), fetch=fetch).read_bytes() == content
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


def test_what_a_killed_process_left_is_counted(tmp_path: Path) -> None:
    """By a wrong account the cache is full: then the files themselves are counted, and the account is right again."""
    cache = ClipCache(tmp_path, max_bytes=10_000)
    for number in range(9):
        put(cache, number)
    (tmp_path / "size").write_text("100000")
    assert put(cache, 20)
    assert int((tmp_path / "size").read_text()) == cache.size() == 9000


def test_a_clip_above_the_bound_is_an_error(tmp_path: Path) -> None:
    """The sentence names the setting."""
    with pytest.raises(ValueError, match=r"--data\.cache .* may hold 0\.000 GiB, less than one file of 1000 bytes"):
        put(ClipCache(tmp_path, max_bytes=500), 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache .*file cannot be used"):
        ClipCache(tmp_path / "file", max_bytes=500)


class Remote:
    """The files of this machine as if they were far away; counts what is read, and may let reads meet."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.meet = threading.Barrier(1)

    def open_input_file(self, path: str) -> Any:
        file = pafs.LocalFileSystem().open_input_file(path.removeprefix("bucket"))
        remote = self

        class Counted:
            def read_at(self, num_bytes: int, offset: int) -> bytes:
                remote.meet.wait(timeout=10)
                remote.bytes_read += num_bytes
                content: bytes = file.read_at(num_bytes, offset)
                return content

        return Counted()


Far = tuple[Manifest, Remote, list[Frames]]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Far:
    """A data set whose shards answer as remote ones do, and the pixels of all its clips."""
    manifest = make_data_set(tmp_path / "data")
    expected = [
        ShardReader(manifest.shard_uri(row["shard"])).frames(row["row"]).copy() for row in manifest.table.to_pylist()
    ]
    far = Remote()
    monkeypatch.setattr(shard_reader.storage, "filesystem", lambda uri: (far, storage.absolute_uri(uri)))
    return manifest, far, expected


def test_clips_are_read_by_range_and_once(remote: Far, tmp_path: Path) -> None:
    """All clips have the pixels of their shards; exactly their bytes are fetched, and a second reader fetches none."""
    manifest, far, expected = remote
    cache = ClipCache(tmp_path / "cache", max_bytes=2**30)
    for _ in range(2):
        reader = ClipReader(manifest, manifest.table, cache=cache)
        for clip, frames in enumerate(expected):
            assert np.array_equal(reader.frames(clip), frames)
    assert far.bytes_read == sum(manifest.table["num_bytes"].to_pylist()) == cache.size()


def test_remote_clips_are_fetched_side_by_side(remote: Far, tmp_path: Path) -> None:
    """Eight are on their way at once, or none comes back; they arrive in the order in which they were asked for."""
    manifest, far, expected = remote
    far.meet = threading.Barrier(8)
    reader = ClipReader(manifest, manifest.table, cache=ClipCache(tmp_path / "cache", max_bytes=2**30))
    clips = [5, 0, 23, 7, 11, 2, 17, 8]
    for clip, frames in zip(clips, reader.several(clips), strict=True):
        assert np.array_equal(frames, expected[clip])


def test_a_flipped_byte_is_named_by_shard_and_clip(tmp_path: Path) -> None:
    """One byte of one clip in a local shard: that clip is an error when it is read first, all others are read."""
    manifest = make_data_set(tmp_path)
    row = manifest.table.slice(5, 1).to_pylist()[0]
    shard = Path(manifest.shard_uri(row["shard"]))
    content = bytearray(shard.read_bytes())
    content[row["offset"] + 100] ^= 1
    shard.write_bytes(content)
    reader = ClipReader(manifest, manifest.table, cache=None)
    for clip in range(manifest.table.num_rows):
        if clip != 5:
            reader.frames(clip)
    with pytest.raises(ValueError, match=rf"clip {row['clip_id']} of shard .*{shard.name} is damaged"):
        reader.frames(5)


def test_damage_is_never_taken_into_the_cache(remote: Far, tmp_path: Path) -> None:
    """A clip that arrives damaged is an error and no file; one that is damaged on this disk is fetched again."""
    manifest, _, expected = remote
    row = manifest.table.slice(5, 1).to_pylist()[0]
    shard = Path(manifest.shard_uri(row["shard"]))
    whole = shard.read_bytes()
    content = bytearray(whole)
    content[row["offset"]] ^= 1
    shard.write_bytes(content)
    cache = ClipCache(tmp_path / "cache", max_bytes=2**30)
    with pytest.raises(ValueError, match=rf"clip {row['clip_id']} of shard .* is damaged: the .* bytes that were fet"):
        ClipReader(manifest, manifest.table, cache=cache).frames(5)
    assert cache.size() == 0
    shard.write_bytes(whole)
    ClipReader(manifest, manifest.table, cache=cache).frames(5)
    (kept,) = (tmp_path / "cache").glob("??/*")
    kept.write_bytes(os.urandom(row["num_bytes"]))
    assert np.array_equal(ClipReader(manifest, manifest.table, cache=cache).frames(5), expected[5])
    assert cache.size() == row["num_bytes"]
