"""Reads the text of a list of videos line by line: a list may be longer than memory."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from vmoco import storage

_BOM = b"\xef\xbb\xbf"


def read_text(uri: str) -> str:
    """The whole text of a list that is known to be short, or cannot be read in parts.

    Raises:
        ValueError: the file cannot be read, or is not text.
    """
    return "".join(_decoded(uri))


def read_lines(uri: str) -> Iterator[str]:
    """The lines of a list, without their ends.

    Raises:
        ValueError: the file cannot be read, or is not text.
    """
    for line in _decoded(uri):
        yield from line.splitlines()


def read_cells(uri: str) -> Iterator[list[str]]:
    """The lines of a text list whose labels contain no separator, or are quoted, without empty lines.

    The first of tab, semicolon and comma in its first line separates; otherwise spaces do.

    Raises:
        ValueError: the file cannot be read, or has no line.
    """
    first = next((line for line in read_lines(uri) if line.strip()), "")
    separator = next((sign for sign in "\t;," if sign in first), None)
    rows: Iterable[list[str]]
    if separator is None:
        rows = (line.split() for line in read_lines(uri))
    else:
        reader = csv.reader(_with_ends(uri), delimiter=separator, skipinitialspace=True)
        rows = ([cell.strip() for cell in row] for row in reader)
    empty = True
    for row in rows:
        if any(row):
            empty = False
            yield row
    if empty:
        raise ValueError(f"list {uri} has no rows")


def first_cells(uri: str) -> list[str]:
    """The first of `read_cells`.

    Raises:
        ValueError: as `read_cells`.
    """
    return next(read_cells(uri))


def _with_ends(uri: str) -> Iterator[str]:
    r"""The lines with their ends, which are \n, \r or \r\n: in quotes, csv keeps them."""
    for line in _decoded(uri):
        yield from io.StringIO(line, newline="")


def _decoded(uri: str) -> Iterator[str]:
    r"""The text in pieces that end with \n.

    Raises:
        ValueError: the file cannot be read, or is not text.
    """
    number = 1
    try:
        with storage.on_disk(uri) as path, open(path, "rb") as file:
            begin = file.read(2)
            file.seek(0)
            if begin in (b"\xff\xfe", b"\xfe\xff"):
                yield from io.TextIOWrapper(file, "utf-16", newline="\n")
                return
            for number, line in enumerate(file, start=1):
                yield (line.removeprefix(_BOM) if number == 1 else line).decode()
    except OSError as error:
        raise ValueError(f"list {uri} cannot be read: {str(error).splitlines()[0]}") from None
    except UnicodeDecodeError as error:
        what = f"{error.reason} at byte {error.start} of line {number}"
        raise ValueError(f"list {uri} is not UTF-8 text ({what}): convert it") from None
