"""A shard: one Arrow IPC file of clips, which is read by memory map or by byte ranges.

The file is not compressed and has one record batch per clip. So the frames of a clip are one range of the file, row i
is record batch i, and a reader touches only what it asks for. All types are Arrow's own, so any Arrow reader opens it.

Schema, versions 2 and 3. Each row is a clip: ROW_FIELDS, then `frames`:

    raw    fixed_shape_tensor<uint8>[T, H, W, C]      the range (offset, num_bytes) is the pixels
    jpeg   list<binary>, T items, each a JPEG file    the range is Arrow's offsets of the items, and the items

No byte is hashed twice: in the hash of a shard, the hash of each clip stands for its bytes. A shard of version 2 has
the hash of all its bytes.

The metadata key `vmoco` of the schema holds the `ShardMetadata` as JSON: every video that was read for the shard, also
those that gave no clip. So a manifest can be made again from the shards, and a later ingest knows what was done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from vmoco import storage
from vmoco.data import frames as storing
from vmoco.data.frames import Encoding, Frames, Shape
from vmoco.data.ledger import Loss, Rejection

VERSION = 3
"""Of the schema of shards and manifest. 2: JPEG, byte ranges, sizes of pictures, splits, parts of long videos. 3: the
hash of a shard is made of those of its clips."""
READABLE = {2, 3}
"""Versions that this vmoco reads."""
READABLE_NAMES = " and ".join(map(str, sorted(READABLE)))
_LATER = ("notes", "source", "new_shots")
"""Fields of a video that came later."""


@dataclasses.dataclass(frozen=True)
class Video:
    """A video, or a part of a long one, as it was when it was read for a shard."""

    video_id: str
    num_bytes: int
    sha256: str
    """Hash of the file; empty where it could not be read."""
    entry: str = ""
    """Hash of its entry in the list of videos: size, range, label, splits."""
    range: str | None = None
    """Which seconds of the file it is, as `0.5-3`; None where it is all of it."""
    part: int = 0
    num_parts: int = 1
    """A long video is cut in parts, which may be in different shards."""
    notes: tuple[str, ...] = ()
    """What is unusual about it and what was done to its frames, as in `Timeline.notes`; not written where empty."""
    source: str | None = None
    """`Found.source`; not written where there is none."""
    new_shots: tuple[int, ...] = ()
    """Numbers of its clips before which another shot is known to begin, which their frames alone do not tell
    (`shots.py`). Clips count from the first one of the video in this shard. Not written where empty."""


@dataclasses.dataclass(frozen=True)
class ShardMetadata:
    """Which videos were read for a shard, with which settings, and which of them were rejected."""

    settings: dict[str, Any]
    """`IngestSettings.content()`."""
    frame_shape: Shape
    """(T, H, W, C) of every clip."""
    videos: tuple[Video, ...]
    """All of them, in the order in which they were planned."""
    rejected: tuple[Rejection, ...] = ()
    encoding: Encoding = "raw"
    """How the frames of every clip are stored."""
    losses: tuple[Loss, ...] = ()
    """Videos of which a part is lost."""

    def to_json(self) -> str:
        """Canonical JSON: equal metadata give equal bytes. What came later is left out where it is empty."""
        values = {"version": VERSION, **dataclasses.asdict(self)}
        later = [(values, "losses"), *((video, name) for video in values["videos"] for name in _LATER)]
        later += [(rejection, "damaged") for rejection in values["rejected"]]
        for fields, name in later:
            if not fields[name]:  # so the shard of a clean video has the bytes of earlier versions
                del fields[name]
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, *, uri: str) -> ShardMetadata:
        """Reads `to_json` back.

        Raises:
            ValueError: it is of another version.
        """
        values = json.loads(text)
        version = values.pop("version", None)
        if version not in READABLE:
            raise ValueError(
                f"shard {uri} has schema version {version}, this vmoco reads the versions {READABLE_NAMES}: "
                "use the vmoco that made it, or run jobs/ingest.py again into another folder"
            )
        return cls(
            settings=values["settings"],
            frame_shape=tuple(values["frame_shape"]),
            videos=tuple(
                Video(**video | {name: tuple(video.get(name, ())) for name in ("notes", "new_shots")})
                for video in values["videos"]
            ),
            rejected=tuple(Rejection(**rejection) for rejection in values["rejected"]),
            encoding=values["encoding"],
            losses=tuple(Loss.of(loss) for loss in values.get("losses", [])),
        )


METADATA_KEY = b"vmoco"

ROW_FIELDS = [
    pa.field("clip_id", pa.string(), nullable=False),  # 16 hex digits
    pa.field("video_id", pa.string(), nullable=False),
    pa.field("start_seconds", pa.float64(), nullable=False),  # time stamp of the first frame in its video
    pa.field("fps", pa.float64(), nullable=False),  # stored frames per second of video
    pa.field("height", pa.int32(), nullable=False),  # of the picture in the stored frame, from its top left corner
    pa.field("width", pa.int32(), nullable=False),
    pa.field("label", pa.string()),
    pa.field("split_1", pa.string()),  # `train`, `test`, `validate`: what the official split files say
    pa.field("split_2", pa.string()),
    pa.field("split_3", pa.string()),
    pa.field("held_out", pa.bool_(), nullable=False),
    pa.field("offset", pa.int64(), nullable=False),  # byte of the shard where the stored frames begin
    pa.field("num_bytes", pa.int64(), nullable=False),  # of the stored frames
    pa.field("sha256", pa.string(), nullable=False),  # of the stored frames
]


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip: its row, and its frames as `frames.encode` stores them."""

    clip_id: str
    video_id: str
    start_seconds: float
    fps: float
    held_out: bool
    stored: storing.Stored | Frames
    """The bytes; for raw clips also the frames themselves."""
    height: int | None = None
    """Of the picture in the frame, from its top left corner; None where it fills the frame."""
    width: int | None = None
    label: str | None = None
    splits: tuple[str | None, str | None, str | None] = (None, None, None)


