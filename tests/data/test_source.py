"""Listing and reading the videos of a folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from tests.names import FOLDER, names
from vmoco.data.found import Found
from vmoco.data.ledger import VideoError
from vmoco.data.source import file_sha256, list_videos, local_copy, ranged


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_videos_are_found_by_extension_and_sorted(tmp_path: Path) -> None:
    """All folders are searched; names are relative, with any characters; other files are no videos."""
    names = ["b/c.MP4", "a.mkv", "b/a 'quoted' \n🎞.webm", "b.avi", "b-.mov", "é" * 120 + ".mp4"]
    make(tmp_path, *names, "notes.txt", "b/mp4", "c.mp4.part")
    listing = list_videos(str(tmp_path))
    assert [found.video_id for found in listing.videos] == sorted(names)
    assert [found.num_bytes for found in listing.videos] == [len(name.encode()) for name in sorted(names)]
    assert listing.rejected == ()


def test_a_uri_lists_as_a_path_does(tmp_path: Path) -> None:
    """file:// gives the same names."""
    make(tmp_path, "x/b.mp4", "a.mp4")
    assert list_videos(f"file://{tmp_path}") == list_videos(str(tmp_path))


def test_hidden_videos_are_counted(tmp_path: Path) -> None:
    """A name with a leading dot is left out, and counted."""
    make(tmp_path, "._a.mp4", "a.mp4", ".b.txt", ".cache/c.mp4")
    listing = list_videos(str(tmp_path))
    assert [found.video_id for found in listing.videos] == ["a.mp4"]
    assert listing.num_hidden == 1


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    """A linked folder is listed once under each root, and a loop of links does not go on for ever."""
    make(tmp_path / "elsewhere", "a.mp4")
    make(tmp_path / "root", "sub/b.mp4")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "sub" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "z.mp4").symlink_to(tmp_path / "elsewhere" / "a.mp4")
    listing = list_videos(str(tmp_path / "root"))
    assert [found.video_id for found in listing.videos] == ["linked/a.mp4", "sub/b.mp4", "z.mp4"]


def test_what_is_no_file_is_rejected(tmp_path: Path) -> None:
    """A FIFO, a dangling link and a name that is not UTF-8 are in the ledger with their reasons, and nothing hangs."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nothing")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")).touch()
    rejected = {row.video_id: row for row in list_videos(str(tmp_path)).rejected}
    assert {name: row.reason for name, row in rejected.items()} == {
        "pipe.mp4": "not-a-file",
        "link.mp4": "dangling-link",
        r"\xff.mp4": "name-not-utf8",
    }
    assert {row.stage for row in rejected.values()} == {"list"}


def test_no_videos_is_an_error(tmp_path: Path) -> None:
    """The error says what was looked for; a folder that is not there is another error."""
    make(tmp_path, "a.txt", ".b.mp4")
    with pytest.raises(ValueError, match=r"no videos found in .* \(1 hidden ones are skipped\): looked for .* \.mp4 "):
        list_videos(str(tmp_path))
    for name in ("missing", "a.txt"):
        with pytest.raises(ValueError, match="is not a folder that can be read"):
            list_videos(str(tmp_path / name))


@pytest.mark.parametrize("place", ["", "file://"])
@hypothesis.settings(max_examples=30)
@hypothesis.given(found=strategies.lists(names(suffix=".mp4"), min_size=1, max_size=5, unique=True))
def test_any_name_is_listed_and_read(place: str, found: list[str]) -> None:
    """Whatever characters a file and its folder have: listed under that name, and its own content is read."""
    with tempfile.TemporaryDirectory() as folder:
        root = f"{folder}/{FOLDER}"
        Path(root).mkdir()
        for name in found:
            Path(root, name).write_bytes(name.encode())
        uri = place + (urllib.parse.quote(root) if place else root)
        listing = list_videos(uri)
        assert [video.video_id for video in listing.videos] == sorted(found)
        for video in listing.videos:
            with local_copy(uri, video) as path:
                assert Path(path).read_bytes() == video.video_id.encode()
            assert Path(str(ranged(uri, video))).read_bytes() == video.video_id.encode()


def test_a_folder_that_goes_while_it_is_listed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder removed between two looks at it is in the ledger; the other videos are listed."""
    make(tmp_path, "a.mp4", "b/c.mp4")
    stat = os.stat

    def late(path: str, *positional: Any, **named: Any) -> os.stat_result:
        if path == str(tmp_path / "b"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return stat(path, *positional, **named)

    monkeypatch.setattr(os, "stat", late)
    listing = list_videos(str(tmp_path))
    assert [found.video_id for found in listing.videos] == ["a.mp4"]
    assert [(row.video_id, row.reason) for row in listing.rejected] == [("b", "unreadable-folder")]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_pattern_chooses(tmp_path: Path, scheme: str) -> None:
    """`*` stays in its folder, `**` goes through any number; names count from the last fixed folder.

    A folder whose name looks like a pattern is a folder.
    """
    make(tmp_path, "a/x-1.mp4", "a/y-1.mp4", "a/b/x-2.mp4", "c/x-3.mkv", "x-4.mp4", "[old]/x-5.mp4")
    root = f"{scheme}{tmp_path}"
    cases = {
        "a/x*.mp4": ["x-1.mp4"],
        "**/x*.mp4": ["[old]/x-5.mp4", "a/b/x-2.mp4", "a/x-1.mp4", "x-4.mp4"],
        "*/x-?.m*": ["[old]/x-5.mp4", "a/x-1.mp4", "c/x-3.mkv"],
        "a/**": ["b/x-2.mp4", "x-1.mp4", "y-1.mp4"],
        "[old]/x*.mp4": ["x-5.mp4"],
    }
    for pattern, expected in cases.items():
        names = [found.video_id for found in list_videos(f"{root}/{pattern}").videos]
        assert names == expected, pattern
    assert [found.video_id for found in list_videos(f"{root}/[old]").videos] == ["x-5.mp4"]
    with pytest.raises(ValueError, match=rf"no videos that match z\*.mp4 found in {tmp_path}: looked for"):
        list_videos(f"{root}/z*.mp4")


def test_an_entry_changes_with_what_is_known() -> None:
    """Size, range, label or split: each makes another entry."""
    one = Found("a.mp4", 7)
    others = [
        Found("a.mp4", 8),
        Found("a.mp4", 7, "b.mp4"),
        Found("a.mp4", 7, start_seconds=1.5),
        Found("a.mp4", 7, end_seconds=1.5),
        Found("a.mp4", 7, label="x"),
        Found("a.mp4", 7, splits=("x", None, None)),
    ]
    assert len({found.entry for found in [one, *others]}) == 7
    assert Found("a.mp4", 7, "a.mp4").entry == one.entry


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
