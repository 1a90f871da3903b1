"""A file under its final name is complete or absent, whatever fails or is killed; paths and URIs behave alike."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import hypothesis
import pytest

from tests.names import names
from vmoco import storage

KILLED_WRITER = """
import os, signal, sys
from vmoco import storage
with storage.open_atomic(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def below(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.rglob("*"))


def test_reader_sees_one_whole_content_or_the_other(tmp_path: Path) -> None:
    """While a writer replaces a file again and again, each read gives one of the two complete contents."""
    path, contents = tmp_path / "file", [b"a" * 2**20, b"b" * 2**21]
    storage.write_atomic(str(path), contents[0])
    finished = threading.Event()

    def write() -> None:
        for turn in range(40):
            storage.write_atomic(str(path), contents[turn % 2])
        finished.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not finished.is_set():
        found = path.read_bytes()
        assert found in contents, f"{len(found)} bytes"
        seen.add(len(found))
    writer.join()
    assert seen == {2**20, 2**21}
    assert below(tmp_path) == ["file"]


def test_folder_is_created_and_content_replaced(tmp_path: Path) -> None:
    """Missing folders are created with the file; a second write replaces the first, also if it is shorter."""
    path = tmp_path / "new" / "folder" / "file"
    storage.write_atomic(str(path), b"long content")
    storage.write_atomic(str(path), memoryview(b"short"))
    assert path.read_bytes() == b"short"
    assert below(path.parent) == ["file"]


@pytest.mark.parametrize("place", ["file/below", "file/far/below", "folder"])
def test_failed_write_leaves_nothing(tmp_path: Path, place: str) -> None:
    """A path below a file, or in place of a folder, gives an error with the path, and leaves no temporary file."""
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    uri = str(tmp_path / place)
    with pytest.raises(ValueError, match=f"^cannot write {uri}: "):
        storage.write_atomic(uri, b"content")
    with pytest.raises(ValueError, match=f"^cannot write {uri}: "), storage.open_atomic(uri) as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"kept"
    assert below(tmp_path) == ["file", "folder"]


def write_half(path: Path) -> None:
    """Fails in the middle of writing."""
    with storage.open_atomic(str(path)) as file:
        file.write(b"half of")
        raise RuntimeError("broken")


def test_error_inside_the_block_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    """`open_atomic` publishes nothing when its block raises; the error comes through as it is."""
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError, match=r"^broken$"):
        write_half(path)
    assert path.read_bytes() == b"before"
    assert below(tmp_path) == ["file"]


def test_temporary_file_of_a_killed_writer_is_not_listed(tmp_path: Path) -> None:
    """A writer killed half-way leaves a temporary file that no listing shows, and no file under the final name."""
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path / "file")], check=False)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == b"half"
    assert storage.list_files(str(tmp_path)) == []
    assert not storage.exists(str(tmp_path / "file"))


def test_listing_is_sorted_and_relative(tmp_path: Path) -> None:
    """Lists all files below the folder by relative name, or one level; the folder may end in a slash."""
    for name in ("b", "a/z", "a/b/c", "a.txt", "C"):
        storage.write_atomic(str(tmp_path / name), b"")
    (tmp_path / "empty").mkdir()
    assert storage.list_files(str(tmp_path)) == ["C", "a.txt", "a/b/c", "a/z", "b"]
    assert storage.list_files(f"{tmp_path}/") == ["C", "a.txt", "a/b/c", "a/z", "b"]
    assert storage.list_files(str(tmp_path), recursive=False) == ["C", "a.txt", "b"]


@pytest.mark.parametrize("name", ["file", "missing"])
def test_listing_of_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    """A file, or nothing, in place of the folder: an error message with the place."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{tmp_path}/{name} is not a folder"):
        storage.list_files(str(tmp_path / name))


def test_file_uri_is_the_path(tmp_path: Path) -> None:
    """A file written through file:// is read, listed and found by its path, and the reverse."""
    uri, path = f"file://{tmp_path}/folder/file", tmp_path / "folder" / "file"
    storage.write_atomic(uri, b"by URI")
    assert path.read_bytes() == b"by URI"
    path.write_bytes(b"by path")
    assert storage.read_bytes(uri) == b"by path"
    assert storage.list_files(f"file://{tmp_path}") == ["folder/file"]
    assert storage.exists(uri)
    assert storage.local_path(uri) == storage.local_path(str(path)) == path
    assert storage.absolute_uri(uri) == uri


def test_relative_paths_and_home_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the working folder; ~ is the user's home; $VMOCO_HOME is taken where it is set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("VMOCO_HOME", raising=False)
    assert storage.absolute_uri("data/../set") == f"{tmp_path}/set"
    assert storage.absolute_uri("~/set") == "/home/somebody/set"
    assert storage.home() == "/home/somebody/.vmoco"
    monkeypatch.setenv("VMOCO_HOME", "here")
    assert storage.home() == f"{tmp_path}/here"


@pytest.mark.parametrize("uri", ["http://host/set", "S3://bucket/set", "models://name"])
def test_unknown_scheme_is_refused(uri: str) -> None:
    """The message has the value, its scheme and what is allowed."""
    with pytest.raises(
        ValueError, match=rf"'{uri}' has the scheme '{uri.split(':', maxsplit=1)[0]}'.*file://, s3:// or gs://"
    ):
        storage.absolute_uri(uri)