@dataclasses.dataclass(frozen=True, slots=True)
class ShardFile:
    """Size and hash of a shard."""

    num_bytes: int
    sha256: str
    by_clips: bool = False
    """The hash is a `ShardHash`; otherwise it is that of all bytes, as in shards of version 2."""


class ShardHash:
    """SHA-256 of a shard in which the hash of each clip stands for its bytes."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, content: bytes | memoryview) -> None:
        """Bytes that belong to no clip, in the order of the file."""
        self._sha256.update(content)

    def add_clip(self, sha256: str) -> None:
        """The clip that begins at this place of the file: its hash in hexadecimal digits."""
        self._sha256.update(bytes.fromhex(sha256))

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def write_shard(uri: str, clips: Iterable[Clip], *, metadata: ShardMetadata) -> tuple[list[dict[str, Any]], ShardFile]:
    """Writes a shard that is never visible half-written, one clip in memory at a time.

    Returns:
        The rows without their pixels, in the order of the file, and the size and hash of the file.

    Raises:
        ValueError: the place cannot be written.
    """
    frames = pa.field("frames", _frames_type(metadata), nullable=False)
    schema = pa.schema([*ROW_FIELDS, frames], metadata={METADATA_KEY: metadata.to_json().encode()})
    options = pa.ipc.IpcWriteOptions(compression=None, use_threads=False)
    rows = []
    with storage.open_atomic(uri) as plain:
        file = _Hashing(plain)
        with pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema, options=options) as writer:
            end = _header_bytes(schema, options)
            for clip in clips:
                row = _row(clip, metadata.frame_shape)
                column = _column(clip, metadata)
                # The place of the frames is a field of the row, so it must be known before: a message has the same
                # size whatever the numbers in it, and the frames are its last buffer.
                batch = _batch(row, column, schema)
                end += pa.ipc.get_record_batch_size(batch)
                row["offset"] = end - (row["num_bytes"] + 7) // 8 * 8
                place = pa.array([row["offset"]], pa.int64())
                file.expect(row)
                writer.write_batch(batch.set_column(schema.get_field_index("offset"), schema.field("offset"), place))
                assert file.num_bytes == end, (file.num_bytes, end)
                rows.append(row)
    return rows, ShardFile(file.num_bytes, file.hash.hexdigest(), by_clips=True)


class _Hashing(io.RawIOBase):
    """Writes to a file, and hashes what is written, without the bytes of clips; closing it leaves the file open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.hash, self.num_bytes = file, ShardHash(), 0
        self._first = self._end = 0
        self._sha256 = ""

    def expect(self, row: dict[str, Any]) -> None:
        """Names the place and the hash of the next clip."""
        self._first, self._end, self._sha256 = row["offset"], row["offset"] + row["num_bytes"], row["sha256"]

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        written, at = memoryview(content).cast("B"), self.num_bytes
        self.num_bytes += written.nbytes
        self.hash.add(written[: max(0, self._first - at)])
        if at <= self._first < self.num_bytes:
            self.hash.add_clip(self._sha256)
        self.hash.add(written[max(0, self._end - at) :])
        return self._file.write(content)


