"""Clips are read by their ranges, local or remote: checked, decoded as far as asked for, with bounded resources."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import os
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import simplejpeg

from tests.data.test_shard import METADATA, clips
from tests.dataset import make_data_set, stored_clips, stored_frames, upload
from vmoco import storage
from vmoco.data import shard_reader
from vmoco.data.clip_cache import ClipCache, cache_for
from vmoco.data.frames import Encoding, Frames
from vmoco.data.manifest import Manifest
from vmoco.data.shard import ShardFile, write_shard
from vmoco.data.shard_reader import ClipReader, ShardScan


def flip(path: Path, place: int) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(params=["raw", "jpeg"])
def manifest(tmp_path: Path, request: pytest.FixtureRequest) -> Manifest:
    encoding: Encoding = request.param
    return make_data_set(tmp_path / "data", encoding=encoding)


@pytest.mark.parametrize("numbers", [None, range(2, 9, 3), [0, 4, 9], range(10)])
def test_frames_are_those_of_the_shard(manifest: Manifest, numbers: range | list[int] | None) -> None:
    """All frames of every clip or some of them, one by one and several at once, as Arrow and Pillow read them."""
    reader, expected = ClipReader.of(manifest), stored_clips(manifest)
    at = slice(None) if numbers is None else list(numbers)
    for clip, frames in enumerate(expected):
        np.testing.assert_array_equal(reader.frames(clip, numbers), frames[at])
    order = [5, 0, 23, 23, 7]
    for clip, frames in zip(order, reader.several(order, [numbers] * 5), strict=True):
        np.testing.assert_array_equal(frames, expected[clip][at])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_clip(manifest: Manifest, threads: int) -> None:
    """The same frames in the same order, on the first read, which hashes a clip, and on the second."""
    reader, expected = ClipReader.of(manifest, threads=threads), stored_clips(manifest)
    order = [*range(len(expected)), 3, 3, 0]
    for _ in range(2):
        for clip, frames in zip(order, reader.several(order, itertools.repeat(range(1, 10, 4))), strict=True):
            np.testing.assert_array_equal(frames, expected[clip][1:10:4])


def test_only_the_frames_that_are_asked_for_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three frames of ten are three JPEGs."""
    manifest = make_data_set(tmp_path, encoding="jpeg")
    decoded: list[int] = []
    decode = simplejpeg.decode_jpeg

    def counted(image: Any, *arguments: Any, **named: Any) -> Any:
        decoded.append(len(image))
        return decode(image, *arguments, **named)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    ClipReader.of(manifest).frames(3, range(1, 10, 4))
    assert len(decoded) == 3


def test_raw_frames_are_views_of_the_file(tmp_path: Path) -> None:
    """They are neither copied nor writable, and outlive the reader; an open shard takes no file descriptor."""
    manifest = make_data_set(tmp_path)
    expected = stored_clips(manifest)
    gc.collect()  # what other tests have left is not freed in between
    reader, descriptors, memory = ClipReader.of(manifest), len(os.listdir("/proc/self/fd")), pa.total_allocated_bytes()
    views = [reader.frames(clip, range(2, 8)) for clip in range(24)]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert pa.total_allocated_bytes() == memory
    del reader
    assert not any(view.flags.owndata or view.flags.writeable for view in views)
    for view, frames in zip(views, expected, strict=True):
        np.testing.assert_array_equal(view, frames[2:8])


def test_padding_is_cut_off(tmp_path: Path) -> None:
    """With `crop`, frames have the height and width of their picture."""
    manifest = make_data_set(tmp_path)
    column = pa.array([30] * manifest.table.num_rows, pa.int32())
    table = manifest.table.set_column(manifest.table.column_names.index("height"), "height", column)
    reader = ClipReader.of(manifest, table, crop=True)
    np.testing.assert_array_equal(reader.frames(4), stored_clips(manifest)[4][:, :30])


def many_shards(folder: Path, count: int) -> Manifest:
    """A data set of one clip a shard, all of them the same clip."""
    manifest = make_data_set(folder, num_videos=2, clips_per_video=1)
    row = manifest.table.slice(0, 1).to_pylist()[0]
    original, names = Path(manifest.shard_uri(row["shard"])), [f"many-{number:04d}" for number in range(count)]
    for name in names:
        os.link(original, manifest.shard_uri(name))
    shards = dict.fromkeys(names, manifest.shards[row["shard"]])
    table = pa.Table.from_pylist([row | {"shard": name} for name in names], schema=manifest.table.schema)
    return dataclasses.replace(manifest, shards=shards).with_table(table)


def num_maps(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(folder))


