"""Reading one video, wherever it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from vmoco.data.fetch import RangedFile, file_sha256, local_copy
from vmoco.data.ledger import VideoError
from vmoco.data.source import Found


def test_a_local_video_is_read_where_it_is(tmp_path: Path) -> None:
    """No copy is made, by path or by URI, and the hash is that of the file."""
    (tmp_path / "a b.mp4").write_bytes(b"content")
    for root in (str(tmp_path), f"file://{tmp_path}"):
        with local_copy(root, Found("name", 7, "a b.mp4")) as path:
            assert path == str(tmp_path / "a b.mp4")
            assert file_sha256(path) == hashlib.sha256(b"content").hexdigest()


def test_what_cannot_be_read_is_rejected(tmp_path: Path) -> None:
    """A file that is gone, empty or of another size than listed has its own reason; only empty is final."""
    (tmp_path / "a.mp4").write_bytes(b"a")
    (tmp_path / "empty.mp4").touch()
    cases = {
        Found("gone.mp4", 1): ("missing", True),
        Found("empty.mp4", 0): ("empty", False),
        Found("a.mp4", 99): ("changed", True),
    }
    for found, expected in cases.items():
        with pytest.raises(VideoError) as caught, local_copy(str(tmp_path), found):
            pass
        assert caught.value.stage == "read"
        assert (caught.value.reason, caught.value.transient) == expected


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