def _frames_type(metadata: ShardMetadata) -> pa.DataType:
    if metadata.encoding == "raw":
        return pa.fixed_shape_tensor(pa.uint8(), metadata.frame_shape)
    return pa.list_(pa.field("item", pa.binary(), nullable=False))


def _row(clip: Clip, shape: Shape) -> dict[str, Any]:
    row = {field.name: getattr(clip, field.name, None) for field in ROW_FIELDS}
    row |= {f"split_{number}": split for number, split in enumerate(clip.splits, start=1)}
    row |= {"height": clip.height or shape[1], "width": clip.width or shape[2]}
    stored = _bytes(clip)
    return row | {"offset": 0, "num_bytes": stored.nbytes, "sha256": hashlib.sha256(stored).hexdigest()}


def _bytes(clip: Clip) -> memoryview:
    stored: Any = clip.stored  # mypy does not know that arrays are buffers
    return memoryview(stored).cast("B")


def _column(clip: Clip, metadata: ShardMetadata) -> pa.Array:
    column_type, stored = _frames_type(metadata), _bytes(clip)
    if metadata.encoding == "raw":
        pixels = storing.decode(stored, "raw", metadata.frame_shape).reshape(-1)
        storage_array = pa.FixedSizeListArray.from_arrays(pa.array(pixels), pixels.size)
        return pa.ExtensionArray.from_storage(column_type, storage_array)
    num_frames = metadata.frame_shape[0]
    images = storing.unpack(stored, num_frames=num_frames)
    ends = np.cumsum([0, *map(len, images)], dtype=np.int32)
    data = pa.py_buffer(stored[stored.nbytes - int(ends[-1]) :])
    values = pa.Array.from_buffers(pa.binary(), num_frames, [None, pa.py_buffer(ends), data])
    offsets = pa.py_buffer(np.array([0, num_frames], np.int32))
    return pa.Array.from_buffers(column_type, 1, [None, offsets], children=[values])


def _batch(row: dict[str, Any], column: pa.Array, schema: pa.Schema) -> pa.RecordBatch:
    columns = [pa.array([row[field.name]], field.type) for field in ROW_FIELDS]
    return pa.record_batch([*columns, column], schema=schema)


def _header_bytes(schema: pa.Schema, options: pa.ipc.IpcWriteOptions) -> int:
    """Size of what stands before the first batch."""
    sink = io.BytesIO()
    empty = pa.record_batch([pa.nulls(0, field.type) for field in schema], schema=schema)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(empty)
        return sink.tell() - pa.ipc.get_record_batch_size(empty)


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """A shard without its pixels: one table row per clip (ROW_FIELDS, in file order), and its metadata."""

    table: pa.Table
    metadata: ShardMetadata


def read_rows(uri: str) -> ShardRows:
    """Reads the rows of a shard and its metadata, and none of its pixels.

    Raises:
        ValueError: the shard is missing, truncated or of another version.
    """
    filesystem, path = storage.filesystem(uri)
    try:
        with filesystem.open_input_file(path) as file:
            return read_rows_from(file, uri=uri)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"shard {uri} is missing: run jobs/ingest.py again, or give the folder that holds the data set"
        ) from None


def read_rows_from(file: pa.NativeFile, *, uri: str) -> ShardRows:
    """`read_rows` of an open file; `uri` is its name in errors."""
    metadata = _metadata(_open(file, uri=uri), uri=uri)
    # With a list of fields Arrow fetches only their buffers; without one it would read the whole batch.
    reader = _open(file, uri=uri, included_fields=list(range(len(ROW_FIELDS))))
    batches = [reader.get_batch(row) for row in range(reader.num_record_batches)]
    return ShardRows(pa.Table.from_batches(batches, schema=pa.schema(ROW_FIELDS)), metadata)


def _open(file: pa.NativeFile, *, uri: str, included_fields: list[int] | None = None) -> pa.ipc.RecordBatchFileReader:
    options = pa.ipc.IpcReadOptions(included_fields=included_fields, use_threads=False)
    try:
        return pa.ipc.open_file(file, options=options)
    except (pa.ArrowInvalid, OSError) as error:  # the footer is written last, so any cut loses it
        raise ValueError(
            f"shard {uri} is truncated or not an Arrow file ({error}): remove it and run jobs/ingest.py again"
        ) from None


def _metadata(reader: pa.ipc.RecordBatchFileReader, *, uri: str) -> ShardMetadata:
    text = (reader.schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{uri} is an Arrow file but not a vmoco shard: shards are made by jobs/ingest.py")
    return ShardMetadata.from_json(text, uri=uri)
