"""Reads the text of a list of videos line by line: a list may be longer than memory."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmoco import storage

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ListFile:
    """A list, which messages call by its URI."""

    uri: str
    copy: Path | None = None
    """Where it is on this machine's disk, if it was copied there, because it is read several times."""

    def __str__(self) -> str:
        return self.uri

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        """Its file, on this machine's disk.

        Raises:
            ValueError: it cannot be read, or copied.
        """
        with contextlib.ExitStack() as stack:
            try:
                path = self.copy or stack.enter_context(storage.on_disk(self.uri))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    folder = tempfile.gettempdir()
                    raise ValueError(
                        f"list {self} cannot be copied to {folder} ({error.strerror}): free space there, or set TMPDIR"
                    ) from None
                raise ValueError(f"list {self} cannot be read: {str(error).splitlines()[0]}") from None
            yield path


@contextlib.contextmanager
def copied(uri: str) -> Iterator[ListFile]:
    """A list that is read several times; if it is in a store, it is copied once.

    Raises:
        ValueError: it cannot be read, or copied.
    """
    with ListFile(uri).on_disk() as path:
        yield ListFile(uri, path)


def read_text(file: ListFile) -> str:
    """The whole text of a list that is known to be short, or cannot be read in parts.

    Raises:
        ValueError: the file cannot be read, or is not text.
    """
    return "".join(_decoded(file))


def read_lines(file: ListFile) -> Iterator[str]:
    """The lines of a list, without their ends, which may be any that Unicode knows.

    Raises:
        ValueError: the file cannot be read, or is not text.
    """
    for line in _decoded(file):
        yield from line.splitlines()


def read_with_ends(file: ListFile) -> Iterator[str]:
    r"""The lines of a list with their ends, which are \n, \r or \r\n: for CSV and JSON, which may hold other ends.

    Raises:
        ValueError: the file cannot be read, or is not text.
    """
    for line in _decoded(file):
        yield from io.StringIO(line, newline="")


def read_cells(file: ListFile) -> Iterator[list[str]]:
    """The lines of a text list whose labels contain no separator, or are quoted, without empty lines.

    The first of tab, semicolon and comma in its first line separates; otherwise spaces do.

    Raises:
        ValueError: the file cannot be read, or has no line.
    """
    first = next((line for line in read_lines(file) if line.strip()), "")
    separator = next((sign for sign in "\t;," if sign in first), None)
    rows: Iterable[list[str]]
    if separator is None:
        rows = (line.split() for line in read_lines(file))
    else:
        reader = csv.reader(read_with_ends(file), delimiter=separator, skipinitialspace=True)
        rows = ([cell.strip() for cell in row] for row in reader)
    empty = True
    for row in rows:
        if any(row):
            empty = False
            yield row
    if empty:
        raise ValueError(f"list {file} has no rows")


def first_cells(file: ListFile) -> list[str]:
    """The first of `read_cells`.

    Raises:
        ValueError: as `read_cells`.
    """
    return next(read_cells(file))


def is_text(value: str) -> bool:
    """Whether a text can be written: JSON may hold half a character, and the name of a file bytes that are none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decoded(file: ListFile) -> Iterator[str]:
    r"""The text in pieces that end with \n.

    Raises:
        ValueError: the file cannot be read, or is not text.
    """
    number, encoding = 0, "UTF-8"
    try:
        with file.on_disk() as path, open(path, "rb") as content:
            begin = content.read(2)
            content.seek(0)
            if begin in (b"\xff\xfe", b"\xfe\xff"):
                encoding = "UTF-16"
                for number, text in enumerate(io.TextIOWrapper(content, "utf-16", newline="\n"), start=1):  # noqa: B007
                    yield text
                return
            for number, line in enumerate(content, start=1):
                yield (line.removeprefix(_BOM) if number == 1 else line).decode()
    except OSError as error:
        raise ValueError(f"list {file} cannot be read: {str(error).splitlines()[0]}") from None
    except UnicodeDecodeError as error:
        where = f"at byte {error.start} of line {number}" if encoding == "UTF-8" else f"after line {number}"
        raise ValueError(f"list {file} is not {encoding} text ({error.reason} {where}): convert it") from None
