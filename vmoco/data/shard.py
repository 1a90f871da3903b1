"""A shard: one Arrow IPC file of clips, read by memory map.

Uncompressed, and one record batch per clip: so a clip is one contiguous range of the file, row i is record batch i,
and a reader touches nothing but what it asks for. Only Arrow's own types, so any Arrow reader opens it. The schema
metadata accounts for every video that went in, also for those that gave no clip: a manifest can be rebuilt from shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vmoco import storage
from vmoco.data.ledger import Rejection

VERSION = 1
METADATA_KEY = b"vmoco"

Frames = npt.NDArray[np.uint8]

ROW_FIELDS = [
    pa.field("clip_id", pa.string(), nullable=False),  # 16 hex digits
    pa.field("video_id", pa.string(), nullable=False),
    pa.field("start_seconds", pa.float64(), nullable=False),  # time stamp of the first frame in its video
    pa.field("fps", pa.float64(), nullable=False),  # stored frames per second of video: its rate divided by the stride
    pa.field("label", pa.string()),
    pa.field("held_out", pa.bool_(), nullable=False),
    pa.field("sha256", pa.string(), nullable=False),  # of the frames' bytes
]


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip: its row and its pixels. `frames` is uint8 (T, H, W, C), RGB."""

    clip_id: str
    video_id: str
    start_seconds: float
    fps: float
    held_out: bool
    frames: Frames
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Video:
    """A video that a shard accounts for, as it was when it was read."""

    video_id: str
    num_bytes: int
    sha256: str
    """Hash of the file; empty where it could not be read."""


