"""Reads lists of videos: tables of paths, and the official files of Kinetics, UCF101 and HMDB51.

A list names videos of one folder, and may give each a label, a range of seconds and its place in the official splits.
A path outside the folder is refused. A video that is on the list but not in the folder becomes a ledger row.

    table      CSV, Parquet or JSON lines: path, and optionally start_seconds, end_seconds, label, video_id, split
    kinetics   CSV: label, youtube_id, time_start, time_end, split; files `<id>_<start>_<end>.mp4`, or uncut `<id>.mp4`
    ucf101     trainlist01.txt ... testlist03.txt: `Class/name.avi` on each line
    hmdb51     <class>_test_split1.txt ...: `name.avi 1` on each line; 1 is train, 2 is test, 0 is neither
"""

from __future__ import annotations

import dataclasses
import io
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from vmoco import storage
from vmoco.data.ledger import Rejection
from vmoco.data.source import Found, Listing, list_videos
from vmoco.job_settings import Layout

TABLES = (".csv", ".parquet", ".jsonl")

_COLUMNS = {"path", "start_seconds", "end_seconds", "label", "video_id", "split"}


def list_annotated(root: str, annotations: str, layout: Layout, suffixes: Sequence[str] = ()) -> Listing:
    """The videos of `root` that a list names, with their fields from the list.

    Args:
        root: Folder or URI prefix of the videos.
        annotations: A table, the CSV of Kinetics, or the folder of split files of UCF101 or HMDB51.
        layout: Which of these `annotations` is.
        suffixes: More endings of videos.

    Raises:
        ValueError: the list cannot be read, names a path outside the root, a video twice, or no video of the root.
    """
    there = list_videos(root, suffixes)
    files = {found.path: found for found in there.videos}
    if layout == "table":
        named = [_from_row(row, where=f"{annotations}, row {n}") for n, row in enumerate(_rows(annotations), start=1)]
    elif layout == "kinetics":
        named = _kinetics(annotations, files)
    else:
        named = _official_splits(annotations, _ucf101_line if layout == "ucf101" else _hmdb51_line, layout)
    _refuse_repeated(annotations, named)
    unreadable = {row.video_id: row for row in there.rejected}
    videos, rejected = [], []
    for found in sorted(named, key=lambda found: found.video_id):
        if found.path in files:
            size = files[found.path].num_bytes
            videos.append(dataclasses.replace(found, num_bytes=size))
        else:
            known = unreadable.get(found.path)
            reason, message = (known.reason, known.message) if known else ("missing", f"the list names {found.path}")
            rejected.append(Rejection(found.video_id, "list", reason, message, transient=True))
    if not videos:
        raise ValueError(
            f"none of the {len(named)} videos that {annotations} names is in {root}: check --videos and --annotations"
        )
    return Listing(tuple(videos), tuple(rejected), 0)


def _rows(uri: str) -> list[dict[str, Any]]:
    """The rows of a table."""
    suffix = posixpath.splitext(uri)[1].lower()
    if suffix not in TABLES:
        raise ValueError(f"list {uri} ends in {suffix or 'nothing'!r}: {', '.join(TABLES)} are allowed")
    try:
        source = io.BytesIO(storage.read_bytes(uri))
        if suffix == ".csv":
            names = pa.csv.open_csv(io.BytesIO(source.getvalue())).schema.names
            strings = pa.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            )
            options = pa.csv.ParseOptions(newlines_in_values=True)
            table = pa.csv.read_csv(source, convert_options=strings, parse_options=options)
        elif suffix == ".parquet":
            table = pa.parquet.read_table(source)
        else:
            table = pa.json.read_json(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"list {uri} cannot be read: {str(error).splitlines()[0]}") from None
    rows: list[dict[str, Any]] = table.to_pylist()
    if not rows:
        raise ValueError(f"list {uri} has no rows")
    return rows


