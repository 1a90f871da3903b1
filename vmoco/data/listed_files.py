"""The entries of a list of videos: finds the file that each one names, and reads its fields.

A list may leave the ending of a name out, write it in another case or Unicode form than the file system does, or give
the absolute path of a file below the folder. The entry then has the path of the file, so a data set does not depend on
how a list writes a name. Two files that differ only in case or Unicode form are told apart by exact names alone.

A video in a tar file is found by its path there too, where one of the two paths may have more folders before it. A
folder of pictures is found by the name of the video that they come from, which has an ending.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vmoco import storage
from vmoco.data.found import Found
from vmoco.data.source import split_pattern

COLUMNS = ("path", "start_seconds", "end_seconds", "label", "video_id", "split", "group")
"""Columns of a table; only `path` is required."""


class ListedFiles:
    """The videos below a folder, to look names of a list up."""

    def __init__(
        self, root: str, paths: Iterable[str], *, inside: Mapping[str, str] | None = None, folders: Iterable[str] = ()
    ) -> None:
        """Takes the paths of the videos.

        Args:
            root: Folder or URI prefix, or a pattern.
            paths: Of all videos.
            inside: The path in its tar file of each video that is in one, by its path.
            folders: Those of the paths that are folders of pictures.
        """
        self.root = split_pattern(root)[0]
        self.paths = frozenset(paths)
        self.folders = frozenset(folders)
        self.renamed: dict[str, str] = {}
        ordered = sorted(self.paths)
        self._by_path = _Lookup(((path, path) for path in ordered), self.folders)
        self._inside = inside or {}
        members = sorted(self._inside.items())
        self._by_end = _Lookup((end, path) for path, own in members for end in _ends(own))
        self._by_member = _Lookup((own, path) for path, own in members)
        by_priority = sorted(ordered, key=lambda path: (path in self.folders, path))
        self.by_stem: Mapping[str, str] = {  # the first of several
            self._stem(posixpath.basename(path), path): path for path in reversed(by_priority)
        }
        local = storage.local_path(self.root)
        roots = {self.root} if local is None else {str(local), os.path.realpath(local)}
        roots |= {f"file://{root}" for root in roots if local is not None}
        self._roots = tuple(root.rstrip("/") + "/" for root in sorted(roots, key=len, reverse=True))

    def find(self, path: str) -> str | None:
        """The file that a path of a list, relative to the folder, means; None if there is none, or several."""
        if path in self.paths:
            return path
        if found := self._by_path.find(path):
            return found
        if (folder := posixpath.splitext(path)[0]) in self.folders:
            return folder
        return next(filter(None, (lookup.find(name) for name, lookup in self._in_tars(path))), None)

    def _stem(self, name: str, path: str) -> str:
        return name if path in self.folders else posixpath.splitext(name)[0]

    def _in_tars(self, path: str) -> Iterator[tuple[str, _Lookup]]:
        """Where to look a path up among those in tar files, and by which name."""
        if self._inside:
            yield path, self._by_end
            yield from ((end, self._by_member) for end in _ends(path))

    def resolve(self, path: str) -> str:
        """The file that `find` finds, or the path as it is; `renamed` then has what is not exactly the file's name."""
        found = self.find(path)
        if found is None:
            return path
        if not self.is_in_tar(found) and not found.startswith(path):
            self.renamed[path] = found
        return found

    def is_ambiguous(self, path: str) -> bool:
        """Whether several files differ from a path, which is not a file, only in ending, case or Unicode form."""
        return self._by_path.is_ambiguous(path) or any(
            lookup.is_ambiguous(name) for name, lookup in self._in_tars(path)
        )

    def is_in_tar(self, path: str) -> bool:
        """Whether a path is that of a video in a tar file."""
        return path in self._inside

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


class _Lookup:
    """Finds a path by its name, exactly, without ending, or in another case or Unicode form."""

    def __init__(self, named: Iterable[tuple[str, str]], folders: frozenset[str] = frozenset()) -> None:
        pairs = list(named)
        stems = [(name if path in folders else posixpath.splitext(name)[0], path) for name, path in pairs]
        self._exact = _unique(pairs)
        self._without_ending = _unique(stems)
        self._folded = _unique((_fold(name), path) for name, path in pairs)
        self._folded_without_ending = _unique((_fold(stem), path) for stem, path in stems)

    def find(self, name: str) -> str | None:
        """The path that a name means; None if there is none, or several."""
        return next(filter(None, self._candidates(name)), None)

    def is_ambiguous(self, name: str) -> bool:
        """Whether several paths differ from a name only in ending, case or Unicode form."""
        return "" in self._candidates(name)

    def _candidates(self, name: str) -> list[str | None]:
        folded = _fold(name)
        return [
            self._exact.get(name),
            self._without_ending.get(name),
            self._folded.get(folded),
            self._folded_without_ending.get(folded),
        ]


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


def _ends(path: str) -> list[str]:
    """A path, and the path without its first folder, its first two ..., to the name alone."""
    parts = path.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The path of each key; empty for a key that several paths have."""
    found: dict[str, str] = {}
    for key, path in pairs:
        found[key] = path if found.setdefault(key, path) == path else ""
    return found
