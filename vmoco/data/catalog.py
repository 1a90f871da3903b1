"""What ingest knows of the videos while it runs, in a temporary database: what is sorted and compared is on disk.

    listed  ->  new or changed  ->  probed  ->  to cut  ->  clips and rejections  ->  manifest and ledger

So the memory of the driver does not grow with the number of videos. Everything is read back sorted by video, in
whatever order the results of tasks came.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import pyarrow as pa
from pydantic import TypeAdapter

from vmoco.data import ledger
from vmoco.data.clip_rows import SCHEMA, ClipRows
from vmoco.data.found import Found
from vmoco.data.held_out import is_by_entry
from vmoco.data.ingest_plan import Probed
from vmoco.data.ingest_tasks import MadeShard, settled
from vmoco.data.ledger import Loss, Rejection
from vmoco.data.manifest import Manifest
from vmoco.data.parts import decoded_whole
from vmoco.data.shard import ShardFile
from vmoco.data.shots import Stretch, first_numbers
from vmoco.data.temporary_database import disk_errors, temporary_database
from vmoco.job_settings import IngestSettings

Origin = Literal["before", "listed", "probed", "cut"]
"""Which step rejected a video: an earlier run, or one of this run."""

_TABLES = """
CREATE TABLE known (video_id TEXT PRIMARY KEY, entry TEXT) WITHOUT ROWID;
CREATE TABLE listed (video_id TEXT PRIMARY KEY, entry TEXT, found TEXT, is_new INTEGER) WITHOUT ROWID;
CREATE TABLE probed (video_id TEXT PRIMARY KEY, file TEXT, is_good INTEGER, probed TEXT) WITHOUT ROWID;
CREATE TABLE files (file TEXT PRIMARY KEY, first TEXT) WITHOUT ROWID;
CREATE TABLE rejections (origin TEXT, video_id TEXT, shard TEXT, reason TEXT, value TEXT);
CREATE TABLE losses (is_old INTEGER, video_id TEXT, shard TEXT, value TEXT);
CREATE TABLE stretches (video_id TEXT, part INTEGER, shard TEXT, value TEXT);
"""
_FOUND, _PROBED = TypeAdapter(Found), TypeAdapter(Probed)
_REJECTION, _LOSS, _STRETCH = TypeAdapter(Rejection), TypeAdapter(Loss), TypeAdapter(Stretch)
_AT_ONCE = 1000


class Catalog:
    """The videos and clips of one ingest.

    Args:
        settings: of the ingest.
        previous: manifest of an earlier run, or None.

    Attributes:
        clips: rows of the manifest.
        files: the shards that are in the manifest, by name.
        num_new: videos to ingest.
        num_changed: those of them that were ingested before, as they were then.
    """

    def __init__(self, settings: IngestSettings, previous: Manifest | None) -> None:
        self._settings, self._previous = settings, previous
        self._database = temporary_database()
        self.clips = ClipRows(self._database)
        for statement in _TABLES.split(";"):
            self._database.execute(statement)
        self.files: dict[str, ShardFile] = dict(previous.shards) if previous else {}
        self.num_new = self.num_changed = 0

    def close(self) -> None:
        """Frees the disk."""
        self._database.close()

    def take_listing(self, videos: Iterable[Found], rejected: Iterable[Rejection]) -> None:
        """Takes what the folder holds, and finds what is new: which is not in the data set, nor in its ledger.

        Raises:
            ScratchError: the disk is full.
        """
        if self._previous:
            self._know(self._previous)
        self._insert(
            "INSERT INTO listed VALUES (?, ?, ?, 0)",
            ((found.video_id, found.entry, _FOUND.dump_json(found).decode()) for found in videos),
        )
        self._reject("listed", rejected)
        self._run(
            "UPDATE listed SET is_new = 1 WHERE entry IS NOT (SELECT entry FROM known WHERE video_id = listed.video_id)"
        )
        both = "listed JOIN known USING (video_id) WHERE listed.is_new"
        self.num_changed = self._one(f"SELECT COUNT(*) FROM {both}")
        if self.num_changed:  # a duplicate may be one of a video that has changed
            before = "SELECT video_id FROM rejections WHERE origin = 'before' AND reason = 'duplicate'"
            self._run(f"UPDATE listed SET is_new = 1 WHERE video_id IN ({before})")
        self.num_new = self._one("SELECT COUNT(*) FROM listed WHERE is_new")

    def _know(self, previous: Manifest) -> None:
        # A list names each video once; an earlier manifest has many rows of it.
        for piece in previous.batches(["video_id", "entry"]):
            rows = pa.TableGroupBy(piece, ["video_id", "entry"]).aggregate([]).to_pylist()
            self._insert("INSERT OR REPLACE INTO known VALUES (:video_id, :entry)", rows)
        for row in ledger.rows(previous.uri):
            if isinstance(row, Loss):
                if row.shard in previous.shards:
                    self._insert_loss(row, is_old=True)
            # Without what every run lists again, and without rows of shards in no manifest.
            elif row.stage != "list" and (not row.shard or row.shard in previous.shards):
                self._reject("before", [row])
                if settled(row, self._settings):
                    self._insert("INSERT OR REPLACE INTO known VALUES (?, ?)", [(row.video_id, row.entry)])

    def keep_old_clips(self) -> bool:
        """Takes the clips of the earlier run, without those of videos that are ingested again.

        Returns:
            Whether that run held out each entry of its list by itself, as earlier versions did; this one goes on so.
        """
        if self._previous is None:
            return False
        by_entry = False
        for piece in self._previous.batches(SCHEMA.names):
            by_entry = by_entry or is_by_entry(piece)
            self.clips.add(piece)
        for old in ("clips WHERE", "losses WHERE is_old AND", "rejections WHERE origin = 'before' AND"):
            self._run(f"DELETE FROM {old} video_id IN (SELECT video_id FROM listed WHERE is_new)")
        return by_entry

    def new_videos(self, *, by_entry: bool = False) -> Iterator[Found]:
        """The videos to probe, sorted; with `by_entry` the source of each is its group."""
        for (text,) in self._read("SELECT found FROM listed WHERE is_new ORDER BY video_id"):
            found = _FOUND.validate_json(text)
            yield dataclasses.replace(found, source=found.group) if by_entry else found

    def add_probed(self, each: Probed) -> None:
        """Takes what probing found of a video."""
        if each.rejection:
            self._reject("probed", [each.rejection])
            return
        row = (each.found.video_id, f"{each.sha256} {each.found.range}", _PROBED.dump_json(each).decode())
        self._insert("INSERT INTO probed VALUES (?, ?, 1, ?)", [row])

    def reject_duplicates(self) -> None:
        """Rejects videos with equal content: the first by name is kept, and before it one that is in the data set."""
        if self._settings.duplicates == "keep":
            return
        self._run(
            "INSERT INTO files SELECT video_sha256 || ' ' || IFNULL(range, 'None') AS file, MAX(video_id) FROM clips "
            "GROUP BY file"
        )
        self._run("INSERT OR IGNORE INTO files SELECT file, MIN(video_id) FROM probed GROUP BY file")
        twice = "probed JOIN files USING (file) WHERE video_id != first"
        for text, first in self._read(f"SELECT probed, first FROM {twice} ORDER BY video_id"):
            found = _PROBED.validate_json(text).found
            message = f"the same content as {first}"
            self._reject("probed", [Rejection(found.video_id, "read", "duplicate", message, entry=found.entry)])
        self._run(f"UPDATE probed SET is_good = 0 WHERE video_id IN (SELECT video_id FROM {twice})")

    def good(self) -> Iterator[Probed]:
        """The videos to cut, sorted."""
        for (text,) in self._read("SELECT probed FROM probed WHERE is_good ORDER BY video_id"):
            yield _PROBED.validate_json(text)

    @property
    def num_good(self) -> int:
        """Number of videos to cut."""
        return self._one("SELECT COUNT(*) FROM probed WHERE is_good")

    def add_shard(self, made: MadeShard) -> None:
        """Takes a shard that was made."""
        self.files[made.name] = made.file
        self.clips.add(pa.Table.from_pylist(made.rows, schema=SCHEMA))
        self._reject("cut", made.rejected)
        for loss in made.losses:
            self._insert_loss(loss, is_old=False)
        self._insert(
            "INSERT INTO stretches VALUES (?, ?, ?, ?)",
            ((each.video_id, each.part, made.name, _STRETCH.dump_json(each).decode()) for each in made.stretches),
        )

    def forget_unseekable(self) -> int:
        """Forgets what was cut of long videos of which a part could not be decoded alone; returns their number."""
        self._run(
            "CREATE TABLE again AS SELECT video_id, value, MIN(shard) FROM rejections "
            "WHERE origin = 'cut' AND reason = ? GROUP BY video_id",
            [ledger.NOT_SEEKABLE],
        )
        for what in ("clips WHERE", "losses WHERE", "stretches WHERE", "rejections WHERE origin = 'cut' AND"):
            self._run(f"DELETE FROM {what} video_id IN (SELECT video_id FROM again)")
        return self._one("SELECT COUNT(*) FROM again")

    def unseekable(self) -> Iterator[Probed]:
        """These videos, sorted, with a note."""
        for text, value in self._read("SELECT probed, value FROM again JOIN probed USING (video_id) ORDER BY video_id"):
            each, why = _PROBED.validate_json(text), _REJECTION.validate_json(value).message
            yield dataclasses.replace(each, notes=(*each.notes, decoded_whole(why)))

    def settle(self, *, without_clips: str) -> None:
        """Gives each video that was to be cut its clips, with their shots, or its one row of the ledger.

        Args:
            without_clips: message about a video that has neither: each of its clips crosses a cut.
        """
        # A long video with one damaged part is damaged, and has one row in the ledger.
        self._run(
            "DELETE FROM rejections WHERE origin = 'cut' AND rowid NOT IN (SELECT id FROM (SELECT rowid AS id, "
            "MIN(shard) FROM rejections WHERE origin = 'cut' GROUP BY video_id))"
        )
        for table in ("clips", "losses"):
            self._run(f"DELETE FROM {table} WHERE video_id IN (SELECT video_id FROM rejections WHERE origin = 'cut')")
        self._run("CREATE INDEX clips_of ON clips (video_id)")
        gone = (
            "SELECT probed FROM probed WHERE is_good AND video_id NOT IN (SELECT video_id FROM rejections WHERE "
            "origin = 'cut') AND NOT EXISTS (SELECT 1 FROM clips WHERE video_id = probed.video_id) ORDER BY video_id"
        )
        for (text,) in self._read(gone):
            found = _PROBED.validate_json(text).found
            self._reject("cut", [Rejection(found.video_id, "clip", "cuts", without_clips, entry=found.entry)])
        self._number_shots()
        self._run("DROP INDEX clips_of")  # sorting all rows is faster than looking each of them up

    def _number_shots(self) -> None:
        """Of long videos in several shards: the shots of each shard count on where the one before it ends."""
        rows = self._read("SELECT video_id, shard, value FROM stretches ORDER BY video_id, part")
        for name, group in itertools.groupby(rows, key=lambda row: row[0]):
            shards, stretches = zip(*((shard, _STRETCH.validate_json(value)) for _, shard, value in group), strict=True)
            places = zip(first_numbers(stretches), itertools.repeat(name), shards, strict=False)
            self._insert("UPDATE clips SET shot = shot + ? WHERE video_id = ? AND shard = ?", places)

    def rejections(self) -> Iterator[Rejection]:
        """All rejected videos of the data set, sorted."""
        for (text,) in self._read("SELECT value FROM rejections ORDER BY video_id, rowid"):
            yield _REJECTION.validate_json(text)

    def losses(self) -> Iterator[Loss]:
        """All videos that gave clips although a part is lost, sorted."""
        for (text,) in self._read("SELECT value FROM losses ORDER BY video_id, shard, rowid"):
            yield _LOSS.validate_json(text)

    @property
    def num_losses(self) -> int:
        """Number of videos of which a part is lost."""
        return self._one("SELECT COUNT(DISTINCT video_id) FROM losses")

    def reasons(self) -> dict[str, int]:
        """How many videos were rejected for each reason."""
        return dict(self._read("SELECT reason, COUNT(*) FROM rejections GROUP BY reason"))

    def _reject(self, origin: Origin, rejections: Iterable[Rejection]) -> None:
        self._insert(
            "INSERT INTO rejections VALUES (?, ?, ?, ?, ?)",
            ((origin, row.video_id, row.shard, row.reason, _REJECTION.dump_json(row).decode()) for row in rejections),
        )

    def _insert_loss(self, loss: Loss, *, is_old: bool) -> None:
        row = (is_old, loss.video_id, loss.shard, _LOSS.dump_json(loss).decode())
        self._insert("INSERT INTO losses VALUES (?, ?, ?, ?)", [row])

    def _insert(self, statement: str, rows: Iterable[Any]) -> None:
        with disk_errors():
            self._database.executemany(statement, rows)

    def _run(self, statement: str, values: Iterable[Any] = ()) -> None:
        with disk_errors():
            self._database.execute(statement, tuple(values))

    def _one(self, statement: str) -> int:
        with disk_errors():
            (number,) = self._database.execute(statement).fetchone()
        return int(number)

    def _read(self, statement: str) -> Iterator[tuple[Any, ...]]:
        with disk_errors():
            found = self._database.execute(statement)
            while rows := found.fetchmany(_AT_ONCE):
                yield from rows
