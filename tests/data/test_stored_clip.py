"""Stored clips by their ranges."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_shard import ACCOUNT, JPEG, SHAPE, clips, jpegs
from vmoco.data.shard import ShardReader, write_shard
from vmoco.data.shard_reader import ShardScan, read_clip


@pytest.mark.parametrize("account", [ACCOUNT, JPEG], ids=lambda account: account.encoding)
def test_a_clip_is_read_alone(tmp_path: Path, account: object) -> None:
    """By path or URI, the pixels are those of the memory map; a flipped bit is noticed."""
    path = tmp_path / "s.arrow"
    encoding = account.encoding  # type: ignore[attr-defined]
    rows, _ = write_shard(str(path), clips() if encoding == "raw" else jpegs(), account=account)  # type: ignore[arg-type]
    with ShardReader(str(path)) as reader:
        for number, row in enumerate(rows):
            alone = read_clip(f"file://{path}", row, frame_shape=SHAPE, encoding=encoding)
            np.testing.assert_array_equal(alone, reader.frames(number))
    content = bytearray(path.read_bytes())
    content[rows[2]["offset"] + 30] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"clip 0{15}2 of shard .*s.arrow is damaged: run jobs/check.py data"):
        read_clip(str(path), rows[2], frame_shape=SHAPE, encoding=encoding)


def test_a_scan_gives_all_clips_and_the_hash_of_the_file(tmp_path: Path) -> None:
    """Whatever the order of the rows; a damaged clip is told, and the hash is that of the bytes that are there."""
    path = tmp_path / "s.arrow"
    rows, file = write_shard(str(path), clips(), account=ACCOUNT)
    scan = ShardScan(str(path), rows[::-1])
    assert [(row["clip_id"], stored, whole) for row, stored, whole in scan] == [
        (clip.clip_id, bytes(memoryview(clip.stored)), True) for clip in clips()
    ]
    assert scan.file == file
    content = bytearray(path.read_bytes())
    content[rows[3]["offset"]] ^= 1
    path.write_bytes(content)
    scan = ShardScan(str(path), rows)
    assert [whole for _, _, whole in scan] == [True, True, True, False, True]
    assert scan.file.sha256 == hashlib.sha256(content).hexdigest()