@dataclasses.dataclass(frozen=True)
class Account:
    """Which videos went into a shard, with which settings, and which of them were rejected."""

    settings: dict[str, Any]
    """`IngestSettings.content()`."""
    frame_shape: tuple[int, int, int, int]
    """(T, H, W, C) of every clip."""
    videos: tuple[Video, ...]
    """All of them, in the order in which they were planned."""
    rejected: tuple[Rejection, ...] = ()

    def to_json(self) -> str:
        """The account as canonical JSON: equal accounts give equal bytes."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, *, uri: str) -> Account:
        """Reads `to_json` back.

        Raises:
            ValueError: it is of another version.
        """
        values = json.loads(text)
        version = values.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"shard {uri} has schema version {version}, this vmoco reads version {VERSION}: "
                "use the vmoco that made it, or run jobs/ingest.py again into another folder"
            )
        return cls(
            settings=values["settings"],
            frame_shape=tuple(values["frame_shape"]),
            videos=tuple(Video(**video) for video in values["videos"]),
            rejected=tuple(Rejection(**rejection) for rejection in values["rejected"]),
        )


def write_shard(uri: str, clips: Iterable[Clip], *, account: Account) -> list[dict[str, Any]]:
    """Writes a shard that is never visible half-written, one clip in memory at a time.

    Returns:
        The rows without their pixels, in the order of the file.

    Raises:
        ValueError: the place cannot be written.
    """
    tensor = pa.fixed_shape_tensor(pa.uint8(), account.frame_shape)
    fields = [*ROW_FIELDS, pa.field("frames", tensor, nullable=False)]
    schema = pa.schema(fields, metadata={METADATA_KEY: account.to_json().encode()})
    options = pa.ipc.IpcWriteOptions(compression=None, use_threads=False)
    rows = []
    with storage.open_atomic(uri) as file, pa.ipc.new_file(file, schema, options=options) as writer:
        for clip in clips:
            assert clip.frames.shape == account.frame_shape, (clip.frames.shape, account.frame_shape)
            assert clip.frames.dtype == np.uint8, clip.frames.dtype
            pixels = np.ascontiguousarray(clip.frames).reshape(-1)
            row = {
                "clip_id": clip.clip_id,
                "video_id": clip.video_id,
                "start_seconds": clip.start_seconds,
                "fps": clip.fps,
                "label": clip.label,
                "held_out": clip.held_out,
                "sha256": hashlib.sha256(pixels.data).hexdigest(),
            }
            stored = pa.FixedSizeListArray.from_arrays(pa.array(pixels), pixels.size)
            columns = [pa.array([row[field.name]], field.type) for field in ROW_FIELDS]
            frames = pa.ExtensionArray.from_storage(tensor, stored)
            writer.write_batch(pa.record_batch([*columns, frames], schema=schema))
            rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """A shard without its pixels: one table row per clip (the fields of ROW_FIELDS, in file order), and its account."""

    table: pa.Table
    account: Account


def read_rows(uri: str) -> ShardRows:
    """Reads the rows of a shard and its account, and none of its pixels.

    Raises:
        ValueError: the shard is missing, truncated or of another version.
    """
    filesystem, path = storage.filesystem(uri)
    try:
        with filesystem.open_input_file(path) as file:
            return read_rows_from(file, uri=uri)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(_missing(uri)) from None


def read_rows_from(file: pa.NativeFile, *, uri: str) -> ShardRows:
    """`read_rows` of an open file; `uri` is its name in errors."""
    account = _account(_open(file, uri=uri), uri=uri)
    # With a list of fields Arrow fetches only their buffers; without one it would read the whole batch.
    reader = _open(file, uri=uri, included_fields=list(range(len(ROW_FIELDS))))
    batches = [reader.get_batch(row) for row in range(reader.num_record_batches)]
    return ShardRows(pa.Table.from_batches(batches, schema=pa.schema(ROW_FIELDS)), account)


class ShardReader:
    """Memory-maps a shard on this machine's disk. Frames are views of the map: they are read when they are touched."""

    def __init__(self, path: str) -> None:
        """Opens the shard; reads its schema only.

        Raises:
            ValueError: the shard is missing, truncated or of another version, or not on a local disk.
        """
        local = storage.local_path(path)
        if local is None:
            raise ValueError(f"{path} is not on this machine's disk: a shard is memory-mapped, so copy it here first")
        try:
            self._map = pa.memory_map(str(local))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(_missing(path)) from None
        self._reader = _open(self._map, uri=path)
        self.account = _account(self._reader, uri=path)
        self._column = self._reader.schema.get_field_index("frames")

    def __len__(self) -> int:
        """Number of clips."""
        return int(self._reader.num_record_batches)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; views that are still held keep the memory map alive."""
        self._map.close()

    @property
    def frame_shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C) of every clip."""
        return self.account.frame_shape

    def frames(self, row: int) -> Frames:
        """The pixels of clip `row`: a read-only uint8 view (T, H, W, C) of the file, not a copy."""
        assert 0 <= row < len(self), (row, len(self))
        pixels = self._reader.get_batch(row).column(self._column).storage.flatten()
        view: Frames = pixels.to_numpy(zero_copy_only=True).reshape(self.frame_shape)
        return view


def _open(file: pa.NativeFile, *, uri: str, included_fields: list[int] | None = None) -> pa.ipc.RecordBatchFileReader:
    options = pa.ipc.IpcReadOptions(included_fields=included_fields, use_threads=False)
    try:
        return pa.ipc.open_file(file, options=options)
    except (pa.ArrowInvalid, OSError) as error:  # the footer is written last, so any cut loses it
        raise ValueError(
            f"shard {uri} is truncated or not an Arrow file ({error}): remove it and run jobs/ingest.py again"
        ) from None


def _account(reader: pa.ipc.RecordBatchFileReader, *, uri: str) -> Account:
    text = (reader.schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{uri} is an Arrow file but not a vmoco shard: shards are made by jobs/ingest.py")
    return Account.from_json(text, uri=uri)


def _missing(uri: str) -> str:
    return f"shard {uri} is missing: run jobs/ingest.py again, or give the folder that holds the data set"
