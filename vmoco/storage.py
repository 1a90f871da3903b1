"""Reads and writes files at a URI: a local path, file://, s3://, gs://.

A name is taken as it is: `%`, `?` and `#` in the name of an object are no syntax, as in the tools of the stores. Only
file:// is decoded, once, because other programs write it quoted; names that are appended to it are not quoted.

Everything that is published goes through `write_atomic` or `open_atomic`: under its final name a file is complete or
absent. On a local file system that takes a temporary name, fsync and a rename; an object store shows an object only
when its upload is complete.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import io
import os
import shutil
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import pyarrow.fs as pafs

_WAITS_SECONDS = (0.5, 2.0, 8.0)
_IN_FLIGHT_BYTES = 10 * 2**20
"""Most bytes that wait to be sent to a store: one part of an S3 upload in Arrow."""
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "Not Found", "OAuth2 access token")  # in the messages of object stores
_GOOGLE_SECONDS = 30
"""For how long Arrow repeats a request to a Google store; its default is 15 minutes, without a message."""
_ENVIRONMENT = ("AWS_", "CLOUD_STORAGE_", "GOOGLE_", "GCE_", "HOME")
"""Beginnings of the variables that decide how Arrow opens a store."""
_NAME_BYTES = 255
"""Longest file name of Linux file systems."""
Result = TypeVar("Result")


def patiently(action: Callable[[], Result]) -> Result:
    """Repeats, with growing waits, what failed for now: a 500, a time-out, a lost connection.

    `action` starts from the beginning each time. Permanent errors (no such file, no permission) are raised at once.

    Raises:
        OSError: the error of the last try.
    """
    for seconds in _WAITS_SECONDS:
        try:
            return action()
        except _FINAL:
            raise
        except OSError as error:
            if error.errno in _FULL or any(sign in str(error) for sign in _REFUSED):
                raise
            time.sleep(seconds)
    return action()


def absolute_uri(uri: str) -> str:
    """Makes a relative local path absolute and leaves every other URI as it is.

    Raises:
        ValueError: it is empty, has an unknown scheme, or contains a key.
    """
    if not uri:
        raise ValueError("the location is empty: give a path or a URI (file://, s3://, gs://)")
    if "://" not in uri:
        return os.path.abspath(os.path.expanduser(uri))
    scheme = uri.split("://", 1)[0]
    if scheme not in ("file", "s3", "gs", "gcs"):
        raise ValueError(f"{uri!r} has the scheme {scheme!r}: a path, file://, s3:// or gs:// is allowed")
    rest = uri.split("://", 1)[1]
    query = urllib.parse.parse_qs(rest.partition("?")[2])
    if "@" in rest.partition("/")[0] or {"access_key", "secret_key"} & query.keys():
        # Without the URI itself: this message is kept in logs too.
        raise ValueError(
            f"a URI of scheme {scheme} carries a key, which would stay in logs, with the job and in the tracker: put "
            "it into the environment of the nodes (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "GOOGLE_APPLICATION_CREDENTIALS), and create a new key, because others may have seen this one"
        )
    return uri


def join(uri: str, *names: str) -> str:
    """Appends names, as they are, to a path or URI."""
    if uri.startswith("file://"):
        uri = urllib.parse.unquote(uri.removeprefix("file://"))
    return "/".join([uri.rstrip("/"), *names])


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system of a path or URI, and the path inside it."""
    uri = absolute_uri(uri)
    if "://" not in uri:
        return pafs.LocalFileSystem(use_mmap=True), uri
    scheme, path = uri.split("://", 1)
    if scheme == "file":
        return pafs.LocalFileSystem(use_mmap=True), urllib.parse.unquote(path)
    options = "" if scheme == "s3" else f"?retry_limit_seconds={_GOOGLE_SECONDS}"
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT)))
    return _open_store(f"{scheme}://{path.partition('/')[0]}{options}", environment), path.rstrip("/")


@functools.lru_cache(maxsize=16)
def _open_store(root: str, environment: tuple[tuple[str, str], ...]) -> pafs.FileSystem:
    """The file system of a bucket, opened once: opening one may ask the store for its region."""
    return pafs.FileSystem.from_uri(root)[0]


