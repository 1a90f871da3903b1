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
import io
import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.json
import pyarrow.parquet

from vmoco import storage
from vmoco.data import official_lists
from vmoco.data.filelist import read_cells, read_filelist
from vmoco.data.found import Found
from vmoco.data.frame_folder import list_frame_folders
from vmoco.data.ledger import Rejection
from vmoco.data.listed_files import COLUMNS, ListedFiles
from vmoco.data.listing import Footage, list_footage
from vmoco.data.source import Listing
from vmoco.data.tar_files import members_of
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
    folders = {found.path for found in there.videos if found.pictures}.union(there.picture_folders)
    paths = folders.union(found.path for found in there.videos)
    files = ListedFiles(there.root, paths, inside=members_of(there), folders=folders)
    notes = list(there.notes)
    if layout == "auto":
        layout = _guess(annotations)
        notes.append(f"{annotations} is read as --layout {layout}")
    if layout == "table":
        named = _table(annotations, files)
    elif layout == "filelist":
        named, form = read_filelist(annotations, files)
        notes.append(f"its lines are read as {form}")
    elif layout == "kinetics":
        named = official_lists.kinetics(annotations, files)
    elif layout == "ssv2":
        named = official_lists.ssv2(annotations, files)
    else:
        named = official_lists.official_splits(annotations, layout, files)
    once = dict.fromkeys(named)
    if len(once) < len(named):
        notes.append(f"{len(named) - len(once)} entries are repeated, and count once")
    _refuse_repeated(annotations, once)
    there = _with_named_folders(annotations, root, once, there, fps)
    by_path = {found.path: found for found in there.videos}
    if files.renamed:
        path, exact = next(iter(files.renamed.items()))
        notes.append(
            f"{len(files.renamed)} names differ from their files in case or Unicode form, such as {path!r}, "
            f"which is {exact!r}"
        )
    num_entries = Counter(found.path for found in once)
    unreadable = {row.video_id: row for row in there.rejected}
    videos, rejected = [], []
    for found in sorted(once, key=lambda found: found.video_id):
        if own := by_path.get(found.path):
            # A file with several names is one source; with one name it is held out by that name, as ever.
            source = found.source or (found.path if num_entries[found.path] > 1 else None)
            place: dict[str, Any] = {"member": own.member, "pictures": own.pictures}
            videos.append(dataclasses.replace(found, num_bytes=own.num_bytes, source=source, **place))
        else:
            reason, message = "missing", f"the list names {found.path}"
            if known := unreadable.get(found.path):
                reason, message = known.reason, known.message
            elif files.is_ambiguous(found.path):
                reason, message = "ambiguous", f"several files are meant by {found.path}: list the exact name"
            rejected.append(Rejection(found.video_id, "list", reason, message, transient=True))
    if not videos:
        raise ValueError(
            f"none of the {len(named)} videos that {annotations} names is in {root}: check --videos and --annotations"
        )
    return Listing(tuple(videos), tuple(rejected), 0, notes=tuple(notes), root=there.root)


def _with_named_folders(
    annotations: str, root: str, named: Iterable[Found], there: Listing, fps: float | None
) -> Listing:
    """Adds the folders of pictures that a list names beside video files.

    Raises:
        ValueError: there are some, and their rate is not known.
    """
    folders = {found.path for found in named}.intersection(there.picture_folders)
    if not folders:
        return there
    if fps is None:
        raise ValueError(
            f"{annotations} names {len(folders)} folders of numbered pictures, such as {min(folders)!r}: give --fps, "
            "the number of pictures per second, for example --fps 25"
        )
    listed = list_frame_folders(root, fps)
    videos = tuple(found for found in listed.videos if found.path in folders)
    rejected = tuple(row for row in listed.rejected if row.video_id in folders)
    return dataclasses.replace(there, videos=(*there.videos, *videos), rejected=there.rejected + rejected)


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
    first = read_cells(uri)[0]
    if official_lists.kinetics_columns(first):
        return "kinetics"
    return "table" if suffix == ".csv" and "path" in first else "filelist"


def _table(uri: str, files: ListedFiles) -> list[Found]:
    named = []
    for number, row in enumerate(_rows(uri), start=1):
        where = f"{uri}, row {number}"
        if unknown := sorted(set(row) - set(COLUMNS)):
            allowed = ", ".join(sorted(set(COLUMNS) - {"path"}))
            raise ValueError(f"{where} has the column {unknown[0]!r}: path and optionally {allowed} are allowed")
        named.append(files.entry(row, where=where))
    return named


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


def _refuse_repeated(annotations: str, named: dict[Found, None]) -> None:
    counts = Counter(found.video_id for found in named)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"{annotations} names {twice[0]!r} {counts[twice[0]]} times ({len(twice)} such names): "
            "give each row a video_id of its own, or keep one of them"
        )
