"""The demo gives the right flags to the jobs, ends with the code of a failed step, and refuses bad input first."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from tests.data.videos import images, write_video
from vmoco import demo
from vmoco.data.annotations import list_annotated
from vmoco.job_settings import IngestSettings

ROOT = Path(__file__).parents[1]


class Cluster:
    """Replaces a LocalCluster: records what is submitted, and whether it was stopped."""

    def __init__(self, codes: dict[str, int]) -> None:
        self.address = "http://127.0.0.1:1"
        self.codes = codes
        self.submitted: list[list[str]] = []
        self.stopped = False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped = True

    def submit(self, entrypoint: list[str], working_dir: Path) -> int:
        assert (working_dir / entrypoint[1]).name == Path(entrypoint[1]).name
        self.submitted.append(entrypoint)
        return self.codes.get(entrypoint[1], 0)


def run_demo(home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "jobs/demo.py", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"VMOCO_HOME": str(home)},
        timeout=60,
        check=False,
    )


def test_the_flags_of_ingest_have_all_settings(vmoco_home: Path) -> None:
    """`jobs/ingest.py` parses the flags back to the same settings, also with a space in the folder."""
    settings = demo.ingest_settings("/videos of mine")
    assert tyro.cli(IngestSettings, args=demo.flags(settings)) == settings
    assert settings.output.startswith(f"{vmoco_home}/data/demo-")


def test_a_data_set_is_named_by_what_decides_it(vmoco_home: Path) -> None:
    """The same videos give the same folder, so a second run goes on from it; other videos give another."""
    assert demo.ingest_settings("/a") == demo.ingest_settings("/a")
    assert demo.ingest_settings("/a").output != demo.ingest_settings("/b").output


@pytest.mark.parametrize(("job", "name"), [("jobs/ingest.py", "ingest"), ("jobs/pretrain.py", "pretrain")])
def test_a_failed_step_ends_the_demo(
    job: str, name: str, vmoco_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job that fails is the last one submitted; its exit code is kept and the cluster is stopped."""
    (tmp_path / "a.mp4").touch()
    cluster = Cluster({job: 7})
    monkeypatch.setattr(demo, "LocalCluster", lambda **_: cluster)
    with pytest.raises(demo.StepFailedError, match=f"step '{name}' with exit code 7") as failed:
        demo.run(videos=str(tmp_path))
    assert failed.value.code == 7
    assert cluster.submitted[-1][1] == job
    assert cluster.stopped


@pytest.mark.parametrize(
    ("seconds", "parts"),
    [
        (5.9, [("", "")]),
        (6.0, [(0, 3), (3, 6)]),
        (10.0, [(0, 3), (3, 6), (6, 9)]),
        (46.0, [(0, 3), (6, 9), (12, 15), (18, 21), (24, 27), (30, 33), (36, 39), (42, 45)]),
    ],
)
def test_parts_of_a_video(seconds: float, parts: list[tuple[object, object]]) -> None:
    """Parts of 3 s, at most 8, from the first to the last that fits; a video too short for two is not cut."""
    assert demo.parts_of(seconds) == parts


def test_few_long_videos_are_cut_into_parts(vmoco_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ingest reads the list: long videos in parts, the others as they are; what cannot be read keeps its reason."""
    write_video(tmp_path / "long.mp4", images(160), fps=25)  # 6.4 s
    write_video(tmp_path / "short.mp4", images(30), fps=25)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "lost.mp4").symlink_to(tmp_path / "nowhere.mp4")
    listed = tmp_path / "parts.csv"
    chosen = demo.choose(str(tmp_path))
    listed.write_text(chosen.listed)
    assert chosen.note == "up to 8 parts of 3 s of each long video count as videos"
    listing = list_annotated(str(tmp_path), str(listed), "table")
    assert [found.video_id for found in listing.videos] == ["broken.mp4", "long.mp4#0-3", "long.mp4#3-6", "short.mp4"]
    assert [found.source for found in listing.videos] == [None, "long.mp4#0-3", "long.mp4#3-6", None]
    assert [row.reason for row in listing.rejected] == ["dangling-link"]
    settings = demo.ingest_settings(str(tmp_path), chosen)
    assert settings.max_clips_per_video == 4
    assert settings.annotations == f"{settings.output}.csv"
    assert tyro.cli(IngestSettings, args=demo.flags(settings)) == settings
    assert settings.output != demo.ingest_settings(str(tmp_path)).output
    monkeypatch.setattr(demo, "FEW_VIDEOS", 2)
    assert demo.choose(str(tmp_path)) == demo.Choice(max_clips=8)


def test_of_many_videos_it_takes_some(vmoco_home: Path, tmp_path: Path) -> None:
    """40 of 100, evenly spread from the first to the last name, with fewer clips of each; ingest reads the list."""
    for number in range(100):
        (tmp_path / f"{number:03d}.mp4").touch()
    chosen = demo.choose(str(tmp_path))
    assert chosen.note.startswith("40 of the 100 videos, so that the demo is short")
    listed = tmp_path / "some.csv"
    listed.write_text(chosen.listed)
    names = [found.video_id for found in list_annotated(str(tmp_path), str(listed), "table").videos]
    assert (len(set(names)), names[0], names[-1]) == (40, "000.mp4", "099.mp4")
    steps = {int(after[:3]) - int(before[:3]) for before, after in itertools.pairwise(names)}
    assert steps == {2, 3}
    settings = demo.ingest_settings(str(tmp_path), chosen)
    assert (settings.max_clips_per_video, settings.videos_per_shard) == (8, 1)
    assert settings.annotations == f"{settings.output}.csv"


def test_short_videos_and_lists_are_taken_as_they_are(tmp_path: Path) -> None:
    """Nothing is cut if no video is long enough, or if the videos are given as a list."""
    write_video(tmp_path / "short.mp4", images(30), fps=25)
    (tmp_path / "list.csv").write_text("path\nshort.mp4\n")
    for place in (str(tmp_path), str(tmp_path / "list.csv")):
        assert demo.choose(place) == demo.Choice()


def test_videos_that_are_not_there(tmp_path: Path) -> None:
    """A folder that does not exist ends the demo before anything starts, with one message."""
    ended = run_demo(tmp_path / "home", "--videos", "/no such folder")
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: --videos /no such folder does not exist: give a folder, or a URI prefix, that holds videos\n"
    )


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """A home that is a file ends the demo before anything starts, with one message that has its path."""
    (tmp_path / "home").write_text("a file")
    ended = run_demo(tmp_path / "home")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert f"{tmp_path}/home" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_an_unknown_flag_is_answered_with_the_nearest(tmp_path: Path) -> None:
    """A misspelt flag ends with code 2 and names the flag that was meant."""
    ended = run_demo(tmp_path, "--video", "x")
    assert ended.returncode == 2
    assert "--videos" in ended.stderr + ended.stdout


def test_the_last_lines_name_the_tracker(vmoco_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands at the end carry the tracker's own address: the database's, or the server's."""
    assert f"ui --backend-store-uri sqlite:///{vmoco_home}/mlflow.db" in demo.next_commands()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert "ui --backend-store-uri" not in demo.next_commands()
    assert "http://tracker:5000" in demo.next_commands()
