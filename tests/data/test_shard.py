"""The format of a shard."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.dataset import stored_frames
from vmoco.data import shard
from vmoco.data.frames import decode, encode
from vmoco.data.ledger import Rejection
from vmoco.data.shard import Clip, ShardFile, ShardMetadata, Video, read_rows, read_rows_from, write_shard

SHAPE = (4, 6, 10, 3)
METADATA = ShardMetadata(
    settings={"num_frames": 4, "height": 6},
    frame_shape=SHAPE,
    videos=(Video("a.mp4", 11, "aa"), Video("é\n.mp4", 12, "bb")),
    rejected=(Rejection("é\n.mp4", "probe", "truncated", "it ends", entry="12"),),
)


def clips(count: int = 5, *, shape: tuple[int, ...] = SHAPE) -> list[Clip]:
    rng = np.random.default_rng(0)
    return [
        Clip(
            clip_id=f"{number:016x}",
            video_id="a.mp4",
            start_seconds=number / 3,
            fps=25.0,
            held_out=number % 2 == 1,
            stored=rng.integers(0, 256, shape, np.uint8),
            height=5 if number == 3 else None,
            splits=("train", None, "test") if number == 2 else (None, None, None),
            label="dance" if number == 2 else None,
        )
        for number in range(count)
    ]


def test_frames_are_what_was_written(tmp_path: Path) -> None:
    """Every clip's pixels come back, at its row, by another reader of Arrow files."""
    path = str(tmp_path / "s.arrow")
    write_shard(path, clips(), metadata=METADATA)
    for frames, clip in zip(stored_frames(path), clips(), strict=True):
        np.testing.assert_array_equal(frames, clip.stored)


def test_a_clip_is_one_range_of_the_file(tmp_path: Path) -> None:
    """The pixels of each clip lie in the file once, in one piece, in the order of the rows."""
    path = tmp_path / "s.arrow"
    write_shard(str(path), clips(), metadata=METADATA)
    content = path.read_bytes()
    places = [content.index(clip.stored.tobytes()) for clip in clips()]
    assert places == sorted(places)


JPEG = dataclasses.replace(METADATA, encoding="jpeg")


def jpegs() -> list[Clip]:
    """The clips, smooth enough for JPEG, encoded."""
    ramp = np.linspace(0, 200, 4 * 6 * 10 * 3).reshape(SHAPE).astype(np.uint8)
    return [
        dataclasses.replace(clip, stored=encode(ramp + row, "jpeg", quality=80 + row))
        for row, clip in enumerate(clips())
    ]


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_the_range_of_a_row_is_its_stored_clip(tmp_path: Path, encoding: str) -> None:
    """The bytes at (offset, num_bytes) are those that were handed over, have the row's hash, and decode alone."""
    path, metadata = tmp_path / "s.arrow", METADATA if encoding == "raw" else JPEG
    made = clips() if encoding == "raw" else jpegs()
    rows, file = write_shard(str(path), made, metadata=metadata)
    content = path.read_bytes()
    outside, end = hashlib.sha256(), 0
    for row in rows:
        outside.update(content[end : row["offset"]] + bytes.fromhex(row["sha256"]))
        end = row["offset"] + row["num_bytes"]
    outside.update(content[end:])
    assert file == ShardFile(len(content), outside.hexdigest(), by_clips=True)
    assert read_rows(str(path)).metadata.encoding == encoding
    for row, clip, frames in zip(rows, made, stored_frames(str(path)), strict=True):
        stored = content[row["offset"] : row["offset"] + row["num_bytes"]]
        assert stored == bytes(clip.stored)
        assert row["sha256"] == hashlib.sha256(stored).hexdigest()
        np.testing.assert_array_equal(decode(stored, metadata.encoding, SHAPE), frames)