def test_more_shards_than_a_process_may_open(tmp_path: Path) -> None:
    """Of 300 shards 64 stay mapped, and a limit of files just above what is open now does not matter."""
    manifest = many_shards(tmp_path, 300)
    expected = stored_frames(manifest.shard_uri("many-0000"))[int(manifest.table["row"][0].as_py())].tobytes()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limit[1]))
    try:
        reader = ClipReader.of(manifest)
        for frames in reader.several(range(300)):
            assert frames.tobytes() == expected
            del frames
        assert num_maps(tmp_path) == shard_reader.MAX_OPEN == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.parametrize("name", ["raw", "jpeg"])
def test_a_flipped_bit_is_named_by_shard_and_clip(tmp_path: Path, name: Encoding) -> None:
    """One bit of one clip in a local shard: that clip is an error, and all others are read."""
    manifest = make_data_set(tmp_path, encoding=name)
    row = manifest.table.slice(5, 1).to_pylist()[0]
    shard = Path(manifest.shard_uri(row["shard"]))
    flip(shard, row["offset"] + 100)
    reader = ClipReader.of(manifest)
    for clip in range(manifest.table.num_rows):
        if clip != 5:
            reader.frames(clip)
    said = rf"clip {row['clip_id']} of shard .*{shard.name} is damaged: the SHA-256 of its .*; restore the shard"
    with pytest.raises(ValueError, match=said):
        reader.frames(5)
    with pytest.raises(ValueError, match=said):
        list(reader.several(range(24)))


def test_a_shard_that_is_not_as_it_was_is_an_error(tmp_path: Path) -> None:
    """Truncated with its size known or not, and missing; a shard that comes back is read again by the same reader."""
    manifest = make_data_set(tmp_path)
    row = manifest.table.slice(0, 1).to_pylist()[0]
    path = Path(manifest.shard_uri(row["shard"]))
    original = path.read_bytes()
    path.write_bytes(original[:-1])
    reader = ClipReader.of(manifest)
    with pytest.raises(
        ValueError, match=r"0000.arrow is truncated or was changed: \d+ bytes of \d+; restore the shard"
    ):
        reader.frames(0)
    path.write_bytes(original[: row["offset"] + 7])
    unsized = ClipReader(manifest.uri, manifest.table, frame_shape=manifest.frame_shape, encoding="raw")
    with pytest.raises(ValueError, match=r"0000.arrow is truncated or was changed: it has \d+ bytes, and clip .* ends"):
        unsized.frames(0)
    path.unlink()
    with pytest.raises(ValueError, match=r"0000.arrow is missing: restore the shard, or remove it and run jobs/ingest"):
        reader.frames(0)
    path.write_bytes(original)
    np.testing.assert_array_equal(reader.frames(0), stored_clips(manifest)[0])


def test_two_threads_share_a_reader(manifest: Manifest) -> None:
    """Each gets its own clips, also while shards are closed and opened again: here one at a time is open."""
    reader = ClipReader(
        manifest.uri, manifest.table, frame_shape=manifest.frame_shape, encoding=manifest.encoding, max_open=1
    )
    expected = stored_clips(manifest)

    def read(seed: int) -> None:
        for clip in np.random.default_rng(seed).integers(0, 24, 300).tolist():
            np.testing.assert_array_equal(reader.frames(clip), expected[clip])

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(read, range(2)))
    finally:
        sys.setswitchinterval(switching)


