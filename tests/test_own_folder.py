"""The folder of a killed process is removed by the next one; every other folder is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmoco.own_folder import OWNER, PREFIX, is_gone, make_folder, remove_orphans

MAKER = """
import sys, time
from pathlib import Path
from vmoco.own_folder import make_folder
print(make_folder(Path(sys.argv[1])), flush=True)
time.sleep(100)
"""


def test_the_folder_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    """While its owner lives the folder stays, and after kill -9 of its owner the next start removes it."""
    with subprocess.Popen([sys.executable, "-c", MAKER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        (folder / "session").mkdir()
        first = make_folder(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([folder, first])
        owner.kill()
    second = make_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([first, second])


def test_the_token_is_private(tmp_path: Path) -> None:
    """Only the user can read the folder and its token, and each folder has its own token."""
    one, other = make_folder(tmp_path), make_folder(tmp_path)
    assert one.stat().st_mode & 0o777 == 0o700
    assert (one / "token").stat().st_mode & 0o777 == 0o600
    assert len((one / "token").read_text()) > 30
    assert (one / "token").read_text() != (other / "token").read_text()


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({}, False),
        ({"started": "1"}, True),  # its number belongs to a later process
        ({"boot": "another"}, True),
        ({"host": "another"}, False),
        ({"host": "another", "boot": "another"}, False),
        ({"pid_namespace": "another", "started": "1"}, False),
    ],
)
def test_an_owner_is_gone_only_where_that_is_certain(tmp_path: Path, change: dict[str, str], gone: bool) -> None:
    """Another host or container cannot be asked; another start of this machine has ended all its processes."""
    owner = json.loads((make_folder(tmp_path) / OWNER).read_text())
    assert owner["pid"] == os.getpid()
    assert is_gone(owner | change) == gone


@pytest.mark.parametrize("content", [None, "", "{}", '{"pid": 1}'])
def test_a_folder_that_names_no_owner_is_left_alone(tmp_path: Path, content: str | None) -> None:
    """Also one whose file is empty or incomplete: its process may be about to write it."""
    folder = tmp_path / f"{PREFIX}somebody"
    folder.mkdir()
    if content is not None:
        (folder / OWNER).write_text(content)
    remove_orphans(tmp_path)
    assert folder.exists()


@pytest.mark.skipif(os.getuid() != 0 and not os.environ.get("CI"), reason="only root can give a folder to another user")
def test_the_folders_of_other_users_are_left_alone(tmp_path: Path) -> None:
    """Also if their owner is gone, and also for root, who could remove them."""
    folder = make_folder(tmp_path)
    owner = json.loads((folder / OWNER).read_text())
    (folder / OWNER).write_text(json.dumps(owner | {"started": "1"}))
    os.chown(folder, 12345, 12345)
    remove_orphans(tmp_path)
    assert folder.exists()
    os.chown(folder, os.getuid(), os.getgid())
    remove_orphans(tmp_path)
    assert not folder.exists()