def test_rows_and_metadata_are_what_was_written(tmp_path: Path) -> None:
    """The rows without pixels, the rejected videos and the settings come back; hashes are those of the pixels."""
    path = str(tmp_path / "s.arrow")
    rows, _ = write_shard(path, clips(), metadata=METADATA)
    there = read_rows(path)
    assert there.metadata == METADATA
    assert there.table.to_pylist() == rows
    for row, clip in zip(rows, clips(), strict=True):
        assert row["sha256"] == hashlib.sha256(clip.stored.tobytes()).hexdigest()
        for name in ("clip_id", "video_id", "start_seconds", "fps", "label", "held_out"):
            assert row[name] == getattr(clip, name)
        assert (row["split_1"], row["split_2"], row["split_3"]) == clip.splits
        assert (row["height"], row["width"]) == (clip.height or 6, 10)


def test_a_shard_without_clips_still_names_its_videos(tmp_path: Path) -> None:
    """Where all videos were rejected, the shard holds no row, and its metadata name them all."""
    path = str(tmp_path / "s.arrow")
    write_shard(path, [], metadata=METADATA)
    assert read_rows(path).metadata == METADATA
    assert read_rows(path).table.num_rows == 0


def test_reading_rows_touches_no_pixels(tmp_path: Path) -> None:
    """`read_rows` reads a small part of the file, however large the clips are."""

    counted: list[int] = []

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            counted.append(-1 if size is None else size)
            return super().read(size)

    path = tmp_path / "s.arrow"
    write_shard(str(path), clips(shape=(16, 64, 64, 3)), metadata=ShardMetadata({}, (16, 64, 64, 3), ()))
    with Counting(path) as file:
        assert read_rows_from(pa.PythonFile(file, mode="r"), uri="counted").table.num_rows == 5
    assert min(counted) >= 0
    assert sum(counted) < 0.1 * path.stat().st_size


def test_equal_clips_give_equal_bytes(tmp_path: Path) -> None:
    """A shard depends on its clips and its metadata only."""
    write_shard(str(tmp_path / "a.arrow"), clips(), metadata=METADATA)
    write_shard(str(tmp_path / "b.arrow"), iter(clips()), metadata=ShardMetadata.from_json(METADATA.to_json(), uri=""))
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()


def test_a_shard_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """When a clip cannot be had, no file is left, neither under the final name nor another."""

    def breaking() -> Iterator[Clip]:
        yield clips()[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_shard(str(tmp_path / "s.arrow"), breaking(), metadata=METADATA)
    assert list(tmp_path.iterdir()) == []


def test_a_plain_arrow_reader_opens_it(tmp_path: Path) -> None:
    """A process that knows only pyarrow and numpy reads the frames with their shape."""
    path = tmp_path / "s.arrow"
    write_shard(str(path), clips(), metadata=METADATA)
    code = (
        "import sys, pyarrow as pa\n"
        "table = pa.ipc.open_file(pa.memory_map(sys.argv[1])).read_all()\n"
        "frames = table['frames'].combine_chunks().to_numpy_ndarray()\n"
        "print(frames.shape, int(frames.sum()), 'ray' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    total = sum(int(clip.stored.sum()) for clip in clips())
    assert done.stdout.strip() == f"{(5, *SHAPE)} {total} False"


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    """A missing, cut, foreign or newer shard is a ValueError that says what to do."""
    path = tmp_path / "s.arrow"
    with pytest.raises(ValueError, match=r"s.arrow is missing: run jobs/ingest.py"):
        read_rows(str(path))
    write_shard(str(path), clips(), metadata=METADATA)
    whole = path.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"s.arrow is truncated or not an Arrow file .*: remove it"):
            read_rows(str(path))
    with pa.ipc.new_file(str(path), pa.schema([("x", pa.int8())])):
        pass
    with pytest.raises(ValueError, match=r"an Arrow file but not a vmoco shard"):
        read_rows(str(path))
    newer = json.dumps({"version": 99})
    with pa.ipc.new_file(str(path), pa.schema([("x", pa.int8())], metadata={shard.METADATA_KEY: newer})):
        pass
    with pytest.raises(
        ValueError, match=r"has schema version 99, this vmoco reads the versions 2 and 3: use the vmoco"
    ):
        read_rows(str(path))
