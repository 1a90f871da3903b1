"""Lists of videos: which videos of a folder to take, with their labels, ranges of seconds and official splits.

A path outside the folder is refused. A video that is on the list but not in the folder becomes a ledger row.

    table      CSV, Parquet or JSON lines: path, optionally start_seconds, end_seconds, label, video_id, split, group
    filelist   text without a header, such as `run/a.mp4 3` (vmoco/data/filelist.py)
    others     the official lists of data sets (vmoco/data/official_lists.py)

Where a list names a file that is in a tar file, or a folder of pictures, that is meant.

With `auto` the name and the first line of the list decide, and the user is told. Where they do not, the list is
refused: a list that is read in the wrong way would give wrong labels.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq

from vmoco import storage
from vmoco.data import official_lists
from vmoco.data.filelist import read_filelist
from vmoco.data.found import Found
from vmoco.data.frame_folder import list_frame_folders
from vmoco.data.gathered import gather
from vmoco.data.ledger import Rejection
from vmoco.data.list_text import ListFile, copied, first_cells, is_text, read_with_ends
from vmoco.data.listed_files import COLUMNS, ListedFiles
from vmoco.data.listing import Footage, list_footage
from vmoco.data.named_entries import NamedEntries
from vmoco.data.source import Listing
from vmoco.job_settings import Layout

TABLES = (".csv", ".parquet", ".jsonl")
LISTS = (*TABLES, ".txt", ".tsv")
"""Endings of a list that stands where the folder of the videos does."""


def list_annotated(
    root: str,
    annotations: str,
    layout: Layout,
    suffixes: Sequence[str] = (),
    *,
    footage: Footage = "auto",
    fps: float | None = None,
) -> Listing:
    """The videos of `root` that a list names, with their fields from the list.

    Args:
        root: Folder, URI prefix or tar file of the videos.
        annotations: The list: a file, or the folder of split files of UCF101, HMDB51 or Something-Something v2.
        layout: Which kind of list it is; `auto` finds out.
        suffixes: More endings of videos.
        footage: What the root holds; `auto` finds out.
        fps: Pictures per second of folders of pictures.

    Raises:
        ValueError: the list cannot be read, names a path outside the root, two videos alike, or no video of the root.
    """
    there = list_footage(root, footage, fps=fps, suffixes=suffixes)
    files = ListedFiles(there.root, there.videos, there.picture_folders)
    notes = list(there.notes)
    if layout == "auto":
        layout = _guess(annotations)
        notes.append(f"{annotations} is read as --layout {layout}")
    if layout == "ssv2":
        entries = NamedEntries(official_lists.ssv2(annotations, files))
    elif layout in ("ucf101", "hmdb51"):
        entries = NamedEntries(official_lists.official_splits(annotations, layout, files))
    else:
        with copied(annotations) as file:
            named, form = _read(file, layout, files)
            entries = NamedEntries(named)
        notes += [f"its lines are read as {form}"] if form else []
    if entries.num_different < entries.num_named:
        notes.append(f"{entries.num_named - entries.num_different} entries are repeated, and count once")
    if repeated := entries.repeated():
        name, times, number = repeated
        raise ValueError(
            f"{annotations} names {name!r} {times} times ({number} such names): "
            "give each row a video_id of its own, or keep one of them"
        )
    there = _with_named_folders(annotations, root, entries, there, fps)
    if files.num_renamed:
        path, exact = files.first_renamed
        notes.append(
            f"{files.num_renamed} names differ from their files in case or Unicode form, such as {path!r}, which is "
            f"{exact!r}"
        )
    entries.take_files(there.videos)
    unreadable = {row.video_id: row for row in there.rejected}
    videos = gather(_complete(*each) for each in entries.with_file())
    if not videos:
        raise ValueError(
            f"none of the {entries.num_named} videos that {annotations} names is in {root}: check --videos and "
            "--annotations"
        )
    rejected = gather((_missing(found, files, unreadable) for found in entries.without_file()), Rejection)
    return Listing(videos, rejected, 0, notes=tuple(notes), root=there.root)


def _read(file: ListFile, layout: Layout, files: ListedFiles) -> tuple[Iterable[Found], str]:
    """The entries of a list that is one file, and the form of its lines if that was found out."""
    if layout == "table":
        return _table(file, files), ""
    if layout == "kinetics":
        return official_lists.kinetics(file, files), ""
    return read_filelist(file, files)


def _complete(found: Found, file: Found, named_again: bool) -> Found:
    """An entry with what its file tells; `named_again` if other entries have the same file."""
    # A file with several names is one source; with one name it is held out by that name, as ever.
    source = found.source or (found.path if named_again else None)
    place: dict[str, Any] = {"member": file.member, "pictures": file.pictures}
    return dataclasses.replace(found, num_bytes=file.num_bytes, source=source, **place)


def _missing(found: Found, files: ListedFiles, unreadable: Mapping[str, Rejection]) -> Rejection:
    """Why there is no file for an entry."""
    reason, message = "missing", f"the list names {found.path}"
    if known := unreadable.get(found.path):
        reason, message = known.reason, known.message
    elif files.is_ambiguous(found.path):
        reason, message = "ambiguous", f"several files are meant by {found.path}: list the exact name"
    return Rejection(found.video_id, "list", reason, message, transient=True)


def _with_named_folders(annotations: str, root: str, named: NamedEntries, there: Listing, fps: float | None) -> Listing:
    """Adds the folders of pictures that a list names beside video files.

    Raises:
        ValueError: there are some, and their rate is not known.
    """
    folders = {folder for folder in there.picture_folders if is_text(folder) and named.names(folder)}
    if not folders:
        return there
    if fps is None:
        raise ValueError(
            f"{annotations} names {len(folders)} folders of numbered pictures, such as {min(folders)!r}: give --fps, "
            "the number of pictures per second, for example --fps 25"
        )
    listed = list_frame_folders(root, fps)
    videos = gather(itertools.chain(there.videos, (found for found in listed.videos if found.path in folders)))
    rejected = (*there.rejected, *(row for row in listed.rejected if row.video_id in folders))
    return dataclasses.replace(there, videos=videos, rejected=rejected)


def _guess(uri: str) -> Layout:
    """The kind of a list, by its name and its first line.

    Raises:
        ValueError: it cannot be told, or read.
    """
    filesystem, path = storage.filesystem(uri)
    if filesystem.get_file_info(path.rstrip("/") or "/").type == pyarrow.fs.FileType.Directory:
        names = storage.list_files(uri)
        kinds: list[Layout] = ["ucf101", "hmdb51"]
        found = [kind for kind in kinds if any(official_lists.is_split_file(name, kind) for name in names)]
        if any(name.lower().endswith(".json") for name in names):
            found.append("ssv2")
        if len(found) != 1:
            what = f"lists of {' and '.join(found)}" if found else "no split files of ucf101, hmdb51 or ssv2"
            raise ValueError(f"--annotations {uri} has {what}: give --layout, or the list itself")
        return found[0]
    suffix = posixpath.splitext(uri)[1].lower()
    if suffix in (".parquet", ".jsonl"):
        return "table"
    if suffix == ".json":
        return "ssv2"
    with copied(uri) as file:
        first = first_cells(file)
    if official_lists.kinetics_columns(first):
        return "kinetics"
    return "table" if suffix == ".csv" and "path" in first else "filelist"


def _table(file: ListFile, files: ListedFiles) -> Iterator[Found]:
    number = 0
    for number, row in enumerate(_rows(file), start=1):
        where = f"{file}, row {number}"
        if unknown := sorted(set(row) - set(COLUMNS)):
            allowed = ", ".join(sorted(set(COLUMNS) - {"path"}))
            raise ValueError(f"{where} has the column {unknown[0]!r}: path and optionally {allowed} are allowed")
        yield files.entry(row, where=where)
    if not number:
        raise ValueError(f"list {file} has no rows")


def _rows(file: ListFile) -> Iterator[dict[str, Any]]:
    """The rows of a table, one after the other.

    Raises:
        ValueError: it cannot be read.
    """
    suffix = posixpath.splitext(file.uri)[1].lower()
    if suffix not in TABLES:
        raise ValueError(f"list {file} ends in {suffix or 'nothing'!r}: {', '.join(TABLES)} are allowed")
    try:
        if suffix == ".jsonl":
            yield from _json_rows(file)
            return
        with file.on_disk() as path:
            pieces = _csv_pieces(str(path)) if suffix == ".csv" else pq.ParquetFile(path).iter_batches()
            for piece in pieces:
                yield from piece.to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        if "UTF8" in str(error):
            raise ValueError(f"list {file} is not UTF-8 text ({str(error).splitlines()[0]}): convert it") from None
        raise ValueError(f"list {file} cannot be read: {str(error).splitlines()[0]}") from None


def _csv_pieces(path: str) -> Iterator[pa.RecordBatch]:
    """Rows of a CSV file; all values are text."""
    with pa.csv.open_csv(path) as reader:
        names = reader.schema.names
    strings = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    options = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(path, convert_options=strings, parse_options=options) as reader:
        yield from reader


def _json_rows(file: ListFile) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines. Numbers are text, as they are written: a label 2.50 stays `2.50`, as in CSV."""
    for number, line in enumerate(read_with_ends(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_int=str, parse_float=str, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"list {file} cannot be read: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f'{file}, line {number}: {line.strip()[:80]!r} is no row: write {{"path": ...}}')
        yield row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        ValueError: a name is there twice.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a name is there twice: {', '.join(name for name, _ in pairs)}")
    return row
