"""The manifest: one row per clip of a data set, in one Parquet file that is written last.

A folder is a data set only if it has a manifest; shards without one are an ingest that has not finished. The hash
covers the clips (names and pixels) and not how they are spread over shards, so two data sets with the same clips have
the same hash. Schema version and row fields are those of shards (`shard.VERSION`, `shard.ROW_FIELDS`). A data set of an
earlier version that is continued keeps its shards and gets the version of its new ones.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vmoco import storage
from vmoco.data import clip_scores
from vmoco.data.coded import coded
from vmoco.data.frames import Encoding, Shape
from vmoco.data.shard import METADATA_KEY, READABLE, READABLE_NAMES, ROW_FIELDS, ShardFile
from vmoco.storage import Result

NAME = "manifest.parquet"
ROWS_PER_PIECE = 2**16
"""Rows that are read or written at once."""
SHARDS = "shards"
"""Folder of the shards in a data set; `<name>.arrow` in it."""

FIELDS = [
    *ROW_FIELDS,
    pa.field("shard", pa.string(), nullable=False),  # name without folder and suffix
    pa.field("row", pa.int32(), nullable=False),  # record batch in the shard
    pa.field("entry", pa.string(), nullable=False),  # hash of the video's entry in the list of videos
    pa.field("range", pa.string()),  # seconds of the file that were asked for, as `0.5-3`; null where all of it was
    pa.field("video_bytes", pa.int64(), nullable=False),
    pa.field("video_sha256", pa.string(), nullable=False),  # of the video file
    # What is unusual about the video and what was done to it: `kind: sentence; kind: sentence`; null where nothing is.
    pa.field("notes", pa.string()),
    # What the video is cut from; null where it is a complete file (held_out.sources_of).
    pa.field("source", pa.string()),
    *clip_scores.FIELDS,
]
LATER = {field.name: field for field in FIELDS if field.name in ("notes", "source")}
LATER |= {field.name: field for field in clip_scores.FIELDS}
"""Fields that came later: a manifest without any value of one has no such column, as in earlier versions."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a data set. Its rows are read when `table` is used for the first time."""

    uri: str
    """Folder of the data set."""
    settings: dict[str, Any]
    """`IngestSettings.content()` of the ingest that made it."""
    hash: str
    """16 hex digits over the sorted (clip_id, sha256) pairs."""
    frame_shape: Shape
    """(T, H, W, C) of every clip."""
    encoding: Encoding
    """How the frames of every clip are stored."""
    counts: dict[str, int]
    """Accepted `videos`, their `clips`, `rejected` videos, and those `held_out` of the accepted videos; then the
    accepted videos with a note, by its kind."""
    shards: dict[str, ShardFile]
    """All shards, by name; a shard whose videos were all rejected has no row."""

    def shard_uri(self, name: str) -> str:
        """Where the shard of that name lies."""
        return shard_uri(self.uri, name)

    @functools.cached_property
    def table(self) -> pa.Table:
        """One row per clip (FIELDS), sorted by (video_id, start_seconds).

        Raises:
            ValueError: the file cannot be read, or is another one than when the manifest was loaded.
        """
        read: pa.Table = _reading(self.uri, lambda: self._file().read())
        return with_all_fields(read.replace_schema_metadata(None))

    @property
    def is_read(self) -> bool:
        """Whether `table` is in memory."""
        return "table" in self.__dict__

    def with_table(self, table: pa.Table) -> Manifest:
        """The same contents with other rows."""
        other = dataclasses.replace(self)
        other.__dict__["table"] = table  # where the cached property keeps it
        return other

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of `table` in pieces, so that memory holds a few of them at most.

        Args:
            columns: names of the columns to read.

        Raises:
            ValueError: as `table`.
        """
        if self.is_read:
            yield from (
                self.table.slice(begin, ROWS_PER_PIECE).select(list(columns))
                for begin in range(0, self.table.num_rows, ROWS_PER_PIECE)
            )
            return
        pieces, begin = _Pieces(self._file, columns), 0
        while (piece := _reading(self.uri, functools.partial(pieces.read, begin))) is not None:
            begin += piece.num_rows
            yield piece

    def rows(self, keep: Callable[[pa.Table], Any], names: Sequence[str] | None = None) -> pa.Table:
        """The rows that are kept, in their order; memory holds these and one piece of the others.

        Args:
            keep: takes a piece of the table, and returns a boolean for each of its rows; null counts as false.
            names: of the columns to read, which `keep` sees; all when left out.

        Raises:
            ValueError: as `table`.
        """
        schema = pa.schema(FIELDS if names is None else [pa.schema(FIELDS).field(name) for name in names])
        kept = (piece.filter(keep(piece)) for piece in self.batches(schema.names))
        return pa.concat_tables([schema.empty_table(), *(piece for piece in kept if piece.num_rows)]).combine_chunks()

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all rows, for what must know all clips; a text that repeats is kept once (`coded.coded`).

        Raises:
            ValueError: as `table`.
        """
        return coded(self.batches(names), pa.schema([pa.schema(FIELDS).field(name) for name in names]))

    def take(self, places: npt.NDArray[np.integer]) -> pa.Table:
        """The rows at some places, in their order; memory holds these and one piece of the others.

        Raises:
            ValueError: as `table`.
        """
        rising, begin = np.unique(places), 0

        def keep(piece: pa.Table) -> pa.Array:
            nonlocal begin
            kept = np.zeros(piece.num_rows, bool)
            kept[rising[slice(*np.searchsorted(rising, [begin, begin + piece.num_rows]))] - begin] = True
            begin += piece.num_rows
            return pa.array(kept)

        return self.rows(keep).take(pa.array(np.searchsorted(rising, places)))

    @property
    def num_clips(self) -> int:
        """Number of rows of `table`."""
        return self.table.num_rows if self.is_read else self.counts["clips"]

    def held_out(self) -> pa.Table:
        """The rows of videos that training never sees."""
        return self.rows(lambda piece: piece["held_out"])

    def _file(self) -> pq.ParquetFile:
        """The file, opened.

        Raises:
            ValueError: it has changed.
        """
        file = _open(self.uri)
        about = _about(file)
        if (about.get("hash"), about.get("settings")) != (self.hash, self.settings):
            raise ValueError(f"data set {self.uri} has changed while it was read: start again")
        return file

    @classmethod
    def load(cls, uri: str, *, check_shards: bool = True) -> Manifest:
        """Opens the manifest of the data set at `uri`.

        Args:
            uri: folder of the data set.
            check_shards: check that all shards are there, which takes a list of them.

        Raises:
            ValueError: there is no data set, it is of another schema version, or shards are missing.
        """
        uri = storage.absolute_uri(uri)
        about = _reading(uri, lambda: _about(_open(uri)))
        if about.get("version") not in READABLE:
            version = about.get("version")
            raise ValueError(
                f"data set {uri} has schema version {version}, this vmoco reads the versions {READABLE_NAMES}: "
                "use the vmoco that made it, or run jobs/ingest.py again into another folder"
            )
        if check_shards:
            _check_shards(uri, about["shards"])
        return cls(
            uri=uri,
            settings=about["settings"],
            hash=about["hash"],
            frame_shape=tuple(about["frame_shape"]),
            encoding=about["encoding"],
            counts=about["counts"],
            shards=about["shards"],
        )


