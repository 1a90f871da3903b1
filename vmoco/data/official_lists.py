"""Reads the official lists of Kinetics, Something-Something v2, UCF101 and HMDB51, as these data sets are shipped.

    kinetics   CSV or text of Kinetics 400, 600 and 700: label, youtube_id, time_start, time_end, split; without a label
               in test lists, and without a header. Files are `<id>_<start>_<end>.mp4`, or uncut `<id>.mp4`
    ssv2       JSON: [{"id": "78687", "template": "Holding [something]"}, ...], and a labels file beside it
    ucf101     trainlist01.txt ... testlist03.txt: `Class/name.avi` on each line
    hmdb51     <class>_test_split1.txt ...: `name.avi 1` on each line; 1 is train, 2 is test, 0 is neither

Of a folder only the files with these names are read: archives bring others along, such as `._trainlist01.txt`.
"""

from __future__ import annotations

import itertools
import json
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from vmoco import storage
from vmoco.data.found import Found
from vmoco.data.list_text import ListFile, first_cells, read_cells, read_text
from vmoco.data.listed_files import ListedFiles, refuse_no_text, seconds

_SPLIT_FILES = {"ucf101": r"(train|test)list0([123])\.txt", "hmdb51": r"([^.].*)_test_split([123])\.txt"}
_YOUTUBE_ID = r"[\w-]{11}"
_KINETICS = ("label", "youtube_id", "time_start", "time_end", "split")


def is_split_file(name: str, layout: str) -> bool:
    """Whether a file, by its name, is one of the split files of `ucf101` or `hmdb51`."""
    return re.fullmatch(_SPLIT_FILES[layout], posixpath.basename(name)) is not None


def kinetics(file: ListFile, files: ListedFiles) -> Iterator[Found]:
    """One entry per row: the trimmed file if there is one, otherwise a range of the uncut one.

    Raises:
        ValueError: the list cannot be read, or a row lacks a field.
    """
    first = first_cells(file)
    columns, with_header = kinetics_columns(first), "youtube_id" in first
    number = 0
    for number, cells in enumerate(itertools.islice(read_cells(file), int(with_header), None), start=1):
        where = f"{file}, row {number}"
        row = dict(zip(columns, cells, strict=False))
        missing = [name for name in _KINETICS[1:4] if not row.get(name)]
        if missing:
            raise ValueError(f"{where} has no {missing[0]}: the columns of Kinetics are {', '.join(_KINETICS)}")
        start, end = (seconds(row[name], name, where=where) or 0.0 for name in ("time_start", "time_end"))
        youtube_id = row["youtube_id"]
        trimmed = f"{youtube_id}_{start:06.0f}_{end:06.0f}"
        # Ids differ in case alone, so names are taken exactly.
        path = files.by_stem(trimmed) or files.by_stem(f"{youtube_id}_{start:g}_{end:g}")
        uncut = None if path else files.by_stem(youtube_id)
        yield Found(
            trimmed,
            0,
            path or uncut or f"{trimmed}.mp4",
            start_seconds=start if uncut else None,
            end_seconds=end if uncut else None,
            label=row.get("label") or None,
            splits=(row.get("split") or None, None, None),
            source=youtube_id,
        )
    if not number:
        raise ValueError(f"list {file} has no rows")


def kinetics_columns(cells: list[str]) -> list[str]:
    """The columns of a list of Kinetics by its first row, which is a header or not; empty if it is another list."""
    if "youtube_id" in cells:
        return cells
    for at in range(len(cells) - 2):
        numbers = all(re.fullmatch(r"\d+(\.\d+)?", cell) for cell in cells[at + 1 : at + 3])
        if at <= 1 and numbers and re.fullmatch(_YOUTUBE_ID, cells[at]):
            return [*_KINETICS[1 - at :], *[""] * len(cells)][: len(cells)]
    return []


