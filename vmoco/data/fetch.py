"""One video, where a decoder can read it: a file on this machine, or ranges of a remote one.

A remote video is copied to a temporary file, in pieces, so that memory does not depend on its size and a slow store
cannot hurry anybody. A part of a long video is read by ranges instead: other tasks read the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from vmoco import storage
from vmoco.data.ledger import VideoError
from vmoco.data.source import Found

_PIECE = 2**22  # bytes


@contextlib.contextmanager
def local_copy(root: str, found: Found) -> Iterator[str]:
    """Path of the video on this machine; a remote one is copied for as long as the block lasts.

    Raises:
        VideoError: it cannot be read, is empty, or is not what was listed.
    """
    place = storage.join(root, found.path)
    local = storage.local_path(root)
    with contextlib.ExitStack() as stack:
        with _errors():
            if local is not None:
                path = str(local / found.path)
                size = os.stat(path).st_size
            else:
                suffix = os.path.splitext(found.path)[1]
                copy: Any = stack.enter_context(tempfile.NamedTemporaryFile(prefix="vmoco-video-", suffix=suffix))
                path, size = copy.name, _copy(place, copy)
        if not size:
            raise VideoError("read", "empty", "the file has no bytes")
        if size != found.num_bytes:
            said = f"{found.num_bytes} bytes when it was listed, {size} when it was read"
            raise VideoError("read", "changed", said, transient=True)
        yield path


def file_sha256(path: str) -> str:
    """Hash of a local file.

    Raises:
        VideoError: it cannot be read.
    """
    with _errors(), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ranged(root: str, found: Found) -> dict[str, Any]:
    """A source for `opened` that reads no more of the video than the decoder asks for."""
    local = storage.local_path(root)
    if local is not None:
        return {"path": str(local / found.path)}
    return {"uri": storage.join(root, found.path), "num_bytes": found.num_bytes}


@contextlib.contextmanager
def opened(source: dict[str, Any]) -> Iterator[str | BinaryIO]:
    """What PyAV opens: the path in a source, or a file that reads ranges of its URI."""
    if "path" in source:
        yield source["path"]
    else:
        yield RangedFile(source["uri"], num_bytes=source["num_bytes"])  # type: ignore[misc]


class RangedFile(io.RawIOBase):
    """A remote file for reading; each read is a ranged one, tried again when the store fails."""

    def __init__(self, uri: str, *, num_bytes: int) -> None:
        self.name = uri
        self._filesystem, self._path = storage.filesystem(uri)
        self._num_bytes, self._at = num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._num_bytes - self._at)
        size = left if size < 0 else min(size, left)
        if not size:
            return b""

        def read() -> bytes:
            with self._filesystem.open_input_file(self._path) as file:
                return bytes(file.read_at(size, self._at))

        with _errors():
            content = storage.patiently(read)
        self._at += len(content)
        return content


def _copy(place: str, target: BinaryIO) -> int:
    filesystem, path = storage.filesystem(place)

    def copy() -> int:
        target.seek(0)
        target.truncate()
        with filesystem.open_input_stream(path) as stream:
            while piece := stream.read(_PIECE):
                target.write(piece)
        target.flush()
        return target.tell()

    return storage.patiently(copy)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise VideoError("read", "missing", "it was listed, but is gone", transient=True) from None
    except PermissionError:
        raise VideoError("read", "no-permission", "its rights do not allow reading it", transient=True) from None
    except OSError as error:
        said = error.strerror or str(error).splitlines()[0] or type(error).__name__
        raise VideoError("read", "read-error", said, transient=True) from None