def test_empty_location_is_refused() -> None:
    """An empty location does not mean the working folder."""
    with pytest.raises(ValueError, match="empty: give a path or a URI"):
        storage.absolute_uri("")


@pytest.mark.parametrize("uri", ["/a/b", "s3://bucket/b", "~/b", "file:///a/b"])
def test_submitted_job_takes_absolute_places(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """In a submitted job, a URI or an absolute path is accepted as outside of one."""
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    outside = storage.require_absolute(uri, "data.uri")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert storage.require_absolute(uri, "data.uri") == outside
    assert outside.endswith("/b")


def test_submitted_job_refuses_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the setting and its value; outside a submitted job the same path is taken."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match=r"^data\.uri 'set' is a relative path.*absolute path or a URI"):
        storage.require_absolute("set", "data.uri")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert storage.require_absolute("set", "data.uri") == str(Path.cwd() / "set")


@pytest.mark.parametrize("folder", ["/a", "/a/", "s3://bucket/a", "s3://bucket/a/"])
def test_join_puts_one_slash_between(folder: str) -> None:
    """Whether or not the folder ends in a slash."""
    assert storage.join(folder, "b", "c.txt") == folder.removesuffix("/") + "/b/c.txt"


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(name=names(), below=names())
def test_any_name_is_written_and_read_back(name: str, below: str) -> None:
    """Whatever characters a folder and a file have, up to 255 bytes: the file has that name, and no other is there."""
    hypothesis.assume(not below.endswith(".tmp"))
    with tempfile.TemporaryDirectory() as root:
        uri = storage.join(f"file://{root}", name, below)
        storage.write_atomic(uri, b"content")
        assert os.listdir(f"{root}/{name}") == [below]
        assert storage.read_bytes(uri) == b"content"
        assert storage.exists(uri)
        assert storage.list_files(storage.join(root, name)) == [below]
        with storage.open_atomic(uri) as file:
            file.write(b"another")
        assert Path(root, name, below).read_bytes() == b"another"
        storage.check_writable(storage.join(root, name))
        storage.delete_file(uri)
        storage.delete_leftovers(uri)
        assert os.listdir(f"{root}/{name}") == []


def test_only_file_uris_are_decoded() -> None:
    """Once, and not in what is appended; the name of an object is taken as it is."""
    assert storage.join("file:///a%20b", "c%20d") == "/a b/c%20d"
    assert storage.local_path("file:///a%2520b") == Path("/a%20b")
    assert storage.join("s3://bucket/a%20b", "c%20d") == "s3://bucket/a%20b/c%20d"


def test_a_killed_writer_of_a_long_name_leaves_what_can_be_removed(tmp_path: Path) -> None:
    """The temporary file of a name of 255 bytes has a valid name, and is found again."""
    name = "é" * 127 + "x"
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path / name)], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    storage.delete_leftovers(str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_final(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space and no quota are raised at once; what may pass is tried again."""
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)

    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        storage.patiently(lambda: fail(code))
    assert waits == []
    with pytest.raises(OSError, match="Input/output error"):
        storage.patiently(lambda: fail(errno.EIO))
    assert len(waits) == 3


def test_free_space_is_that_of_the_disk(tmp_path: Path) -> None:
    """Also of a folder that does not exist yet; stores have no limit."""
    free = storage.free_bytes(str(tmp_path / "not" / "yet"))
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert storage.free_bytes(f"file://{tmp_path}") == pytest.approx(free, rel=0.05)
    assert storage.gigabytes(12.34e9) == "12.3 GB"
    assert storage.gigabytes(4.5e6) == "4.5 MB"


def test_unwritable_place_shows_before_the_work(tmp_path: Path) -> None:
    """`check_writable` leaves nothing in a good place, and refuses one below a file with its reason."""
    storage.check_writable(str(tmp_path / "good"))
    assert below(tmp_path / "good") == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"{tmp_path}/file cannot be written \(.+\): check the path"):
        storage.check_writable(str(tmp_path / "file"))


@pytest.mark.parametrize(
    "uri",
    ["s3://AKIAHIDDEN:hidden@bucket/data", "s3://bucket/data?access_key=hidden&secret_key=hidden", "gs://h:i@b/x"],
)
def test_a_uri_with_a_key_in_it_is_refused_without_repeating_it(uri: str) -> None:
    """The message says where keys belong, and contains neither key nor URI."""
    with pytest.raises(ValueError, match=r"carries a key, .*AWS_ACCESS_KEY_ID .*create a new key") as raised:
        storage.absolute_uri(uri)
    assert "hidden" not in str(raised.value).lower()
    assert storage.absolute_uri("s3://bucket/a@b") == "s3://bucket/a@b"


def test_what_a_killed_writer_leaves_is_removed(tmp_path: Path) -> None:
    """A process killed in the middle of a write leaves a hidden file: it goes, and those of other files stay."""
    write = "with storage.open_atomic(sys.argv[1]) as file: os.kill(os.getpid(), signal.SIGKILL)"
    code = f"import os, signal, sys; from vmoco import storage\n{write}"
    for name in ("list[1].json", "list[1].json.md"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    storage.delete_leftovers(str(tmp_path / "list[1].json"))
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".list[1].json.md.")
    storage.delete_leftovers(str(tmp_path / "list[1].json.md"))
    assert list(tmp_path.iterdir()) == []
    storage.delete_leftovers(str(tmp_path / "nowhere" / "list.json"))
