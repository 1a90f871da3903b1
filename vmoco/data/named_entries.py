"""The entries of a list of videos, matched with the files that are there. They lie in a temporary database.

    list  ->  entries, each once  ->  with the file of each, in the order of their names

Of entries that are equal one counts; of two with one name, neither could be told from the other, so they are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import TypeAdapter

from vmoco.data.found import Found
from vmoco.data.path_lookup import ask
from vmoco.data.temporary_database import disk_errors, temporary_database

_FOUND = TypeAdapter(Found)
_AT_ONCE = 1000


class NamedEntries:
    """Entries of a list, with the paths that it names.

    Args:
        named: the entries, in the order of the list.

    Attributes:
        num_named: number of entries.
        num_different: number of entries that differ.

    Raises:
        ScratchError: the disk for temporary files is full; so may each method.
    """

    def __init__(self, named: Iterable[Found]) -> None:
        self._database = temporary_database()
        with disk_errors():
            self._database.execute("CREATE TABLE named (video_id TEXT, path TEXT, entry TEXT)")
            rows = ((found.video_id, found.path, _FOUND.dump_json(found).decode()) for found in named)
            self.num_named = self._database.executemany("INSERT INTO named VALUES (?, ?, ?)", rows).rowcount
            self._database.execute("CREATE TABLE entries (video_id TEXT, path TEXT, entry TEXT, place INTEGER)")
            # GROUP BY sorts; DISTINCT would look each row up in a tree that does not fit into memory.
            each = "SELECT video_id, path, entry, MIN(rowid) FROM named GROUP BY video_id, entry, path"
            self._database.execute(f"INSERT INTO entries {each}")
            self._database.execute("DROP TABLE named")
            self._database.execute("CREATE INDEX by_path ON entries (path)")
            self._database.execute("CREATE TABLE files (path TEXT PRIMARY KEY, file TEXT) WITHOUT ROWID")
        self.num_different: int = ask(self._database, "SELECT COUNT(*) FROM entries")[0][0]

    def repeated(self) -> tuple[str, int, int] | None:
        """The first name that several entries have, their number, and how many such names there are; None if none."""
        names = (
            "SELECT video_id, COUNT(*) AS times, MIN(place) AS first FROM entries GROUP BY video_id HAVING times > 1"
        )
        (number,) = ask(self._database, f"SELECT COUNT(*) FROM ({names})")[0]
        if not number:
            return None
        name, times, _ = ask(self._database, f"{names} ORDER BY first LIMIT 1")[0]
        return name, times, number

    def names(self, path: str) -> bool:
        """Whether an entry names a path."""
        return bool(ask(self._database, "SELECT 1 FROM entries WHERE path = ? LIMIT 1", path))

    def take_files(self, files: Iterable[Found]) -> None:
        """Takes the videos that are there."""
        rows = ((found.path, _FOUND.dump_json(found).decode()) for found in files)
        with disk_errors():
            self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?)", rows)

    def with_file(self) -> Iterator[tuple[Found, Found, bool]]:
        """By name, each entry whose file is there, the file, and whether other entries name it too."""
        others = "entries AS other WHERE other.path = entries.path AND other.place <> entries.place"
        several = f"EXISTS (SELECT 1 FROM {others})"
        question = f"SELECT entry, file, {several} FROM entries JOIN files USING (path) ORDER BY video_id, entry"
        for entry, file, is_named_again in self._rows(question):
            yield _FOUND.validate_json(entry), _FOUND.validate_json(file), bool(is_named_again)

    def without_file(self) -> Iterator[Found]:
        """By name, each entry whose file is not there."""
        question = "SELECT entry FROM entries WHERE path NOT IN (SELECT path FROM files) ORDER BY video_id, entry"
        for (entry,) in self._rows(question):
            yield _FOUND.validate_json(entry)

    def _rows(self, question: str) -> Iterator[tuple[str, ...]]:
        with disk_errors():
            found = self._database.execute(question)
        while True:
            with disk_errors():
                rows = found.fetchmany(_AT_ONCE)
            if not rows:
                return
            yield from rows
