"""A table of embeddings: Parquet files in one folder, each written by one task, read block by block.

All types are Arrow's own, so any Parquet reader opens it. Columns that describe the clips are read when they are asked
for, and only these; features are read one part at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vmoco import storage
from vmoco.data.coded import coded, strings
from vmoco.data.ledger import Loss, Rejection

PARTS = "parts"
SPLITS = ("split_1", "split_2", "split_3")

FIELDS = [
    pa.field("clip_id", pa.string(), nullable=False),
    pa.field("video_id", pa.string(), nullable=False),
    pa.field("start_seconds", pa.float64(), nullable=False),
    pa.field("clip_seconds", pa.float64(), nullable=False),
    pa.field("label", pa.string()),
    *[pa.field(name, pa.string()) for name in SPLITS],
    pa.field("held_out", pa.bool_(), nullable=False),
    pa.field("source", pa.string(), nullable=False),  # shard, or video
    pa.field("row", pa.int32(), nullable=False),  # of the shard; number of the clip in the video
    pa.field("sha256", pa.string(), nullable=False),  # of the clip's frames as they are stored
    pa.field("colour", pa.list_(pa.float32(), 3), nullable=False),  # mean red, green, blue, 0 to 255
]
_FIELDS = pa.schema(FIELDS)
NAMES = tuple(_FIELDS.names)
_REJECTED = b"vmoco.rejected"
_LOSSES = b"vmoco.losses"
FEATURE = "feature"

Result = TypeVar("Result")
Features = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


def part_bytes(
    rows: list[dict[str, Any]],
    features: Features,
    *,
    rejected: list[Rejection] | None = None,
    losses: list[Loss] | None = None,
) -> memoryview:
    """A part as the content of a Parquet file.

    Args:
        rows: one per clip, with the fields of FIELDS.
        features: float32 (number of rows, D).
        rejected: videos that gave no clips; the part records them.
        losses: videos of which something is lost; the part records them too.
    """
    table = pa.Table.from_pylist(rows, schema=pa.schema(FIELDS))
    width = features.shape[1]
    flat = pa.array(np.ascontiguousarray(features, np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, width)
    table = table.append_column(pa.field(FEATURE, pa.list_(pa.float32(), width), nullable=False), column)
    without = json.dumps([vars(rejection) for rejection in rejected or []])
    damaged = json.dumps([vars(loss) for loss in losses or []])
    table = table.replace_schema_metadata({_REJECTED: without} | ({_LOSSES: damaged} if losses else {}))
    sink = pa.BufferOutputStream()
    # Dictionaries only for strings that repeat: features look like noise, and the other columns are small.
    pq.write_table(table, sink, compression="zstd", use_dictionary=["video_id", "label", "source"])
    return memoryview(sink.getvalue())


def part_uri(folder: str, name: str) -> str:
    """URI of a part of the table in `folder`."""
    return storage.join(folder, PARTS, f"{name}.parquet")


def part_rejected(folder: str, name: str) -> list[Rejection] | None:
    """The videos of a part that gave no clips, read from its footer; None if there is no such part."""
    try:
        metadata = _read(part_uri(folder, name), pq.read_schema).metadata or {}
    except FileNotFoundError:
        return None
    return [Rejection(**row) for row in json.loads(metadata.get(_REJECTED, b"[]"))]


def part_losses(folder: str, name: str) -> list[Loss]:
    """The videos of a part of which something is lost, read from its footer.

    Raises:
        FileNotFoundError: there is no such part.
    """
    metadata = _read(part_uri(folder, name), pq.read_schema).metadata or {}
    return [Loss.of(row) for row in json.loads(metadata.get(_LOSSES, b"[]"))]


class FeatureTable:
    """The table in a folder, or some parts of it.

    Args:
        folder: the table's folder.
        parts: names of the parts to read, in order; None reads all.

    Raises:
        ValueError: the folder has no table.
    """

    def __init__(self, folder: str, parts: list[str] | None = None) -> None:
        place = storage.join(folder, PARTS)
        if parts is None:
            names = storage.list_files(place, recursive=False) if storage.exists(place) else []
            parts = [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]
        if not parts:
            raise ValueError(f"there is no table of embeddings in {folder}: make one with jobs/embed.py")
        self._uris = [part_uri(folder, name) for name in parts]
        self._ends = np.cumsum([_read(uri, pq.read_metadata).num_rows for uri in self._uris])

    def __len__(self) -> int:
        """Number of clips."""
        return int(self._ends[-1])

    def columns(self, names: Sequence[str] = NAMES) -> pa.Table:
        """Some columns of FIELDS, one row per clip, part after part; texts are as in `coded.coded`."""
        return coded((_read_columns(uri, names) for uri in self._uris), pa.schema([_FIELDS.field(n) for n in names]))

    def rows(self, places: Rows, names: Sequence[str] = NAMES) -> pa.Table:
        """Some columns of the rows at some places, which rise; only the parts of these rows are read."""
        begins = [0, *self._ends[:-1].tolist()]
        pieces = [pa.schema([_FIELDS.field(name) for name in names]).empty_table()]
        for uri, begin, end in zip(self._uris, begins, self._ends.tolist(), strict=True):
            own = places[slice(*np.searchsorted(places, [begin, end]))]
            if len(own):
                pieces.append(_read_columns(uri, names).take(pa.array(own - begin)))
        return pa.concat_tables(pieces).combine_chunks()

    def strings(self, name: str) -> npt.NDArray[np.object_]:
        """A column of FIELDS as Python strings; None for a missing value."""
        return strings(self.columns([name])[name])

    def colours(self) -> Features:
        """Mean colour of each clip, float32 (N, 3)."""
        return _dense(self.columns(["colour"])["colour"])

    def blocks(self, chosen: npt.NDArray[np.bool_] | None = None) -> Blocks:
        """The features of the chosen rows, one block per part; may be iterated more than once."""
        return Blocks(self._uris, self._ends, np.ones(len(self), bool) if chosen is None else chosen)

    def features(self, chosen: npt.NDArray[np.bool_] | None = None) -> Features:
        """All features of the chosen rows at once, float32 (number of them, D)."""
        return np.concatenate(list(self.blocks(chosen)))


class Blocks:
    """Iterates over features and holds at most one part in memory."""

    def __init__(self, uris: list[str], ends: Rows, chosen: npt.NDArray[np.bool_]) -> None:
        self._uris, self._ends, self._chosen = uris, ends, chosen

    def __iter__(self) -> Iterator[Features]:
        first = 0
        for uri, end in zip(self._uris, self._ends, strict=True):
            mask = self._chosen[first:end]
            first = end
            if mask.any():
                yield _dense(_read_columns(uri, [FEATURE])[FEATURE])[mask]


def _dense(column: pa.ChunkedArray) -> Features:
    parts = [chunk.flatten().to_numpy().reshape(len(chunk), chunk.type.list_size) for chunk in column.chunks]
    dense: Features = np.concatenate(parts)
    return dense


def _read_columns(uri: str, names: Sequence[str]) -> pa.Table:
    return _read(uri, lambda file: pq.read_table(file, columns=list(names))).replace_schema_metadata(None)


def _read(uri: str, read: Callable[[pa.NativeFile], Result]) -> Result:
    """Reads from a local or remote part; only the ranges that `read` asks for are fetched.

    Raises:
        FileNotFoundError: there is no such part.
    """
    filesystem, path = storage.filesystem(uri)

    def opened() -> Result:
        with filesystem.open_input_file(path) as file:
            return read(file)

    return storage.patiently(opened)
