"""Which file a name in a list means."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from vmoco.data.found import Found
from vmoco.data.listed_files import ListedFiles

NFC, NFD = (unicodedata.normalize(form, "Müller/café.mp4") for form in ("NFC", "NFD"))


def videos(*paths: str) -> list[Found]:
    return [Found(path, 9) for path in paths]


@pytest.mark.parametrize(
    ("named", "path"),
    [
        (NFC, NFD),
        (NFD, NFC),
        ("run/A.MP4", "run/a.mp4"),
        ("run/a", "run/a.mp4"),
        ("Run/A", "run/a.mp4"),
        ("run/v1.2", "run/v1.2.mp4"),
        (NFD.upper().removesuffix(".MP4"), NFC),
    ],
)
def test_case_form_and_ending(named: str, path: str) -> None:
    """A name that differs in these alone finds its file; only case and form are worth a note."""
    files = ListedFiles("/videos", videos(path, "other.mp4"))
    assert files.resolve(named) == path
    assert bool(files.num_renamed) == (not path.startswith(named))


def test_exact_names_come_first() -> None:
    """Files that differ only in case are told apart by exact names, and by nothing else."""
    files = ListedFiles("/videos", videos("a.mp4", "A.mp4", "b.mp4", "b.avi", NFC, NFD))
    assert [files.resolve(name) for name in ("a.mp4", "A.mp4", NFC, NFD)] == ["a.mp4", "A.mp4", NFC, NFD]
    for unclear in ("A.MP4", "b", NFC.upper()):
        assert files.find(unclear) is None
        assert files.is_ambiguous(unclear)
    assert files.find("c.mp4") is None
    assert not files.is_ambiguous("c.mp4")
    assert not files.num_renamed


@pytest.mark.parametrize("root", ["/", "/videos", "/videos/", "file:///videos", "gs://bucket/videos", "/videos/*.mp4"])
def test_absolute_names_below_the_folder(root: str) -> None:
    """With the folder as it was typed, also a pattern and a store."""
    files = ListedFiles(root, videos("a/b.mp4"))
    below = root.removesuffix("*.mp4").rstrip("/")
    assert files.below_root(f"{below}/a/./b.mp4", where="x") == "a/b.mp4"
    assert files.below_root("a/b.mp4", where="x") == "a/b.mp4"
    for outside in ("/" if root != "/" else "..", f"{below}/../c.mp4", "s3://other/a.mp4", "../a.mp4"):
        with pytest.raises(ValueError, match=r"x: path .* leaves the folder of the videos: give a path below"):
            files.below_root(outside, where="x")


def test_a_link_to_the_folder(tmp_path: Path) -> None:
    """A list may have the real path where `--videos` has a link to it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    files = ListedFiles(str(tmp_path / "link"), videos("a.mp4"))
    assert {files.below_root(f"{tmp_path}/{name}/a.mp4", where="x") for name in ("real", "link")} == {"a.mp4"}