def ssv2(uri: str, files: ListedFiles) -> list[Found]:
    """One entry per video of a JSON list, or of all lists of a folder; the label is the template without brackets.

    Raises:
        ValueError: a list cannot be read, or has a label that the labels file does not have.
    """
    single = uri.lower().endswith(".json")
    folder = uri.rpartition("/")[0] if single else uri
    beside = [storage.join(folder, name) for name in storage.list_files(folder, recursive=False)]
    labels: dict[str, Any] = {}
    lists: list[tuple[str, list[Any]]] = []
    for place in beside:
        name = posixpath.basename(place)
        is_labels = "labels" in name.lower()
        if name.startswith(".") or not name.lower().endswith(".json") or (single and place != uri and not is_labels):
            continue
        content = _json(place)
        if isinstance(content, list):
            lists.append((place, content))
        elif is_labels:
            labels = {_label(name): number for name, number in content.items()}
    if not lists:
        raise ValueError(
            f"no list of ssv2 in {uri}: give a JSON file, or its folder, with [{{'id': ..., 'template': ...}}]"
        )
    named = []
    for place, content in lists:
        for number, item in enumerate(content, start=1):
            where = f"{place}, entry {number}"
            if not isinstance(item, dict) or not item.get("id"):
                raise ValueError(f"{where} has no id: an entry of ssv2 is {{'id': ..., 'template': ...}}")
            refuse_no_text(item, where=where)
            text = item.get("template") or item.get("label")
            label = None if text is None else _label(str(text))
            if labels and label is not None and label not in labels:
                raise ValueError(
                    f"{where} has the label {label!r}, which is not among the {len(labels)} of the labels file"
                )
            stem = str(item["id"])
            path = files.by_stem(stem) or f"{stem}.webm"
            named.append(Found(path, 0, path, label=label, splits=_split_of(place)))
    return named


def _json(uri: str) -> Any:
    try:
        content = json.loads(read_text(ListFile(uri)))
    except json.JSONDecodeError as error:
        raise ValueError(f"list {uri} is not JSON ({error})") from None
    if not isinstance(content, list | dict):
        raise ValueError(f"list {uri} is neither a list nor a table of labels")
    return content


def _label(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _split_of(place: str) -> tuple[str | None, None, None]:
    name = posixpath.basename(place).lower()
    marks = {"train": "train", "valid": "validate", "test": "test"}
    return next((split for mark, split in marks.items() if mark in name), None), None, None


def official_splits(folder: str, layout: str, files: ListedFiles) -> list[Found]:
    """One entry per video of all split files of a folder, with its place in each split.

    Raises:
        ValueError: there are no split files, or one cannot be read.
    """
    splits: dict[str, list[str | None]] = {}
    labels: dict[str, str] = {}
    try:
        names = storage.list_files(folder)
    except ValueError as error:
        raise ValueError(
            f"with --layout {layout}, --annotations {folder} must be the folder of its split files: {error}"
        ) from None
    for name in names:
        match = re.fullmatch(_SPLIT_FILES[layout], posixpath.basename(name))
        if not match:
            continue
        place = storage.join(folder, name)
        for line in filter(None, map(str.strip, read_text(ListFile(place)).splitlines())):
            if layout == "ucf101":
                named, part = line.split(" ", maxsplit=1)[0], match[1]
            else:
                video, _, code = line.rpartition(" ")
                named, part = f"{match[1]}/{video.strip()}", {"1": "train", "2": "test"}.get(code)
            path = files.below_root(named, where=place)
            found = files.resolve(path)
            splits.setdefault(found, [None, None, None])[int(match[2]) - 1] = part
            # In a tar file, videos may have other folders than in the list.
            named_so = path if files.is_in_tar(found) else found
            labels[found] = posixpath.basename(posixpath.dirname(named_so))
    if not splits:
        raise ValueError(f"no split files of {layout} in {folder}: {', '.join(names[:3]) or 'it is empty'}")
    return [
        Found(path, 0, path, label=labels[path], splits=(place[0], place[1], place[2]))
        for path, place in splits.items()
    ]