def _from_row(row: dict[str, Any], *, where: str) -> Found:
    unknown = sorted(set(row) - _COLUMNS)
    if unknown or not row.get("path"):
        what = f"has the column {unknown[0]!r}" if unknown else "has no path"
        raise ValueError(f"{where} {what}: path and optionally {', '.join(sorted(_COLUMNS - {'path'}))} are allowed")
    path = _below_root(str(row["path"]), where=where)
    start, end = (_seconds(row.get(name), name, where=where) for name in ("start_seconds", "end_seconds"))
    if start is not None and end is not None and start >= end:
        raise ValueError(f"{where}: start_seconds {start:g} is not before end_seconds {end:g}")
    label, split = (None if row.get(name) is None else str(row[name]) for name in ("label", "split"))
    found = Found(path, 0, path, start_seconds=start, end_seconds=end, label=label, splits=(split, None, None))
    name = path if found.range is None else f"{path}#{found.range}"
    return dataclasses.replace(found, video_id=name if row.get("video_id") is None else str(row["video_id"]))


def _below_root(path: str, *, where: str) -> str:
    normal = posixpath.normpath(path)
    if normal.startswith(("/", "../")) or normal in ("..", ".") or "://" in path:
        raise ValueError(f"{where}: path {path!r} leaves the folder of the videos: give a path below it")
    return normal


def _seconds(value: Any, name: str, *, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ValueError(f"{where}: {name} {value!r} is not a number of seconds from 0 on")
    return seconds


def _kinetics(uri: str, files: dict[str, Found]) -> list[Found]:
    """One video per row: the trimmed file if there is one, otherwise a range of the uncut one."""
    by_name = {posixpath.splitext(posixpath.basename(path))[0]: path for path in files}
    named = []
    for number, row in enumerate(_rows(uri), start=1):
        where = f"{uri}, row {number}"
        missing = [name for name in ("youtube_id", "time_start", "time_end") if row.get(name) in (None, "")]
        if missing:
            raise ValueError(
                f"{where} has no {missing[0]}: the columns of Kinetics are label, youtube_id, time_start, "
                "time_end, split"
            )
        start, end = (_seconds(row[name], name, where=where) or 0.0 for name in ("time_start", "time_end"))
        trimmed = f"{row['youtube_id']}_{start:06.0f}_{end:06.0f}"
        path = by_name.get(trimmed) or by_name.get(row["youtube_id"])
        uncut = path is not None and trimmed not in by_name
        named.append(
            Found(
                trimmed,
                0,
                path or f"{trimmed}.mp4",
                start_seconds=start if uncut else None,
                end_seconds=end if uncut else None,
                label=row.get("label") or None,
                splits=(row.get("split") or None, None, None),
            )
        )
    return named


def _official_splits(folder: str, read_line: Any, layout: str) -> list[Found]:
    """One entry per video of all split files of a folder, with its place in each split."""
    splits: dict[str, list[str | None]] = {}
    try:
        names = [name for name in storage.list_files(folder) if name.endswith(".txt")]
    except ValueError as error:
        raise ValueError(
            f"with --layout {layout}, --annotations {folder} must be the folder of its split files: {error}"
        ) from None
    for name in names:
        for line in (
            storage.read_bytes(storage.join(folder, name)).decode().splitlines() if name.endswith(".txt") else ()
        ):
            if line.strip() and (read := read_line(posixpath.basename(name), line.strip())):
                path, split, place = read
                path = _below_root(path, where=f"{folder}/{name}")
                splits.setdefault(path, [None, None, None])[split - 1] = place
    if not splits:
        raise ValueError(f"no split files of {layout} in {folder}: {', '.join(names[:3]) or 'it is empty'}")
    return [
        Found(path, 0, path, label=posixpath.dirname(path).rsplit("/", 1)[-1], splits=(place[0], place[1], place[2]))
        for path, place in splits.items()
    ]


def _ucf101_line(file: str, line: str) -> tuple[str, int, str | None] | None:
    name = re.fullmatch(r"(train|test)list0([123])\.txt", file)
    return (line.split(" ", maxsplit=1)[0], int(name[2]), name[1]) if name else None


def _hmdb51_line(file: str, line: str) -> tuple[str, int, str | None] | None:
    name = re.fullmatch(r"(.+)_test_split([123])\.txt", file)
    if not name:
        return None
    video, _, code = line.rpartition(" ")
    return f"{name[1]}/{video}", int(name[2]), {"1": "train", "2": "test"}.get(code)


def _refuse_repeated(annotations: str, named: Iterable[Found]) -> None:
    counts = Counter(found.video_id for found in named)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"{annotations} names {twice[0]!r} {counts[twice[0]]} times ({len(twice)} such names): "
            "give each row a video_id of its own"
        )