class _Pieces:
    """Reads columns of a manifest piece by piece, and goes on after an error where it was.

    A reader of Parquet that has failed says that it has no more rows, so it is never asked again.

    Args:
        opened: opens the file.
        columns: to read.
    """

    def __init__(self, opened: Callable[[], pq.ParquetFile], columns: Sequence[str]) -> None:
        self._opened, self._columns = opened, columns
        self._pieces: Iterator[pa.Table] | None = None

    def read(self, begin: int) -> pa.Table | None:
        """The rows from this one on, as many as are a piece; None after the last one."""
        pieces, self._pieces = self._pieces or self._from(begin), None
        piece = next(pieces, None)
        self._pieces = pieces
        return piece

    def _from(self, begin: int) -> Iterator[pa.Table]:
        file = self._opened()
        there = [name for name in self._columns if name in file.schema_arrow.names]
        ends = np.cumsum([file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)])
        first = int(np.searchsorted(ends, begin, side="right"))
        skip = begin - (int(ends[first - 1]) if first else 0)
        groups = range(first, file.num_row_groups)
        for batch in file.iter_batches(batch_size=ROWS_PER_PIECE, row_groups=groups, columns=there):
            piece = pa.table(batch).slice(skip)
            skip -= batch.num_rows - piece.num_rows
            if piece.num_rows:
                yield with_all_fields(piece.replace_schema_metadata(None), self._columns)


def _open(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.filesystem(storage.join(uri, NAME))
    return pq.ParquetFile(filesystem.open_input_file(path))


def _about(file: pq.ParquetFile) -> dict[str, Any]:
    # Each shard is turned into its ShardFile while the text is read: there may be 400,000 of them, in every rank.
    text = (file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}")
    about: dict[str, Any] = json.loads(text, object_hook=_shard_file_of)
    return about


_SHARD_FILE = {field.name for field in dataclasses.fields(ShardFile)}


def _shard_file_of(values: dict[str, Any]) -> ShardFile | dict[str, Any]:
    return ShardFile(**values) if "sha256" in values and values.keys() <= _SHARD_FILE else values


def _reading(uri: str, action: Callable[[], Result]) -> Result:
    """The result of an action that reads the manifest of the data set at `uri`; a store is asked again.

    Raises:
        ValueError: there is no manifest, or it cannot be read.
    """
    try:
        return storage.patiently(action)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{uri} is not a data set: no {NAME} there; make one with jobs/ingest.py (the same command "
            "finishes an ingest that was interrupted)"
        ) from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{uri}/{NAME} cannot be read ({error}): remove it and run jobs/ingest.py again") from None


def shard_uri(uri: str, name: str) -> str:
    """Where a shard of the data set at `uri` lies."""
    return storage.join(uri, SHARDS, f"{name}.arrow")


def with_all_fields(table: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """Some columns of FIELDS, or all, of rows that may lack those that came later."""
    names = [field.name for field in FIELDS] if columns is None else list(columns)
    for name, field in LATER.items():
        if name in names and name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(names)


def _check_shards(uri: str, names: Collection[str]) -> None:
    folder = storage.join(uri, SHARDS)
    there = set(storage.list_files(folder, recursive=False)) if storage.exists(folder) else set()
    missing = sorted(file for name in names if (file := f"{name}.arrow") not in there)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"shards missing: {len(missing)} of the {len(names)} of data set {uri} are not in {folder} ({shown}): "
            "restore them, or remove the manifest and run jobs/ingest.py again"
        )
