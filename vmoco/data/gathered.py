"""Gathers videos, or why some are rejected, sorted by name: a few of them in memory, many in a temporary database."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

from pydantic import TypeAdapter

from vmoco.data.found import Found
from vmoco.data.ledger import Rejection
from vmoco.data.temporary_database import disk_errors, temporary_database

IN_MEMORY = 2**17
"""Most videos that are kept in memory, where one takes about 500 bytes."""
_AT_ONCE = 1000

Row = TypeVar("Row", Found, Rejection)


def gather(rows: Iterable[Row], kind: type[Any] = Found) -> Collection[Row]:
    """Rows sorted by video_id; their number is known, and they can be read more than once.

    Args:
        rows: of one kind.
        kind: of the rows.

    Raises:
        ScratchError: the disk for temporary files is full.
    """
    iterator = iter(rows)
    first = list(itertools.islice(iterator, IN_MEMORY))
    if len(first) < IN_MEMORY:
        return tuple(sorted(first, key=lambda row: row.video_id))
    return _OnDisk(itertools.chain(first, iterator), kind)


class _OnDisk(Collection[Row]):
    """Rows on disk, for one thread; they cannot be pickled, and equal no tuple."""

    def __init__(self, rows: Iterable[Row], kind: type[Any]) -> None:
        self._adapter: TypeAdapter[Any] = TypeAdapter(kind)
        self._database = temporary_database()
        with disk_errors():
            self._database.execute("CREATE TABLE rows (video_id TEXT, content TEXT)")
            values = ((row.video_id, self._adapter.dump_json(row).decode()) for row in rows)
            self._length = self._database.executemany("INSERT INTO rows VALUES (?, ?)", values).rowcount
            # Once, so that each reading is in order.
            self._database.execute("CREATE INDEX by_name ON rows (video_id, content)")

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Row]:
        with disk_errors():
            found = self._database.execute("SELECT content FROM rows ORDER BY video_id, content")
            while rows := found.fetchmany(_AT_ONCE):
                yield from (self._adapter.validate_json(text) for (text,) in rows)

    def __contains__(self, row: object) -> bool:
        return any(found == row for found in self)
