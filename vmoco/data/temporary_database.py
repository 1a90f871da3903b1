"""A database on the disk for temporary files, for what does not fit in memory: it is sorted and compared there.

SQLite keeps a bounded number of its pages in memory, and sorts on disk. The file has no name, so the system removes it
when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator

from vmoco.data.ledger import ScratchError

_CACHE_KIB = 2**16
"""Memory for pages, and again for sorting."""


def temporary_database() -> sqlite3.Connection:
    """A database without a name, which is gone when it is closed."""
    database = sqlite3.connect("", isolation_level=None)
    for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{_CACHE_KIB}"):
        database.execute(f"PRAGMA {setting}")
    database.execute("BEGIN")  # one transaction without an end: nobody else reads it, and many would take long
    return database


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turns an error of the database's disk into a sentence.

    Raises:
        ScratchError: the disk is full, or cannot be written.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        raise ScratchError(
            f"cannot keep rows in a temporary database in {folder()}: {error}; free space there, or set TMPDIR"
        ) from error


def folder() -> str:
    """Where SQLite puts temporary files, by its own rule: TMPDIR counts, and /var/tmp comes before /tmp."""
    named = [os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp", "/tmp", "."]
    return next(place for place in named if place and os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK))
