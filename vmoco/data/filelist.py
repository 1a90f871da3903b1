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
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vmoco.data.found import Found
from vmoco.data.list_text import ListFile, first_cells, read_cells, read_lines
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


def read_filelist(file: ListFile, files: ListedFiles) -> tuple[Iterator[Found], str]:
    """The entries of a text list, and the form in which it was read, for the user.

    Raises:
        ValueError: no form or more than one fits; and while the entries are read, a line does not fit, or a path is
            outside the folder.
    """
    header = _header(first_cells(file), files)
    if header:
        return _below_header(file, header, files), f"columns {', '.join(header)}"
    form, parse = _form(file, files)
    return _in_form(file, form, parse, files), form


def _below_header(file: ListFile, header: list[str], files: ListedFiles) -> Iterator[Found]:
    number = 0
    for number, cells in enumerate(read_cells(file)):
        if number:
            row = _row(dict(zip(header, cells, strict=False)))
            yield files.entry(row, where=f"{file}, row {number}")
    if not number:
        raise ValueError(f"list {file} has no rows")


def _in_form(file: ListFile, form: str, parse: _Parse, files: ListedFiles) -> Iterator[Found]:
    for number, line in _lines(file):
        row = parse(line)
        if row is None:
            raise ValueError(f"{file}, line {number}: {line!r} is not {form}, as other lines are")
        yield files.entry(row, where=f"{file}, line {number}")


def _lines(file: ListFile) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, each with its number."""
    for number, line in enumerate(read_lines(file), start=1):
        if stripped := line.strip():
            yield number, stripped


def _header(cells: list[str], files: ListedFiles) -> list[str]:
    """The column of each cell of the first line; empty where it is not a header."""
    columns = [_COLUMNS.get(cell.lower(), "") for cell in cells]
    is_header = "path" in columns and all(columns) and len(set(columns)) == len(columns)
    return columns if is_header and files.find(cells[0]) is None else []


def _form(file: ListFile, files: ListedFiles) -> tuple[str, _Parse]:
    """The form in which most lines name a file, by its name, and how it reads a line.

    Raises:
        ValueError: no form fits, or two do.
    """
    count = sum(1 for _ in _lines(file))
    for step in dict.fromkeys([max(1, count // _SAMPLE), 1]):
        found = [_Reading(form, parse) for form, parse in _PARSERS.items()]
        for _, line in itertools.islice(_lines(file), 0, None, step):
            for reading in found:
                reading.take(line, files)
        best = max(found, key=lambda reading: reading.count)  # the first of the best
        if not best.count:
            continue
        equal = [each for each in found if each.count == best.count and each.form != _FIRST_SPACE]
        if rivals := [each for each in equal if each is not best and each.rows != best.rows]:
            raise ValueError(
                f"list {file} can be read as {best.form} and as {rivals[-1].form}, and both name {best.count} videos "
                f"of {files.root}: write a header, for example path,label"
            )
        return best.form, best.parse
    (_, first), *_ = itertools.islice(_lines(file), 1)
    raise ValueError(
        f"none of the {count} videos that {file} names is in {files.root}: check --videos and --annotations. "
        f"Its first line is {first!r}; allowed are {FORMS}"
    )


class _Reading:
    """What the lines are when they are read in one form."""

    def __init__(self, form: str, parse: _Parse) -> None:
        self.form, self.parse = form, parse
        self.count = 0
        """Lines that name a file."""
        self.rows = 0
        """A hash of all rows, to tell two readings apart."""

    def take(self, line: str, files: ListedFiles) -> None:
        row = self.parse(line)
        self.rows = hash((self.rows, None if row is None else tuple(row.items())))
        self.count += row is not None and _names_a_file(row, files)


def _names_a_file(row: Mapping[str, Any], files: ListedFiles) -> bool:
    try:
        found = files.find(files.below_root(row["path"], where=""))
    except ValueError:
        return False
    return found is not None and (_NUM_FRAMES not in row or files.is_folder(found))


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
