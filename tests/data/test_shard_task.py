"""What one task of ingest does, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import videos
from vmoco.data import shard_task, source, video
from vmoco.data.ingest_settings import IngestSettings
from vmoco.data.manifest import shard_uri
from vmoco.data.shard import ShardReader, read_rows
from vmoco.data.shard_task import is_held_out, make_shard, plan_shards
from vmoco.data.source import Found, list_videos


def settings(root: Path, **changes: Any) -> IngestSettings:
    values: dict[str, Any] = {
        "num_frames": 4,
        "height": 24,
        "width": 32,
        "max_clips_per_video": 3,
        "held_out_percent": 0,
    }
    return IngestSettings(**{"videos": str(root / "in"), "output": str(root / "out"), **values, **changes})


def make(chosen: IngestSettings) -> dict[str, Any]:
    """All videos in one shard."""
    found = list(list_videos(chosen.videos).videos)
    (plan,) = plan_shards(found, content=chosen.content(), videos_per_shard=99)
    return make_shard(plan, videos=chosen.videos, output=chosen.output, settings=chosen)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    videos.write_video(tmp_path / "in/a.mp4", videos.images(30))
    videos.truncate(videos.write_video(tmp_path / "in/b.mp4", videos.images(30)), 0.5)
    videos.write_video(tmp_path / "in/c.avi", videos.images(12), codec="mpeg4")
    return tmp_path


def test_a_shard_holds_the_clips_and_accounts_for_all_videos(root: Path) -> None:
    """Clips are in the order of the videos, each with the right frames; the broken video is in the account."""
    made = make(settings(root, stride=2))
    assert [(row["video_id"], row["row"]) for row in made["rows"]] == [("a.mp4", i) for i in range(3)] + [("c.avi", 3)]
    assert [(row["video_id"], row["reason"]) for row in made["rejected"]] == [("b.mp4", "cannot-open")]
    assert len({row["clip_id"] for row in made["rows"]}) == 4
    with ShardReader(shard_uri(str(root / "out"), made["shard"])) as reader:
        assert [found.video_id for found in reader.account.videos] == ["a.mp4", "b.mp4", "c.avi"]
        numbers = [[videos.number_of(frame) for frame in reader.frames(row)] for row in range(4)]
    assert numbers == [[start + 2 * place for place in range(4)] for start in (1, 11, 21, 2)]
    assert made["rows"][0]["fps"] == pytest.approx(12.5)


def test_a_shard_that_is_there_is_reused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call decodes nothing and returns the same rows; a damaged shard is made again."""
    first = make(settings(root))
    path = Path(shard_uri(str(root / "out"), first["shard"]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert make(settings(root)) == first
    assert path.read_bytes() == whole
    monkeypatch.setattr(video, "cut_clips", None)
    assert make(settings(root)) == first | {"reused": True}


def test_what_was_transient_is_tried_again(root: Path) -> None:
    """A shard with a video that ran out of time is made anew, and then equals one that never had the trouble."""
    hurried = make(settings(root, seconds_per_video=1e-9))
    assert {row["reason"] for row in hurried["rejected"]} == {"timeout", "cannot-open"}
    assert hurried["rows"] == []
    made = make(settings(root))
    assert made["shard"] == hurried["shard"]
    assert len(made["rows"]) == 6
    elsewhere = make(settings(root, output=str(root / "undisturbed")))
    left, right = (Path(shard_uri(str(root / name), made["shard"])) for name in ("out", "undisturbed"))
    assert left.read_bytes() == right.read_bytes()
    assert made == elsewhere


def test_a_strange_failure_rejects_one_video(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw is in the ledger with its name, and the other videos are cut."""
    honest = video.cut_clips

    def failing(place: Any, **options: Any) -> video.Cut:
        if str(place).endswith("a.mp4"):
            raise ZeroDivisionError("strange")
        return honest(place, **options)

    monkeypatch.setattr(video, "cut_clips", failing)
    made = make(settings(root))
    (strange,) = [row for row in made["rejected"] if row["video_id"] == "a.mp4"]
    assert (strange["reason"], strange["message"]) == ("unexpected-error", "ZeroDivisionError: strange")
    assert strange["transient"]
    assert {row["video_id"] for row in made["rows"]} == {"c.avi"}


def test_a_file_that_vanished_is_transient(root: Path) -> None:
    """A video removed between listing and reading is in the ledger, to be tried again."""
    chosen = settings(root)
    (plan,) = plan_shards([Found("gone.mp4", 5)], content=chosen.content(), videos_per_shard=1)
    made = make_shard(plan, videos=chosen.videos, output=chosen.output, settings=chosen)
    assert [(row["reason"], row["transient"]) for row in made["rejected"]] == [("missing", True)]


def test_a_place_that_cannot_be_written_is_an_error(root: Path) -> None:
    """The error is a sentence, not a rejected video."""
    (root / "out").touch()
    with pytest.raises(ValueError, match=r"cannot write .*\.arrow: "):
        make(settings(root))


def test_the_name_of_a_shard_follows_from_what_goes_in() -> None:
    """Other videos, sizes or settings give another name; groups are consecutive."""
    found = [Found(f"{number}.mp4", number) for number in range(5)]
    plans = plan_shards(found, content={"num_frames": 4}, videos_per_shard=2)
    assert [[video.num_bytes for video in plan.videos] for plan in plans] == [[0, 1], [2, 3], [4]]
    names = {plan.name for plan in plans}
    names |= {plan_shards(found[:1], content={"num_frames": 4}, videos_per_shard=2)[0].name}
    names |= {plan_shards(found, content={"num_frames": 5}, videos_per_shard=2)[0].name}
    names |= {plan_shards([source.Found("0.mp4", 9), found[1]], content={"num_frames": 4}, videos_per_shard=2)[0].name}
    assert len(names) == 6
    assert plan_shards(found[:2], content={"num_frames": 4}, videos_per_shard=9)[0].name == plans[0].name


def test_the_held_out_share_is_right() -> None:
    """About the given percentage is held out, and a larger percentage holds out the same videos and more."""
    names = [f"folder/{number}.mp4" for number in range(20_000)]
    ten, thirty = ({name for name in names if is_held_out(name, percent)} for percent in (10.0, 30.0))
    assert abs(len(ten) - 2000) < 5 * np.sqrt(2000)
    assert ten < thirty
    assert not any(is_held_out(name, 0.0) for name in names)


def test_pixels_wait_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pixels of a video are in a file without a name, and a full disk is an OSError, not a killed process."""
    monkeypatch.setattr(shard_task.tempfile, "tempdir", str(tmp_path))
    array = shard_task._on_disk((2, 4, 24, 32, 3))
    array[:] = 7
    assert isinstance(array, np.memmap)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"."):
        shard_task._on_disk((2**20, 2**20, 2**20))


def test_rows_read_back_are_those_returned(root: Path) -> None:
    """What goes into the manifest is what the shard says of itself."""
    made = make(settings(root))
    there = read_rows(shard_uri(str(root / "out"), made["shard"])).table.to_pylist()
    names = there[0].keys()
    assert [{name: row[name] for name in names} for row in made["rows"]] == there