def test_several_reads_a_few_clips_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 240 JPEG clips, only a few are decoded before the caller takes them: memory is bounded."""
    manifest = make_data_set(tmp_path, encoding="jpeg")
    reader, read = ClipReader.of(manifest), []
    frames = ClipReader.frames

    def counted(self: ClipReader, clip: int, *numbers: Any) -> Frames:
        read.append(clip)
        return frames(self, clip, *numbers)

    monkeypatch.setattr(ClipReader, "frames", counted)
    found = reader.several(list(range(24)) * 10)
    next(found)
    time.sleep(0.3)
    assert len(read) <= 2 * 8
    found.close()  # type: ignore[attr-defined]


class Remote:
    """The files of this machine as if they were far away; counts what is read, and may let reads meet."""

    def __init__(self) -> None:
        self.bytes_read = self.num_reads = 0
        self.num_opened = 0
        self.meet = threading.Barrier(1)
        self.meet_opening = threading.Barrier(1)

    def open_input_file(self, path: str) -> Any:
        self.meet_opening.wait(timeout=10)
        self.num_opened += 1
        file = pafs.LocalFileSystem().open_input_file(path)
        remote = self

        class Counted:
            def read_at(self, num_bytes: int, offset: int) -> bytes:
                remote.meet.wait(timeout=10)
                remote.bytes_read += num_bytes
                remote.num_reads += 1
                content: bytes = file.read_at(num_bytes, offset)
                return content

        return Counted()


Far = tuple[Manifest, Remote, list[Frames]]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Far:
    """A data set whose shards answer as remote ones do, and the pixels of all its clips."""
    manifest = make_data_set(tmp_path / "data")
    expected = stored_clips(manifest)
    far = Remote()
    monkeypatch.setattr(shard_reader.storage, "filesystem", lambda uri: (far, storage.absolute_uri(uri)))
    return manifest, far, expected


def test_remote_clips_are_read_by_range_and_once(remote: Far, tmp_path: Path) -> None:
    """All clips have the pixels of their shards; exactly their bytes are fetched, and a second reader fetches none."""
    manifest, far, expected = remote
    cache = ClipCache(tmp_path / "cache", max_bytes=2**30)
    for _ in range(2):
        reader = ClipReader.of(manifest, cache=cache)
        for clip, frames in enumerate(expected):
            assert np.array_equal(reader.frames(clip), frames)
    assert far.bytes_read == sum(manifest.table["num_bytes"].to_pylist()) == cache.size()
    assert np.array_equal(ClipReader.of(manifest).frames(3), expected[3]), "without a cache"


@pytest.mark.parametrize("size", [1, 100_000, 2**23])
def test_neighbours_are_fetched_together(
    remote: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A piece of a shard is fetched once, by one request, though all its clips are asked for at the same time. Clips
    that are not asked for are fetched with those around them, and not kept.
    """
    manifest, far, expected = remote
    monkeypatch.setattr(shard_reader, "_TOGETHER", size)
    cache = ClipCache(tmp_path / "cache", max_bytes=2**30)
    rows = manifest.table.select(["shard", "offset", "num_bytes"]).to_pylist()
    pieces = {(row["shard"], row["offset"] // size) for row in rows}
    assert len(pieces) == {1: 24, 100_000: 14, 2**23: 2}[size]
    order = np.random.default_rng(0).permutation(24).tolist()
    for clip, frames in zip(order, ClipReader.of(manifest, cache=cache, together=True).several(order), strict=True):
        assert np.array_equal(frames, expected[clip])
    assert far.num_reads == len(pieces)
    assert cache.size() == sum(row["num_bytes"] for row in rows)
    assert cache.size() <= far.bytes_read <= 1.03 * cache.size(), "what lies between two clips of a piece comes with it"
    few = manifest.table.take(pa.array([0, 5, 7, 23]))
    other = ClipCache(tmp_path / "other", max_bytes=2**30)
    reader = ClipReader.of(manifest, few, cache=other, together=True)
    for clip, frames in zip((0, 5, 7, 23), reader.several(range(4)), strict=True):
        assert np.array_equal(frames, expected[clip])
    assert other.size() == sum(few["num_bytes"].to_pylist())


def test_a_store_that_is_away_is_waited_for_once(remote: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that want one piece get the error of the one that fetches it; later the piece is there."""
    manifest, far, expected = remote
    monkeypatch.setattr(storage, "_WAITS_SECONDS", (0.3, 0.3))
    clips = [at for at, shard in enumerate(manifest.table["shard"].to_pylist()) if shard == "0000"]
    reader = ClipReader.of(manifest, cache=ClipCache(tmp_path / "cache", max_bytes=2**30), together=True)
    tries = []

    def away(path: str) -> Any:
        tries.append(path)
        raise OSError("connection refused")

    with monkeypatch.context() as patch, ThreadPoolExecutor(len(clips)) as pool:
        patch.setattr(far, "open_input_file", away)
        errors = [future.exception() for future in [pool.submit(reader.frames, clip) for clip in clips]]
    assert {str(error) for error in errors} == {"connection refused"}
    assert len(tries) == 3, "one thread has tried, and waited twice"
    assert np.array_equal(reader.frames(clips[3]), expected[clips[3]])
    assert not reader._fetching


def test_a_damaged_neighbour_is_an_error_of_its_own(remote: Far, tmp_path: Path) -> None:
    """A clip beside a damaged one is read; the damaged one is not kept, and is named when it is asked for."""
    manifest, far, expected = remote
    row = manifest.table.slice(5, 1).to_pylist()[0]
    flip(Path(manifest.shard_uri(row["shard"])), row["offset"])
    cache = ClipCache(tmp_path / "cache", max_bytes=2**30)
    reader = ClipReader.of(manifest, cache=cache, together=True)
    assert np.array_equal(reader.frames(4), expected[4])
    assert cache.find(row["sha256"]) is None
    with pytest.raises(ValueError, match=rf"clip {row['clip_id']} of shard .* is damaged"):
        reader.frames(5)
    assert far.num_reads == 3, "the piece once more, and then the clip alone"
    assert cache.find(row["sha256"]) is None


def test_remote_clips_are_fetched_side_by_side(remote: Far, tmp_path: Path) -> None:
    """Eight are on their way at once, or none comes back; they arrive in order; a shard is opened once."""
    manifest, far, expected = remote
    far.meet = threading.Barrier(8)
    reader = ClipReader.of(manifest, cache=ClipCache(tmp_path / "cache", max_bytes=2**30))
    clips = [5, 0, 23, 7, 11, 2, 17, 8]
    for clip, frames in zip(clips, reader.several(clips), strict=True):
        assert np.array_equal(frames, expected[clip])
    assert far.num_opened == 2


def test_no_lock_is_held_while_a_shard_is_opened(remote: Far) -> None:
    """Two shards are opened at the same time: each waits until the other is on its way too."""
    manifest, far, _ = remote
    far.meet_opening = threading.Barrier(2)
    shards = manifest.table["shard"].to_pylist()
    reader = ClipReader.of(manifest)
    assert len(list(reader.several([shards.index("0000"), shards.index("0001")]))) == 2


def test_remote_damage_is_never_taken_into_the_cache(remote: Far, tmp_path: Path) -> None:
    """A clip that arrives damaged is an error and no file; one that is damaged on this disk is fetched again."""
    manifest, _, expected = remote
    row = manifest.table.slice(5, 1).to_pylist()[0]
    shard = Path(manifest.shard_uri(row["shard"]))
    flip(shard, row["offset"])
    cache = ClipCache(tmp_path / "cache", max_bytes=2**30)
    for reader in (ClipReader.of(manifest, cache=cache), ClipReader.of(manifest)):
        with pytest.raises(ValueError, match=rf"clip {row['clip_id']} of shard .* is damaged: the SHA-256 of its"):
            reader.frames(5)
    assert cache.size() == 0
    flip(shard, row["offset"])
    ClipReader.of(manifest, cache=cache).frames(5)
    (kept,) = (tmp_path / "cache").glob("??/*")
    for content in (os.urandom(row["num_bytes"]), b""):
        kept.write_bytes(content)
        assert np.array_equal(ClipReader.of(manifest, cache=cache).frames(5), expected[5])
        assert cache.size() == row["num_bytes"]


def test_a_data_set_on_s3_is_read_through_the_cache(tmp_path: Path, store: Any) -> None:
    """Ranged requests on a real store, also after it has refused some; what is not there is named."""
    from tests.store import Fault

    manifest = make_data_set(tmp_path / "data", encoding="jpeg")
    far = upload(manifest, "s3://bucket/set")
    store.faults.append(Fault("GET", "0001.arrow", times=2, status="500 Internal Server Error"))
    cache = cache_for(far.uri, folder=str(tmp_path / "cache"))
    for frames, expected in zip(
        ClipReader.of(far, cache=cache).several(range(24)), stored_clips(manifest), strict=True
    ):
        assert np.array_equal(frames, expected)
    assert cache is not None
    assert cache.size() == sum(manifest.table["num_bytes"].to_pylist())
    with pytest.raises(ValueError, match=r"s3://bucket/none/shards/0000.arrow is missing: restore the shard"):
        ClipReader.of(dataclasses.replace(manifest, uri="s3://bucket/none"), manifest.table).frames(0)


@pytest.mark.parametrize("by_clips", [True, False])
def test_a_scan_gives_all_clips_and_the_hash_of_the_file(tmp_path: Path, by_clips: bool) -> None:
    """Whatever the order of the rows; a damaged clip is marked, and any damaged byte changes the hash."""
    path = tmp_path / "s.arrow"
    rows, file = write_shard(str(path), clips(), metadata=METADATA)
    if not by_clips:
        file = ShardFile(file.num_bytes, hashlib.sha256(path.read_bytes()).hexdigest())
    scan = ShardScan(str(path), rows[::-1], by_clips=by_clips)
    assert [(row["clip_id"], stored, intact) for row, stored, intact in scan] == [
        (clip.clip_id, bytes(memoryview(clip.stored)), True) for clip in clips()
    ]
    assert scan.file == file
    seen = {file.sha256}
    for place, damaged in (
        (rows[3]["offset"], 3),
        (rows[3]["offset"] - 1, None),
        (file.num_bytes - 1, None),
        (0, None),
    ):
        flip(path, place)
        scan = ShardScan(str(path), rows, by_clips=by_clips)
        assert [intact for _, _, intact in scan] == [number != damaged for number in range(5)]
        seen.add(scan.file.sha256)
        flip(path, place)
    assert len(seen) == 5
