"""Reads text lists of videos, as SlowFast, VideoMAE, mae_st and others write them: one video on each line.

    path                     run/a.mp4
    path label               run/a.mp4 3            spaces, tabs or commas
    path start end label     run/a.mp4,2.5,9,run    seconds; an end of -1 is the end of the file
    path frames label        run/a 164 3            folders of pictures, as TSN and MMAction2 write them
    with a header            file;class;group       columns in any order (`;` too)

Neither the separator nor the number of fields is written anywhere, and both paths and labels may contain spaces and
commas. So the videos decide: the form in which most lines name a file that is there.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from typing import Any

from vmoco import storage
from vmoco.data.found import Found
from vmoco.data.listed_files import ListedFiles, seconds

_HEADERS = {
    "path": "path file filename file_name filepath file_path video video_path video_name name",
    "label": "label labels class class_id class_name label_id category action",
    "start_seconds": "start_seconds start start_time time_start start_sec",
    "end_seconds": "end_seconds end end_time time_end end_sec",
    "video_id": "video_id",
    "split": "split subset",
    "group": "group",
}
_COLUMNS = {header: column for column, headers in _HEADERS.items() for header in headers.split()}
FORMS = (
    "`path`, `path label`, `path start end label`, `path frames label` of folders of pictures, or lines below a header "
    "with the column path"
)
_SAMPLE = 2000
"""Lines that decide the form, spread evenly over the list."""

_Parse = Callable[[str], "dict[str, Any] | None"]


def read_text(uri: str) -> str:
    """The text of a list.

    Raises:
        ValueError: the file cannot be read, or is not text.
    """
    try:
        content = storage.read_bytes(uri)
    except OSError as error:
        raise ValueError(f"list {uri} cannot be read: {str(error).splitlines()[0]}") from None
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"list {uri} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None


def read_cells(uri: str) -> list[list[str]]:
    """The lines of a text list whose labels contain no separator, or are quoted, without empty lines.

    The first of tab, semicolon and comma in its first line separates; otherwise spaces do.

    Raises:
        ValueError: the file cannot be read, or has no line.
    """
    text = read_text(uri)
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = next((sign for sign in "\t;," if sign in first), None)
    if separator is None:
        rows = [line.split() for line in text.splitlines()]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        rows = [[cell.strip() for cell in row] for row in reader]
    rows = [row for row in rows if any(row)]
    if not rows:
        raise ValueError(f"list {uri} has no rows")
    return rows


def read_filelist(uri: str, files: ListedFiles) -> tuple[list[Found], str]:
    """The entries of a text list, and the form in which it was read, for the user.

    Raises:
        ValueError: a line does not fit, no form or more than one fits, or a path is outside the folder.
    """
    header = _header(read_cells(uri)[0], files)
    if header:
        rows = [dict(zip(header, row, strict=False)) for row in read_cells(uri)[1:]]
        if not rows:
            raise ValueError(f"list {uri} has no rows")
        named = [files.entry(_row(row), where=f"{uri}, row {number}") for number, row in enumerate(rows, start=1)]
        return named, f"columns {', '.join(header)}"
    lines = [(number, line.strip()) for number, line in enumerate(read_text(uri).splitlines(), start=1) if line.strip()]
    form, parse = _form(uri, [line for _, line in lines], files)
    named = []
    for number, line in lines:
        row = parse(line)
        if row is None:
            raise ValueError(f"{uri}, line {number}: {line!r} is not {form}, as other lines are")
        named.append(files.entry(row, where=f"{uri}, line {number}"))
    return named, form


def _header(cells: list[str], files: ListedFiles) -> list[str]:
    """The column of each cell of the first line; empty where it is not a header."""
    columns = [_COLUMNS.get(cell.lower(), "") for cell in cells]
    is_header = "path" in columns and all(columns) and len(set(columns)) == len(columns)
    return columns if is_header and files.find(cells[0]) is None else []


def _form(uri: str, lines: list[str], files: ListedFiles) -> tuple[str, _Parse]:
    """The form in which most lines name a file, by its name, and how it reads a line.

    Raises:
        ValueError: no form fits, or two do.
    """
    for part in (lines[:: max(1, len(lines) // _SAMPLE)], lines):
        best, chosen, read_so = 0, "", []
        rival = ""
        for form, parse in _PARSERS.items():
            rows = [parse(line) for line in part]
            count = sum(row is not None and _names_a_file(row, files) for row in rows)
            if count > best:
                best, chosen, read_so, rival = count, form, rows, ""
            elif count and count == best and rows != read_so and form != _FIRST_SPACE:
                rival = form
        if rival:
            raise ValueError(
                f"list {uri} can be read as {chosen} and as {rival}, and both name {best} videos of {files.root}: "
                "write a header, for example path,label"
            )
        if chosen:
            return chosen, _PARSERS[chosen]
    raise ValueError(
        f"none of the {len(lines)} videos that {uri} names is in {files.root}: check --videos and --annotations. "
        f"Its first line is {lines[0]!r}; allowed are {FORMS}"
    )


def _names_a_file(row: Mapping[str, Any], files: ListedFiles) -> bool:
    try:
        found = files.find(files.below_root(row["path"], where=""))
    except ValueError:
        return False
    return found in files.folders if _NUM_FRAMES in row else found is not None


def _row(cells: Mapping[str, str]) -> dict[str, Any]:
    """A row of the list as `ListedFiles.entry` takes it: without empty cells, and with an open end for -1."""
    row: dict[str, Any] = {name: cell for name, cell in cells.items() if cell != ""}
    if row.get("end_seconds") in ("-1", "-1.0"):
        del row["end_seconds"]
        if row.get("start_seconds") in ("0", "0.0"):
            del row["start_seconds"]
    return row


def _cells(line: str, separator: str | None, count: int, *, path_has_spaces: bool = True) -> list[str] | None:
    """So many cells of a line; None where it has another number of them."""
    if '"' in line and separator:
        try:
            cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True))
        except csv.Error:
            return None
    elif path_has_spaces:
        cells = line.rsplit(separator, count - 1)
    else:
        cells = line.split(separator, count - 1)
    cells = [cell.strip() for cell in cells]
    return cells if len(cells) == count and all(cells) else None


def _path(line: str) -> dict[str, Any] | None:
    cells = _cells(line, ",", 1)
    return {"path": cells[0]} if cells else None


def _labelled(separator: str | None, *, path_has_spaces: bool = True) -> _Parse:
    def parse(line: str) -> dict[str, Any] | None:
        cells = _cells(line, separator, 2, path_has_spaces=path_has_spaces)
        return {"path": cells[0], "label": cells[1]} if cells else None

    return parse


def _ranged(separator: str | None) -> _Parse:
    def parse(line: str) -> dict[str, Any] | None:
        cells = _cells(line, separator, 4)
        if not cells:
            return None
        row = _row(dict(zip(("path", "start_seconds", "end_seconds", "label"), cells, strict=True)))
        try:
            for name in ("start_seconds", "end_seconds"):
                seconds(row.get(name), name, where="")
        except ValueError:
            return None
        return row

    return parse


_NUM_FRAMES = "num_frames"


def _counted(separator: str | None) -> _Parse:
    def parse(line: str) -> dict[str, Any] | None:
        cells = _cells(line, separator, 3)
        return {"path": cells[0], _NUM_FRAMES: cells[1], "label": cells[2]} if cells and cells[1].isdecimal() else None

    return parse


# Reads every list of the form above it too, with a wrong label: taken where it alone names the most videos.
_FIRST_SPACE = "`path label` separated by the first space"
_PARSERS: dict[str, _Parse] = {
    "`path`": _path,
    "`path label` separated by tabs": _labelled("\t"),
    "`path label` separated by commas": _labelled(","),
    "`path label` separated by spaces": _labelled(None),
    "`path start end label` separated by tabs": _ranged("\t"),
    "`path start end label` separated by commas": _ranged(","),
    "`path start end label` separated by spaces": _ranged(None),
    "`path frames label` separated by tabs": _counted("\t"),
    "`path frames label` separated by commas": _counted(","),
    "`path frames label` separated by spaces": _counted(None),
    _FIRST_SPACE: _labelled(None, path_has_spaces=False),
}