def local_path(uri: str) -> Path | None:
    """The path on this machine's disk, or None where the URI is remote."""
    found, path = filesystem(uri)
    return Path(path) if isinstance(found, pafs.LocalFileSystem) else None


def exists(uri: str) -> bool:
    """Whether a file or folder exists."""
    found, path = filesystem(uri)
    return bool(found.get_file_info(path).type != pafs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: it does not exist.
    """
    found, path = filesystem(uri)

    def read() -> bytes:
        with found.open_input_stream(path) as stream:
            return bytes(stream.read())

    return read() if isinstance(found, pafs.LocalFileSystem) else patiently(read)


@contextlib.contextmanager
def on_disk(uri: str) -> Iterator[Path]:
    """A file on this machine's disk; a remote one is copied, and the copy is deleted at the end of the block.

    Raises:
        OSError: it cannot be read; of a file that is on this disk already, opening it says so.
    """
    local = local_path(uri)
    if local is not None:
        yield local
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "copy")
        fetch(uri, local)
        yield local


def lines(uri: str) -> Iterator[bytes]:
    """The lines of a file, one after the other; none if there is no file. A remote file is copied to local disk first.

    Raises:
        OSError: it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(stack.enter_context(on_disk(uri)), "rb"))
        except FileNotFoundError:
            return
        yield from file


def write_atomic(uri: str, content: bytes | memoryview) -> None:
    """Writes a file, which appears only when it is complete; creates its folder.

    Raises:
        ValueError: it cannot be written; the message says why.
    """
    found, path = filesystem(uri)
    try:
        if isinstance(found, pafs.LocalFileSystem):
            _write_local(Path(path), content)
        else:
            patiently(lambda: _upload(found, path, io.BytesIO(content)))
    except OSError as error:
        raise ValueError(f"cannot write {uri}: {error.strerror or error}") from error


def _upload(target: pafs.FileSystem, path: str, file: BinaryIO) -> None:
    file.seek(0)
    with target.open_output_stream(path) as stream:
        while piece := file.read(_IN_FLIGHT_BYTES):
            stream.write(piece)
            # Waits for the upload: Arrow sends in the background, and would keep the backlog of a slow store in memory.
            stream.flush()


def _write_local(path: Path, content: bytes | memoryview) -> None:
    with _open_local(path) as file:
        file.write(content)


