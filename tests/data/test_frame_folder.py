"""Which pictures of a folder are frames, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from vmoco.data.annotations import list_annotated
from vmoco.data.found import Pictures
from vmoco.data.frame_folder import in_order, list_frame_folders
from vmoco.data.ledger import VideoError
from vmoco.data.listing import list_footage
from vmoco.data.source import list_videos
from vmoco.job_settings import IngestSettings


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


@hypothesis.given(
    numbers=strategies.sets(strategies.integers(0, 400), min_size=1, max_size=40),
    prefix=strategies.sampled_from(["", "frame_", "img ", "a1b"]),
    width=strategies.integers(1, 7),
    step=strategies.integers(1, 9),
)
def test_pictures_are_in_the_order_of_their_numbers(numbers: set[int], prefix: str, width: int, step: int) -> None:
    """Any prefix, width and step: each number stands at its place, and the others are missing."""
    hypothesis.assume(
        len(numbers) < 2 or {1} <= {b - a for a, b in zip(sorted(numbers), sorted(numbers)[1:], strict=False)}
    )
    frames = in_order((f"{prefix}{number * step:0{width}d}.jpg", 1) for number in numbers)
    first = min(numbers)
    for place, name in enumerate(frames.names):
        expected = f"{prefix}{(first + place) * step:0{width}d}.jpg" if first + place in numbers else None
        assert name == expected
    assert len(frames.names) == max(numbers) - first + 1
    assert bool(frames.missing) == (len(numbers) < len(frames.names))


def test_numbers_that_count_no_frames_are_refused() -> None:
    """One number twice, or numbers that are far apart: a sentence, and no list of a billion frames."""
    with pytest.raises(VideoError, match=r"001.jpg and 1.jpg have the same number: keep one"):
        in_order([("1.jpg", 1), ("001.jpg", 1)])
    with pytest.raises(VideoError, match=r"3 pictures with numbers from 1 to 9000000000: most are missing"):
        in_order([("1.jpg", 1), ("2.jpg", 1), ("9000000000.jpg", 1)])


def test_each_folder_is_a_video(tmp_path: Path) -> None:
    """At any depth; hidden and other files are counted; several sequences in one are a row; a FIFO hangs nothing."""
    make(tmp_path, "a/x/1.jpg", "a/x/2.JPEG", "a/x/notes.txt", "a/x/._1.jpg", "b/img_1.png", "b/sub/f0007.png")
    make(tmp_path, "two/img_1.jpg", "two/flow_x_1.jpg", "twice/1.jpg", "twice/01.jpg", ".hidden/1.jpg", "none/a.mp4")
    os.mkfifo(tmp_path / "b/img_2.png")
    listing = list_frame_folders(str(tmp_path), 12.5)
    assert {found.video_id: found.pictures for found in listing.videos} == {
        "a/x": Pictures(12.5, "", "jpeg"),
        "b": Pictures(12.5, "img_", "png"),
        "b/sub": Pictures(12.5, "f", "png"),
    }
    assert [found.num_bytes for found in listing.videos] == [2, 1, 1]
    assert {row.video_id: row.reason for row in listing.rejected} == {
        "two": "several-sequences",
        "twice": "number-twice",
    }
    assert listing.num_hidden == 1
    assert listing.others == {".txt": 1, ".mp4": 1}


def test_the_folder_itself_may_be_the_video(tmp_path: Path) -> None:
    """It has its own name; the root is the folder above."""
    make(tmp_path, "clip/1.jpg", "clip/2.jpg", "clip/sub/1.jpg", "other/1.jpg")
    listing = list_frame_folders(str(tmp_path / "clip"), 25)
    assert listing.root == str(tmp_path)
    assert [found.path for found in listing.videos] == ["clip", "clip/sub"]


def test_a_pattern_chooses_folders_or_sequences(tmp_path: Path) -> None:
    """Of folders by their names, and of pictures where a folder holds several sequences."""
    make(tmp_path, "a/img_1.jpg", "a/img_2.jpg", "a/flow_x_1.jpg", "b/img_1.jpg", "c/img_1.jpg")
    by_folder = list_frame_folders(f"{tmp_path}/[bc]", 25)
    assert [found.path for found in by_folder.videos] == ["b", "c"]
    by_picture = list_frame_folders(f"{tmp_path}/**/img_*.jpg", 25)
    assert [(found.path, found.num_bytes) for found in by_picture.videos] == [("a", 2), ("b", 1), ("c", 1)]


def test_the_kind_is_guessed_where_there_is_one(tmp_path: Path) -> None:
    """Pictures alone need --fps, and are said; beside videos they are left out; beside tar files it must be said."""
    make(tmp_path, "run/a/1.jpg", "jump/b/1.jpg")
    with pytest.raises(ValueError, match=r"folders of numbered pictures: give --layout frames and --fps"):
        list_footage(str(tmp_path))
    guessed = list_footage(str(tmp_path), fps=25)
    assert guessed.videos == list_footage(str(tmp_path), "frames", fps=25).videos
    assert guessed.notes == (f"{tmp_path} is read as --layout frames: 2 folders of pictures, 25 pictures per second",)
    make(tmp_path, "x.tar")
    with pytest.raises(ValueError, match=r"1 tar files and 2 folders of numbered pictures: give --layout tar, or"):
        list_footage(str(tmp_path), fps=25)
    make(tmp_path, "c.mp4")
    assert list_footage(str(tmp_path), fps=25).videos == list_videos(str(tmp_path)).videos


def test_wrong_settings_are_refused_before_work(tmp_path: Path) -> None:
    """No rate, a rate of 0, no pictures: the message names the flag."""
    with pytest.raises(ValueError, match=r"--layout frames needs --fps, the number of pictures per second"):
        IngestSettings(videos="x", output="y", layout="frames")
    with pytest.raises(ValueError, match=r"--fps 0 is not allowed"):
        IngestSettings(videos="x", output="y", layout="frames", fps=0)
    make(tmp_path, "a.txt")
    with pytest.raises(ValueError, match=r"--layout frames: no folders of numbered pictures .*found in .*\.txt 1"):
        list_footage(str(tmp_path), "frames", fps=25)
    with pytest.raises(ValueError, match=r"--layout tar: no .tar files found in .*\.txt 1"):
        list_footage(str(tmp_path), "tar")
    make(tmp_path, "a.mp4")
    for layout in ("frames", "tar"):
        with pytest.raises(ValueError, match=rf"--layout {layout}: .*; it holds 1 video file: leave out --layout"):
            list_footage(str(tmp_path), layout, fps=25)  # type: ignore[arg-type]


def test_lists_name_folders(tmp_path: Path) -> None:
    """Filelists of TSN with numbers of frames, UCF101 with endings, Kinetics and ssv2; they need --fps."""
    root, lists = tmp_path / "in", tmp_path / "lists"
    make(root, "Archery/v_Archery_g01_c01/1.jpg", "abcdefghijk_000001_000011/img_1.jpg", "74225/1.jpg")
    make(lists, "ucf/trainlist01.txt")
    (lists / "ucf/trainlist01.txt").write_text("Archery/v_Archery_g01_c01.avi 1\n")
    (lists / "list.txt").write_text("Archery/v_Archery_g01_c01 164 3\n74225 20 4\n")
    (lists / "kinetics.csv").write_text("label,youtube_id,time_start,time_end\nrun,abcdefghijk,1,11\n")
    (lists / "train.json").write_text('[{"id": "74225", "template": "Holding [something]"}]')
    cases = {
        "list.txt": {"Archery/v_Archery_g01_c01": "3", "74225": "4"},
        "ucf": {"Archery/v_Archery_g01_c01": "Archery"},
        "kinetics.csv": {"abcdefghijk_000001_000011": "run"},
        "train.json": {"74225": "Holding something"},
    }
    for beside_videos in (False, True):
        if beside_videos:
            make(root, "film.mp4")
        for name, expected in cases.items():
            listing = list_annotated(str(root), str(lists / name), "auto", fps=25)
            assert {found.path: found.label for found in listing.videos} == expected, name
            assert all(found.pictures for found in listing.videos)
    with pytest.raises(ValueError, match=r"names 2 folders of numbered pictures, such as '74225': give --fps"):
        list_annotated(str(root), str(lists / "list.txt"), "auto")
