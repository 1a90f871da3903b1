"""The entries of a list of videos: finds the file that each one names, and reads its fields.

A list may leave the ending of a name out, write it in another case or Unicode form than the file system does, or give
the absolute path of a file below the folder. The entry then has the path of the file, so a data set does not depend on
how a list writes a name. Two files that differ only in case or Unicode form are told apart by exact names alone.

A video in a tar file is found by its path there too, where one of the two paths may have more folders before it. A
folder of pictures is found by the name of the video that they come from, which has an ending.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import posixpath
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vmoco import storage
from vmoco.data.found import Found
from vmoco.data.list_text import is_text
from vmoco.data.path_lookup import Named, PathLookup, ask
from vmoco.data.source import split_pattern
from vmoco.data.temporary_database import disk_errors, temporary_database

COLUMNS = ("path", "start_seconds", "end_seconds", "label", "video_id", "split", "group")
"""Columns of a table; only `path` is required."""


class ListedFiles:
    """The videos below a folder, to look names of a list up. They lie in a temporary database, so there may be many.

    Args:
        root: Folder or URI prefix, or a pattern.
        videos: All videos.
        folders: Paths of further folders of pictures.

    Raises:
        ScratchError: the disk for temporary files is full; so may each method.
    """

    def __init__(self, root: str, videos: Iterable[Found], folders: Iterable[str] = ()) -> None:
        self.root = split_pattern(root)[0]
        self._database = temporary_database()
        with disk_errors():
            for table in (
                "files (path TEXT PRIMARY KEY, own TEXT, is_folder INTEGER) WITHOUT ROWID",
                "renamed (path TEXT UNIQUE, file TEXT)",
            ):
                self._database.execute(f"CREATE TABLE {table}")
            # No list can name a folder whose name is no text.
            rows = itertools.chain(map(_row, videos), ((each, None, True) for each in folders if is_text(each)))
            both = "ON CONFLICT DO UPDATE SET is_folder = is_folder OR excluded.is_folder"
            self._database.executemany(f"INSERT INTO files VALUES (?, ?, ?) {both}", rows)
        self._has_tars = bool(ask(self._database, "SELECT 1 FROM files WHERE own IS NOT NULL LIMIT 1"))
        self._has_stems = False
        database = self._database
        self._by_path = PathLookup(database, "by_path", lambda: _paths(database), ("stem", "folded", "folded_stem"))
        self._by_end = PathLookup(database, "by_end", lambda: _in_tars(database, _ends))
        self._by_member = PathLookup(database, "by_member", lambda: _in_tars(database, lambda own: [own]))
        local = storage.local_path(self.root)
        roots = {self.root} if local is None else {str(local), os.path.realpath(local)}
        roots |= {f"file://{root}" for root in roots if local is not None}
        self._roots = tuple(root.rstrip("/") + "/" for root in sorted(roots, key=len, reverse=True))

    def find(self, path: str) -> str | None:
        """The file that a path of a list, relative to the folder, means; None if there is none, or several."""
        if self._is_file(path):
            return path
        if found := self._by_path.find(path):
            return found
        if self.is_folder(folder := posixpath.splitext(path)[0]):
            return folder
        return next(filter(None, (lookup.find(name) for name, lookup in self._tar_lookups(path))), None)

    def by_stem(self, stem: str) -> str | None:
        """The first file whose name, without folder and ending, is exactly that; folders come last."""
        if not self._has_stems:
            with disk_errors():
                self._database.execute("CREATE TABLE stems (stem TEXT, is_folder INTEGER, path TEXT)")
                named = ((posixpath.basename(path), path, is_folder) for path, _, is_folder in _paths(self._database))
                rows = ((n if is_folder else posixpath.splitext(n)[0], is_folder, path) for n, path, is_folder in named)
                self._database.executemany("INSERT INTO stems VALUES (?, ?, ?)", rows)
                self._database.execute("CREATE INDEX by_stem ON stems (stem, is_folder, path)")
            self._has_stems = True
        question = "SELECT path FROM stems WHERE stem = ? ORDER BY is_folder, path LIMIT 1"
        return next((path for (path,) in ask(self._database, question, stem)), None)

    def is_folder(self, path: str) -> bool:
        """Whether a path is that of a folder of pictures."""
        return bool(ask(self._database, "SELECT 1 FROM files WHERE path = ? AND is_folder", path))

    def _is_file(self, path: str) -> bool:
        return bool(ask(self._database, "SELECT 1 FROM files WHERE path = ?", path))

    def _tar_lookups(self, path: str) -> Iterator[tuple[str, PathLookup]]:
        """Where to look a path up among those in tar files, and by which name."""
        if self._has_tars:
            yield path, self._by_end
            yield from ((end, self._by_member) for end in _ends(path))

    @property
    def num_renamed(self) -> int:
        """How many names that were resolved are not exactly those of their files."""
        count: int = ask(self._database, "SELECT COUNT(*) FROM renamed")[0][0]
        return count

    @property
    def first_renamed(self) -> tuple[str, str]:
        """The first of them, and its file; there is one."""
        name, file = ask(self._database, "SELECT path, file FROM renamed ORDER BY rowid LIMIT 1")[0]
        return name, file

    def resolve(self, path: str) -> str:
        """The file that `find` finds, or the path as it is; `num_renamed` counts names that are not exactly its own."""
        found = self.find(path)
        if found is None:
            return path
        if not self.is_in_tar(found) and not found.startswith(path):
            with disk_errors():
                self._database.execute("INSERT OR IGNORE INTO renamed VALUES (?, ?)", (path, found))
        return found

    def is_ambiguous(self, path: str) -> bool:
        """Whether several files differ from a path, which is not a file, only in ending, case or Unicode form."""
        return self._by_path.is_ambiguous(path) or any(
            lookup.is_ambiguous(name) for name, lookup in self._tar_lookups(path)
        )

    def is_in_tar(self, path: str) -> bool:
        """Whether a path is that of a video in a tar file."""
        return bool(ask(self._database, "SELECT 1 FROM files WHERE path = ? AND own IS NOT NULL", path))

    def below_root(self, path: str, *, where: str) -> str:
        """A path of a list, relative to the folder.

        Raises:
            ValueError: it is outside the folder.
        """
        root = next((root for root in self._roots if path.startswith(root)), "")
        below = path.removeprefix(root)
        normal = posixpath.normpath(below)
        if normal.startswith(("/", "../")) or normal in ("..", ".") or "://" in below:
            raise ValueError(f"{where}: path {path!r} leaves the folder of the videos: give a path below {self.root}")
        return normal

    def entry(self, row: Mapping[str, Any], *, where: str) -> Found:
        """The entry of a row with some of COLUMNS; a file that is not there keeps the name that the list gives it.

        Raises:
            ValueError: the row has no path, or a value that is not allowed.
        """
        refuse_no_text(row, where=where)
        if not row.get("path"):
            raise ValueError(f"{where} has no path: path and optionally {', '.join(COLUMNS[1:])} are allowed")
        named = self.below_root(str(row["path"]), where=where)
        path = self.resolve(named)
        start, end = (seconds(row.get(name), name, where=where) for name in ("start_seconds", "end_seconds"))
        if start is not None and end is not None and start >= end:
            raise ValueError(f"{where}: start_seconds {start:g} is not before end_seconds {end:g}")
        label, split, video_id, group = (
            None if row.get(name) is None else str(row[name]) for name in ("label", "split", "video_id", "group")
        )
        found = Found(path, 0, path, start, end, label, (split, None, None), group=group or None)
        name = path if found.range is None else f"{path}#{found.range}"
        source = found.group or (None if found.range is None else path)
        return dataclasses.replace(found, video_id=name if video_id is None else video_id, source=source)


def refuse_no_text(row: Mapping[str, Any], *, where: str) -> None:
    """Refuses a value that cannot be written.

    Raises:
        ValueError: one is half a character.
    """
    for name, value in row.items():
        if not is_text(str(value)):
            raise ValueError(f"{where}: {name} {value!r} is no text: a part of it is half a character")


def seconds(value: Any, name: str, *, where: str) -> float | None:
    """A number of seconds; None where there is no value.

    Raises:
        ValueError: it is no number, or below 0.
    """
    if value is None or value == "":
        return None
    try:
        number = float(value) + 0.0  # never -0.0
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number < 1e9:
        raise ValueError(f"{where}: {name} {value!r} is not a number of seconds from 0 on")
    return number


def _ends(path: str) -> list[str]:
    """A path, and the path without its first folder, its first two ..., to the name alone."""
    parts = path.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def _row(found: Found) -> tuple[str, str | None, bool]:
    """Path of a video, that in its tar file, and whether it is a folder."""
    own = found.path.removeprefix(f"{found.member.tar}/") if found.member else None
    return found.path, own, found.pictures is not None


def _paths(database: sqlite3.Connection) -> Named:
    """Each path by its own name."""
    found = database.execute("SELECT path, is_folder FROM files ORDER BY path")
    return ((path, path, bool(is_folder)) for path, is_folder in found)


def _in_tars(database: sqlite3.Connection, names: Callable[[str], list[str]]) -> Named:
    """The path of each video in a tar file, by names that follow from its path there."""
    found = database.execute("SELECT path, own FROM files WHERE own IS NOT NULL ORDER BY path")
    return ((name, path, False) for path, own in found for name in names(own))
