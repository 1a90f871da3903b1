"""Finds the path that a name means: exactly, without ending, in another case or Unicode form.

The keys lie in a temporary database, for there may be many paths. A kind of key is made when a name is looked up by it
for the first time.
"""

from __future__ import annotations

import posixpath
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from vmoco.data.temporary_database import disk_errors

Kind = Literal["exact", "stem", "folded", "folded_stem"]
KINDS: tuple[Kind, ...] = ("exact", "stem", "folded", "folded_stem")
Named = Iterable[tuple[str, str, bool]]
"""Names, the path that each means, and whether it is a folder, whose name has no ending."""


class PathLookup:
    """Looks names up.

    Args:
        database: in which the keys are kept.
        name: of the tables of this lookup.
        named: gives all names, each time it is called. It must not hold who holds the lookup: the database's file would
            stay until Python looks for cycles.
        kinds: of keys to look a name up by, in turn.
    """

    def __init__(
        self, database: sqlite3.Connection, name: str, named: Callable[[], Named], kinds: tuple[Kind, ...] = KINDS
    ) -> None:
        self._database, self._name, self._named, self._kinds = database, name, named, kinds
        self._made: set[str] = set()

    def find(self, name: str) -> str | None:
        """The path that a name means; None if there is none, or several."""
        return next(filter(None, self._candidates(name)), None)

    def is_ambiguous(self, name: str) -> bool:
        """Whether several paths differ from a name only in ending, case or Unicode form."""
        return "" in self._candidates(name)

    def _candidates(self, name: str) -> Iterator[str | None]:
        """The path by each kind of key; None if there is none, empty for several."""
        for kind in self._kinds:
            # A name of a list is never shortened: `a.b` may stand for `a.b.mp4`.
            key = _fold(name) if kind.startswith("folded") else name
            table = self._table(kind)
            found = ask(self._database, f"SELECT DISTINCT path FROM {table} WHERE key = ? LIMIT 2", key)
            yield None if not found else found[0][0] if len(found) == 1 else ""

    def _table(self, kind: Kind) -> str:
        table = f"{self._name}_{kind}"
        if kind not in self._made:
            with disk_errors():
                self._database.execute(f"CREATE TABLE {table} (key TEXT, path TEXT)")
                keys = ((_key(kind, name, is_folder), path) for name, path, is_folder in self._named())
                self._database.executemany(f"INSERT INTO {table} VALUES (?, ?)", keys)
                self._database.execute(f"CREATE INDEX {table}_by_key ON {table} (key, path)")
            self._made.add(kind)
        return table


def ask(database: sqlite3.Connection, question: str, *values: Any) -> list[Any]:
    """All rows of an answer that has few.

    Raises:
        ScratchError: the disk for temporary files cannot be read.
    """
    with disk_errors():
        return database.execute(question, values).fetchall()


def _key(kind: Kind, name: str, is_folder: bool) -> str:
    if kind.endswith("stem") and not is_folder:
        name = posixpath.splitext(name)[0]
    return _fold(name) if kind.startswith("folded") else name


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
