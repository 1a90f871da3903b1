"""Gives a decoder one video: a file on this machine, or ranges of a remote one.

A remote video is copied to a temporary file, in pieces, so memory does not depend on its size, and a slow store does
not use up the decoder's time limit. A part of a long video is read by ranges instead: other tasks read the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from vmoco import storage
from vmoco.data.ledger import ScratchError, VideoError
from vmoco.data.source import Found

_PIECE_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class RemoteVideo:
    """A video that is read by ranges."""

    uri: str
    num_bytes: int


Source = str | RemoteVideo
"""Where a decoder reads a video: the path of a file on this machine, or a remote one."""


@contextlib.contextmanager
def local_copy(root: str, found: Found) -> Iterator[str]:
    """Path of the video on this machine; a remote one is copied and deleted at the end of the block.

    Raises:
        VideoError: it cannot be read, is empty, or has changed since it was listed.
        ScratchError: the copy cannot be written.
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
            message = f"{found.num_bytes} bytes when it was listed, {size} when it was read"
            raise VideoError("read", "changed", message, transient=True)
        yield path


def file_sha256(path: str) -> str:
    """Hash of a local file.

    Raises:
        VideoError: it cannot be read.
    """
    with _errors(), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ranged(root: str, found: Found) -> Source:
    """A source of which no more is read than the decoder asks for."""
    local = storage.local_path(root)
    if local is not None:
        return str(local / found.path)
    return RemoteVideo(storage.join(root, found.path), found.num_bytes)


def readable(source: Source) -> str | BinaryIO:
    """What PyAV opens: the path, or a file that reads ranges of a remote video."""
    if isinstance(source, str):
        return source
    return RangedFile(source.uri, num_bytes=source.num_bytes)  # type: ignore[return-value]


class RangedFile(io.RawIOBase):
    """A remote file for reading; each read asks for a range, and asks again when the store fails."""

    def __init__(self, uri: str, *, num_bytes: int) -> None:
        self.name = uri
        self._filesystem, self._path = storage.filesystem(uri)
        self._num_bytes, self._at = num_bytes, 0
        self._file: Any = None

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
            file, self._file = self._file or self._filesystem.open_input_file(self._path), None
            content = bytes(file.read_at(size, self._at))
            self._file = file  # only after a success: a connection that failed is opened again
            return content

        with _errors():
            content = storage.patiently(read)
        self._at += len(content)
        return content


def _copy(place: str, target: BinaryIO) -> int:
    filesystem, path = storage.filesystem(place)

    def copy() -> int:
        with _scratch_errors():
            target.seek(0)
            target.truncate()
        with filesystem.open_input_stream(path) as stream:
            while piece := stream.read(_PIECE_BYTES):
                with _scratch_errors():
                    target.write(piece)
        with _scratch_errors():
            target.flush()
        return target.tell()

    return storage.patiently(copy)


@contextlib.contextmanager
def _scratch_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = tempfile.gettempdir()
        raise ScratchError(
            f"cannot copy a video to {folder}: {error.strerror or error}; free space there, or set TMPDIR"
        ) from error


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise VideoError("read", "missing", "it was listed, but is gone", transient=True) from None
    except PermissionError:
        raise VideoError("read", "no-permission", "its permissions do not allow reading it", transient=True) from None
    except OSError as error:
        message = error.strerror or next(iter(str(error).splitlines()), "") or type(error).__name__
        raise VideoError("read", "read-error", message, transient=True) from None
