"""Rows of a manifest on disk, added in any order and read back sorted: memory does not grow with their number.

They are in a temporary database, where each clip takes about half a kilobyte, and twice as much while they are sorted.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vmoco.data.manifest import FIELDS, ROWS_PER_PIECE
from vmoco.data.temporary_database import disk_errors, temporary_database

SCHEMA = pa.schema(FIELDS)


def _declared(field: pa.Field) -> str:
    if pa.types.is_floating(field.type):
        return "REAL"
    return "TEXT" if pa.types.is_string(field.type) else "INTEGER"


class ClipRows:
    """Rows of a manifest (`manifest.FIELDS`).

    Args:
        database: to keep them in; None for one of their own.
    """

    def __init__(self, database: sqlite3.Connection | None = None) -> None:
        self._database = temporary_database() if database is None else database
        columns = ", ".join(f'"{field.name}" {_declared(field)}' for field in FIELDS)
        self._database.execute(f"CREATE TABLE clips ({columns})")

    @classmethod
    def of(cls, table: pa.Table) -> ClipRows:
        """The rows of a table with the columns of FIELDS in any order."""
        rows = cls()
        rows.add(table)
        return rows

    def __bool__(self) -> bool:
        return self._database.execute("SELECT 1 FROM clips LIMIT 1").fetchone() is not None

    def add(self, table: pa.Table) -> None:
        """Adds rows with the columns of FIELDS, in any order.

        Raises:
            ScratchError: the disk is full.
        """
        marks = ", ".join("?" * len(FIELDS))
        with disk_errors():
            for first in range(0, table.num_rows, ROWS_PER_PIECE):
                piece = table.slice(first, ROWS_PER_PIECE).select(SCHEMA.names).cast(SCHEMA)
                columns = [column.to_pylist() for column in piece.columns]
                self._database.executemany(f"INSERT INTO clips VALUES ({marks})", zip(*columns, strict=True))

    def batches(self, order: Sequence[str] = ("video_id", "start_seconds", "clip_id")) -> Iterator[pa.Table]:
        """The rows in pieces.

        Args:
            order: columns to sort by; empty for any order, which takes no time.

        Raises:
            ScratchError: the disk is full.
        """
        sorting = f" ORDER BY {', '.join(order)}" if order else ""
        with disk_errors():
            found = self._database.execute(f"SELECT * FROM clips{sorting}")
            while rows := found.fetchmany(ROWS_PER_PIECE):
                columns = [
                    pa.array(map(bool, values) if pa.types.is_boolean(field.type) else values, field.type)
                    for field, values in zip(FIELDS, zip(*rows, strict=True), strict=True)
                ]
                yield pa.Table.from_arrays(columns, schema=SCHEMA)

    def without_values(self, names: Iterable[str]) -> list[str]:
        """Those columns in which no row has a value."""
        names = list(names)
        counts = ", ".join(f'COUNT("{name}")' for name in names)
        with disk_errors():
            found = self._database.execute(f"SELECT {counts} FROM clips").fetchone()
        return [name for name, count in zip(names, found, strict=True) if not count]

    def content_hash(self) -> tuple[str, int]:
        """The hash of the data set, and how many clip_ids are there more than once.

        The hash is 16 hex digits of the SHA-256 over the sorted (clip_id, sha256) pairs: names and pixels, not the
        layout.
        """
        digest, last, repeated = hashlib.sha256(), None, 0
        with disk_errors():
            for clip, pixels in self._database.execute("SELECT clip_id, sha256 FROM clips ORDER BY clip_id, sha256"):
                repeated += clip == last
                digest.update(f"{clip} {pixels}\n".encode())
                last = clip
        return digest.hexdigest()[:16], repeated

    def note_counts(self) -> dict[str, int]:
        """How many videos have a note of each kind, by kind."""
        counts: Counter[str] = Counter()
        with disk_errors():
            noted = self._database.execute(
                "SELECT DISTINCT video_id, notes FROM clips WHERE notes IS NOT NULL ORDER BY video_id"
            )
            for _, rows in itertools.groupby(noted, key=lambda row: row[0]):
                counts.update({note.partition(":")[0] for _, notes in rows for note in notes.split("; ")})
        return dict(sorted(counts.items()))


class Counts:
    """Counts what a manifest holds, from rows in pieces that come sorted by video.

    Attributes:
        found: number of `videos`, of `clips`, and of videos that are `held_out`, with all their clips.
    """

    def __init__(self) -> None:
        self.found = {"videos": 0, "clips": 0, "held_out": 0}
        self._last: str | None = None

    def add(self, piece: pa.Table) -> None:
        """Counts the rows of the next piece."""
        names = piece["video_id"].combine_chunks()
        begins = np.ones(len(names), bool)
        begins[0] = names[0].as_py() != self._last
        begins[1:] = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
        self._last = names[-1].as_py()
        self.found["videos"] += int(begins.sum())
        self.found["clips"] += len(names)
        self.found["held_out"] += int((begins & piece["held_out"].to_numpy()).sum())
