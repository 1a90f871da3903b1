"""The entries of a list of videos: finds the file that each one names, and reads its fields.

A list may leave the ending of a name out, write it in another case or Unicode form than the file system does, or give
the absolute path of a file below the folder. The entry then has the path of the file, so a data set does not depend on
how a list writes a name. Two files that differ only in case or Unicode form are told apart by exact names alone.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from vmoco import storage
from vmoco.data.source import Found, split_pattern

COLUMNS = ("path", "start_seconds", "end_seconds", "label", "video_id", "split", "group")
"""Columns of a table; only `path` is required."""


class ListedFiles:
    """The videos below a folder, to look names of a list up."""

    def __init__(self, root: str, paths: Iterable[str]) -> None:
        self.root = split_pattern(root)[0]
        self.paths = frozenset(paths)
        self.renamed: dict[str, str] = {}
        ordered = sorted(self.paths)
        self._without_ending = _unique((posixpath.splitext(path)[0], path) for path in ordered)
        self._folded = _unique((_fold(path), path) for path in ordered)
        self._folded_without_ending = _unique((_fold(posixpath.splitext(path)[0]), path) for path in ordered)
        self.by_stem: Mapping[str, str] = {  # the first of several
            posixpath.splitext(posixpath.basename(path))[0]: path for path in reversed(ordered)
        }
        local = storage.local_path(self.root)
        roots = {self.root} if local is None else {str(local), os.path.realpath(local)}
        roots |= {f"file://{root}" for root in roots if local is not None}
        self._roots = tuple(root.rstrip("/") + "/" for root in sorted(roots, key=len, reverse=True))

    def find(self, path: str) -> str | None:
        """The file that a path of a list, relative to the folder, means; None if there is none, or several."""
        if path in self.paths:
            return path
        folded = _fold(path)
        return (
            self._without_ending.get(path)
            or self._folded.get(folded)
            or self._folded_without_ending.get(folded)
            or None
        )

    def resolve(self, path: str) -> str:
        """The file that `find` finds, or the path as it is; `renamed` then has what is not exactly the file's name."""
        found = self.find(path)
        if found is None:
            return path
        if not found.startswith(path):
            self.renamed[path] = found
        return found

    def is_ambiguous(self, path: str) -> bool:
        """Whether several files differ from a path, which is not a file, only in ending, case or Unicode form."""
        folded = _fold(path)
        return "" in (
            self._without_ending.get(path),
            self._folded.get(folded),
            self._folded_without_ending.get(folded),
        )

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


def seconds(value: Any, name: str, *, where: str) -> float | None:
    """A number of seconds; None where there is no value.

    Raises:
        ValueError: it is no number, or below 0.
    """
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < 1e9:
        raise ValueError(f"{where}: {name} {value!r} is not a number of seconds from 0 on")
    return number


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The path of each key; empty for a key that several paths have."""
    found: dict[str, str] = {}
    for key, path in pairs:
        found[key] = path if found.setdefault(key, path) == path else ""
    return found
