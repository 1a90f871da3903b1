"""Gathers the videos that a folder holds, sorted by name: a few of them in memory, many in a temporary database."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator

from pydantic import TypeAdapter

from vmoco.data.found import Found
from vmoco.data.temporary_database import disk_errors, temporary_database

IN_MEMORY = 2**17
"""Most videos that are kept in memory, where one takes about 500 bytes."""
_FOUND = TypeAdapter(Found)
_AT_ONCE = 1000


def gather(videos: Iterable[Found]) -> Collection[Found]:
    """Videos sorted by video_id; their number is known, and they can be read more than once.

    Raises:
        ScratchError: the disk for temporary files is full.
    """
    iterator = iter(videos)
    first = list(itertools.islice(iterator, IN_MEMORY))
    if len(first) < IN_MEMORY:
        return tuple(sorted(first, key=lambda found: found.video_id))
    return _Videos(itertools.chain(first, iterator))


class _Videos(Collection[Found]):
    """Videos on disk."""

    def __init__(self, videos: Iterable[Found]) -> None:
        self._database = temporary_database()
        with disk_errors():
            self._database.execute("CREATE TABLE videos (video_id TEXT, found TEXT)")
            rows = ((found.video_id, _FOUND.dump_json(found).decode()) for found in videos)
            self._length = self._database.executemany("INSERT INTO videos VALUES (?, ?)", rows).rowcount
            # Once, so that each reading is in order.
            self._database.execute("CREATE INDEX by_name ON videos (video_id, found)")

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Found]:
        with disk_errors():
            found = self._database.execute("SELECT found FROM videos ORDER BY video_id, found")
            while rows := found.fetchmany(_AT_ONCE):
                yield from (_FOUND.validate_json(text) for (text,) in rows)

    def __contains__(self, video: object) -> bool:
        return any(found == video for found in self)
