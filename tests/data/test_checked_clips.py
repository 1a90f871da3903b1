"""Ranks of a node hash each clip once, and whatever is not certain is hashed again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dataset import make_data_set
from vmoco.data.checked_clips import CheckedClips, file_mark
from vmoco.data.manifest import Manifest, shard_uri
from vmoco.data.shard_reader import ClipReader


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Clips that were hashed since the list was cleared."""
    found: list[int] = []
    intact: Any = ClipReader._is_intact

    def counted(reader: ClipReader, clip: int, stored: bytes | memoryview) -> bool:
        found.append(clip)
        return bool(intact(reader, clip, stored))

    monkeypatch.setattr(ClipReader, "_is_intact", counted)
    return found


def read(manifest: Manifest, checked: CheckedClips) -> None:
    reader = ClipReader.of(manifest, checked=checked, threads=2)
    for _ in reader.several(range(manifest.table.num_rows)):
        pass


def test_a_second_rank_hashes_nothing_and_another_job_everything(tmp_path: Path, hashed: list[int]) -> None:
    """The table is found by every rank of a job on this node; a new start of a run checks its clips anew."""
    manifest = make_data_set(tmp_path / "data", num_videos=8)
    # Places follow from the files' numbers and times. With as many as these, four clips share two of them in one of a
    # million runs.
    table = {"num_clips": 10_000, "folder": tmp_path}
    read(manifest, CheckedClips("first", **table))  # type: ignore[arg-type]
    assert sorted(hashed) == list(range(manifest.table.num_rows))
    hashed.clear()
    second = CheckedClips("first", **table)  # type: ignore[arg-type]
    assert second.is_shared
    read(manifest, second)
    assert len(hashed) <= 2  # two clips at one place replace each other
    hashed.clear()
    read(manifest, CheckedClips("second", **table))  # type: ignore[arg-type]
    assert sorted(hashed) == list(range(manifest.table.num_rows))


def test_a_shard_that_was_written_again_is_hashed_again(tmp_path: Path) -> None:
    """A flipped byte is found although another rank has read the clip, because the file's times show a write."""
    manifest = make_data_set(tmp_path / "data", num_videos=4)
    table = {"num_clips": 10_000, "folder": tmp_path}
    read(manifest, CheckedClips("job", **table))  # type: ignore[arg-type]
    shard = Path(shard_uri(manifest.uri, manifest.table["shard"][0].as_py()))
    content = bytearray(shard.read_bytes())
    content[manifest.table["offset"][0].as_py() + 5] ^= 1
    before = file_mark(str(shard))
    shard.write_bytes(content)
    assert file_mark(str(shard)) != before
    with pytest.raises(ValueError, match="is damaged"):
        read(manifest, CheckedClips("job", **table))  # type: ignore[arg-type]


def test_damaged_clips_are_never_noted(tmp_path: Path) -> None:
    """A clip enters the table only after its hash was right: a second rank finds the same damage."""
    manifest = make_data_set(tmp_path / "data", num_videos=4)
    shard = Path(shard_uri(manifest.uri, manifest.table["shard"][0].as_py()))
    content = bytearray(shard.read_bytes())
    content[manifest.table["offset"][0].as_py() + 5] ^= 1
    shard.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match="is damaged"):
            read(manifest, CheckedClips("job", num_clips=10_000, folder=tmp_path))


def test_processes_see_each_others_marks(tmp_path: Path) -> None:
    """A mark that another process has made is there; one that nobody made is not."""
    source = f"""
from pathlib import Path
from vmoco.data.checked_clips import CheckedClips
checked = CheckedClips("job", num_clips=100, folder=Path({str(tmp_path)!r}))
checked.add(checked.mark("ab", "file"))
"""
    here = CheckedClips("job", num_clips=100, folder=tmp_path)
    mark = here.mark("ab", "file")
    assert mark not in here
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60)
    assert mark in here
    assert here.mark("ab", "other file") not in here
    assert CheckedClips("other", num_clips=100, folder=tmp_path).mark("ab", "file") not in here


@pytest.mark.parametrize("problem", ["link", "readable", "folder", "missing", "full"])
def test_a_file_that_cannot_be_trusted_is_not_used(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the process has a table of its own, and hashes for itself."""
    CheckedClips("job", num_clips=100, folder=tmp_path)
    (file,) = tmp_path.glob("vmoco-checked-*")
    folder = tmp_path
    if problem == "readable":
        file.chmod(0o644)
    elif problem == "missing":
        folder = tmp_path / "none"
    else:
        file.unlink()
    if problem == "link":
        (tmp_path / "target").write_bytes(b"other")
        file.symlink_to(tmp_path / "target")
    elif problem == "folder":
        file.mkdir()
    elif problem == "full":

        def fallocate(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", fallocate)
    own = CheckedClips("job", num_clips=100, folder=folder)
    assert not own.is_shared
    mark = own.mark("ab", "file")
    own.add(mark)
    assert mark in own
    if problem == "link":
        assert (tmp_path / "target").read_bytes() == b"other"
