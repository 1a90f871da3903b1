"""Stored clips by their ranges, checked by their hashes: one of them, or all of a shard while it is read once.

This needs no memory map, so the shard may be anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from vmoco import storage
from vmoco.data import frames
from vmoco.data.frames import Encoding, Frames, Shape
from vmoco.data.shard import ShardFile

_PIECE = 2**22  # bytes


def read_clip(uri: str, row: dict[str, Any], *, frame_shape: Shape, encoding: Encoding) -> Frames:
    """The frames of one clip, uint8 (T, H, W, C), by its range: also of a shard that is not on this machine.

    Args:
        uri: Of the shard.
        row: Of the manifest.
        frame_shape: (T, H, W, C) of every clip of the data set.
        encoding: How its frames are stored.

    Raises:
        ValueError: the shard cannot be read, or the bytes are not those that were written.
    """
    filesystem, path = storage.filesystem(uri)

    def read() -> bytes:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read_at(row["num_bytes"], row["offset"]))

    try:
        stored = storage.patiently(read)
    except OSError as error:
        raise ValueError(f"shard {uri} cannot be read: {error}") from None
    if hashlib.sha256(stored).hexdigest() != row["sha256"]:
        raise ValueError(f"clip {row['clip_id']} of shard {uri} is damaged: run jobs/check.py data")
    return frames.decode(stored, encoding, frame_shape)


class ShardScan:
    """Reads a shard once, from one end to the other: the stored clips on the way, and in the end its size and hash.

    Args:
        uri: Of the shard.
        rows: Its clips, as rows of the shard or the manifest.
    """

    def __init__(self, uri: str, rows: list[dict[str, Any]]) -> None:
        self._uri = uri
        self._rows = sorted(rows, key=lambda row: int(row["offset"]))
        self._sha256, self._num_bytes = hashlib.sha256(), 0

    def __iter__(self) -> Iterator[tuple[dict[str, Any], bytes, bool]]:
        """Each row, its stored bytes, and whether they are those that were written.

        Raises:
            OSError: the shard cannot be read.
        """
        filesystem, path = storage.filesystem(self._uri)
        with filesystem.open_input_stream(path) as file:
            for row in self._rows:
                self._skip(file, row["offset"] - self._num_bytes)
                stored = self._taken(file.read(row["num_bytes"]))
                yield row, stored, hashlib.sha256(stored).hexdigest() == row["sha256"]
            self._skip(file, 2**62)

    @property
    def file(self) -> ShardFile:
        """Size and hash of what was read: of the whole shard, once the iteration has come to its end."""
        return ShardFile(self._num_bytes, self._sha256.hexdigest())

    def _skip(self, file: Any, size: int) -> None:
        while size > 0 and (piece := self._taken(file.read(min(_PIECE, size)))):
            size -= len(piece)

    def _taken(self, piece: bytes) -> bytes:
        self._sha256.update(piece)
        self._num_bytes += len(piece)
        return piece
