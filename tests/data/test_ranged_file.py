"""Ranges of files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from vmoco.data.ledger import VideoError
from vmoco.data.ranged_file import FileRange, RangedFile


def test_ranges_are_those_of_the_file(tmp_path: Path) -> None:
    """Reads and seeks give what an ordinary file gives, also past the end."""
    content = bytes(range(256)) * 4
    (tmp_path / "a").write_bytes(content)
    ranged = RangedFile(str(tmp_path / "a"), num_bytes=len(content))
    with open(tmp_path / "a", "rb") as plain:
        for offset, whence, size in [(0, 0, 10), (5, 1, 20), (-7, 2, 100), (500, 0, 0), (2000, 0, 5), (1000, 0, -1)]:
            assert ranged.seek(offset, whence) == plain.seek(offset, whence)
            assert ranged.read(size) == plain.read(size)
            assert ranged.tell() == plain.tell()


def test_a_range_is_a_file_of_its_own(tmp_path: Path) -> None:
    """Reads and seeks of a part of a file give what the part alone gives, and nothing before or after it."""
    content = bytes(range(256)) * 4
    (tmp_path / "a").write_bytes(content)
    part = RangedFile.of(FileRange(str(tmp_path / "a"), num_bytes=300, offset=200, name="x.h264"))
    alone = io.BytesIO(content[200:500])
    assert part.name == "x.h264"
    for offset, whence, size in [(0, 0, 10), (5, 1, 20), (-7, 2, 100), (290, 0, 50), (400, 0, 5), (100, 0, -1)]:
        assert part.seek(offset, whence) == alone.seek(offset, whence)
        assert part.read(size) == alone.read(size)


def test_a_file_that_is_gone_is_an_error_of_the_video(tmp_path: Path) -> None:
    """With its reason; a file that has become shorter ends there, and does not end the process."""
    with pytest.raises(VideoError, match="missing: it was listed, but is gone"):
        RangedFile(str(tmp_path / "gone"), num_bytes=9).read()
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    file = RangedFile(str(tmp_path / "a"), num_bytes=100_000)
    assert file.read(10) == b"x" * 10
    (tmp_path / "a").write_bytes(b"x" * 20)
    assert file.read() == b"x" * 10
    assert file.read() == b""
