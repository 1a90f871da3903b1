"""A file, or a part of one, that is read by ranges: of a store no more is read than the reader asks for.

So the frames around a clip are read without the rest, once probing has read all of the file, and a video in a tar file
without unpacking it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs

from vmoco import storage
from vmoco.data.ledger import VideoError


@dataclasses.dataclass(frozen=True)
class FileRange:
    """Bytes of a file, local or remote, that are a video."""

    uri: str
    """Of the file."""
    num_bytes: int
    """Size of the video."""
    offset: int = 0
    """Byte of the file at which the video begins."""
    name: str = ""
    """Of the video, whose ending tells FFmpeg what a bare stream is; that of the file where it is empty."""


class RangedFile(io.RawIOBase):
    """A range of a file, for reading; each read asks for bytes, and asks again when the store fails."""

    def __init__(self, uri: str, *, num_bytes: int, offset: int = 0, name: str = "") -> None:
        self.name = name or uri
        self._filesystem, self._path = storage.filesystem(uri)
        if isinstance(self._filesystem, pafs.LocalFileSystem):
            # A file that shrinks while a memory map of it is read ends the process.
            self._filesystem = pafs.LocalFileSystem(use_mmap=False)
        self._num_bytes, self._offset, self._at = num_bytes, offset, 0
        self._file: Any = None

    @classmethod
    def of(cls, place: FileRange) -> RangedFile:
        """The file of that range."""
        return cls(place.uri, num_bytes=place.num_bytes, offset=place.offset, name=place.name)

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
            content = bytes(file.read_at(size, self._offset + self._at))
            self._file = file  # only after a success: a connection that failed is opened again
            return content

        with read_errors():
            content = storage.patiently(read)
        self._at += len(content)
        return content


@contextlib.contextmanager
def read_errors() -> Iterator[None]:
    """Turns errors of the file system or store into those of the video that is read."""
    try:
        yield
    except FileNotFoundError:
        raise VideoError("read", "missing", "it was listed, but is gone", transient=True) from None
    except PermissionError:
        raise VideoError("read", "no-permission", "its permissions do not allow reading it", transient=True) from None
    except OSError as error:
        message = error.strerror or next(iter(str(error).splitlines()), "") or type(error).__name__
        raise VideoError("read", "read-error", message, transient=True) from None