@contextlib.contextmanager
def _open_local(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_temporary_prefix(path)}{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_prefix(path: Path) -> str:
    """What the names of temporary files of a file begin with; a long name gives its hash, so they stay valid."""
    name = os.fsencode(path.name)
    fits = len(name) + len(f"..{uuid.uuid4().hex}.tmp") <= _NAME_BYTES
    return f".{path.name if fits else hashlib.sha256(name).hexdigest()}."


def delete_leftovers(uri: str) -> None:
    """Removes temporary files that killed writers of a file left beside it; no process may be writing it now."""
    path = local_path(uri)
    if path is not None:  # an object store shows nothing of an incomplete upload
        for temporary in path.parent.glob(f"{glob.escape(_temporary_prefix(path))}{'[0-9a-f]' * 32}.tmp"):
            temporary.unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Removes a folder and its content, if it exists."""
    found, path = filesystem(uri)
    if found.get_file_info(path).type == pafs.FileType.Directory:
        # On a Google store Arrow empties the folder, and then fails because no object has the folder's own name.
        with contextlib.suppress(FileNotFoundError):
            found.delete_dir(path)


def list_files(uri: str, *, recursive: bool = True) -> list[str]:
    """Paths of the files below a folder, relative to it and sorted; temporary files are left out.

    Raises:
        ValueError: the folder does not exist.
    """
    found, path = filesystem(uri)
    path = path.rstrip("/") or "/"
    if found.get_file_info(path).type != pafs.FileType.Directory:
        raise ValueError(f"{uri} is not a folder that can be read: check the path and its permissions")
    entries = found.get_file_info(pafs.FileSelector(path, recursive=recursive))
    names = (entry.path[len(path) :].lstrip("/") for entry in entries if entry.type == pafs.FileType.File)
    return sorted(name for name in names if not name.endswith(".tmp"))


def check_writable(uri: str) -> None:
    """Writes and removes a small file, so that a missing permission shows before the work starts.

    Raises:
        ValueError: the folder cannot be written.
    """
    probe = join(uri, f".writable-{uuid.uuid4().hex}.tmp")
    found, path = filesystem(probe)
    try:
        write_atomic(probe, b"")
        found.delete_file(path)
    except (OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        reason = getattr(cause, "strerror", None) or cause
        raise ValueError(f"{uri} cannot be written ({reason}): check the path and its permissions") from error


def free_bytes(uri: str) -> int | None:
    """Free space for files at a path; None for object stores, and for file systems that do not tell.

    A quota of the user is not part of it: only a write finds that.
    """
    place = local_path(uri)
    if place is None:
        return None
    while not place.exists() and place != place.parent:
        place = place.parent
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def gigabytes(num_bytes: float) -> str:
    """A size for people: `12.3 GB`, or `4.5 MB` below a tenth of that unit."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def home() -> str:
    """The folder of data, runs, caches and the tracking database on this machine: $VMOCO_HOME, or ~/.vmoco."""
    return absolute_uri(os.environ.get("VMOCO_HOME", "~/.vmoco"))


@contextlib.contextmanager
def open_atomic(uri: str) -> Iterator[BinaryIO]:
    """Opens a file for writing that gets its name only when the block ends without an error; creates its folder.

    A remote file is written to local disk first, because an upload that was begun cannot be cancelled.

    Raises:
        ValueError: it cannot be written; the message says why.
    """
    found, path = filesystem(uri)
    try:
        if isinstance(found, pafs.LocalFileSystem):
            with _open_local(Path(path)) as file:
                yield file
        else:
            with tempfile.TemporaryFile() as file:
                yield file
                patiently(lambda: _upload(found, path, file))
    except OSError as error:
        raise ValueError(f"cannot write {uri}: {error.strerror or error}") from error


def require_absolute(uri: str, setting: str) -> str:
    """The absolute form of a path or URI; in a submitted job a relative path is refused.

    A job runs in a folder that Ray unpacks for it and later removes, so a relative path names no file of the user.

    Raises:
        ValueError: a relative path in a submitted job, or what `absolute_uri` raises.
    """
    relative = "://" not in uri and not os.path.isabs(os.path.expanduser(uri))
    if uri and relative and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        raise ValueError(
            f"{setting} {uri!r} is a relative path, and a submitted job does not run in your folder: "
            "give an absolute path or a URI (file://, s3://, gs://) that every node can reach"
        )
    return absolute_uri(uri)


def list_folders(uri: str) -> list[str]:
    """Names of the folders in a folder, sorted; empty when it does not exist."""
    found, path = filesystem(uri)
    entries = found.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(entry.base_name for entry in entries if entry.type == pafs.FileType.Directory)


def delete_file(uri: str) -> None:
    """Removes a file, if it exists."""
    found, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        found.delete_file(path)


def publish(path: Path, uri: str) -> None:
    """Moves a finished local file to a URI, where it appears only when it is complete.

    Raises:
        ValueError: it cannot be written; the message says why.
    """
    found, target = filesystem(uri)
    try:
        if isinstance(found, pafs.LocalFileSystem) and os.path.isdir(os.path.dirname(target)):
            with contextlib.suppress(OSError):  # on another disk: copied below
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(path, target)
                return
        with open(path, "rb") as source, open_atomic(uri) as file:
            shutil.copyfileobj(source, file, length=2**22)
        path.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {uri}: {error.strerror or error}") from error


def file_sha256(uri: str) -> str:
    """SHA-256 of a file, read in pieces.

    Raises:
        FileNotFoundError: it does not exist.
    """
    digest = hashlib.sha256()
    found, path = filesystem(uri)
    with found.open_input_stream(path) as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def make_folder(uri: str) -> None:
    """Creates a local folder and its parents, if missing; object stores have no folders."""
    if (local := local_path(uri)) is not None:
        local.mkdir(parents=True, exist_ok=True)


def fetch(uri: str, path: Path) -> None:
    """Copies a file onto this machine's disk.

    Raises:
        FileNotFoundError: it does not exist.
    """
    found, source = filesystem(uri)

    def copy() -> None:
        with found.open_input_stream(source) as stream, open(path, "wb") as file:
            shutil.copyfileobj(stream, file, length=2**22)

    patiently(copy)
