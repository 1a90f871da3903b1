"""Reads single clips of a data set, wherever its shards are, and checks each when it is read first.

A clip is a range of its shard. On this machine's disk the shard is memory-mapped, so the pixels of a raw clip are a
view of the file. From a remote shard the range alone is fetched, into the cache of the node, and mapped from there.


Stored clips by their ranges, checked by their hashes: one of them, or all of a shard while it is read once.

This needs no memory map, so the shard may be anywhere.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vmoco import storage
from vmoco.data import frames
from vmoco.data import frames as storing
from vmoco.data.clip_cache import ClipCache
from vmoco.data.frames import Encoding, Frames, Shape
from vmoco.data.manifest import Manifest
from vmoco.data.shard import ShardFile

_FETCHES = 16
"""Clips that are fetched from remote shards side by side: one takes as long as the way there and back."""
_MEND = "bring the shard back as it was, or remove it and run jobs/ingest.py again"


class ClipReader:
    """Clips by their place in a table of the manifest's rows; for several threads.

    Args:
        manifest: data set.
        rows: rows of its table; a clip is named by its place in them.
        cache: for remote shards; None where they are on this machine's disk.
    """

    def __init__(self, manifest: Manifest, rows: pa.Table, *, cache: ClipCache | None) -> None:
        self._manifest = manifest
        self._cache = cache
        self._clip_ids = rows["clip_id"]
        self._sha256 = rows["sha256"]
        self._shards = rows["shard"].combine_chunks().dictionary_encode()
        self._shard_of = self._shards.indices.to_numpy()
        self._offset = rows["offset"].to_numpy()
        self._num_bytes = rows["num_bytes"].to_numpy()
        self._checked = np.zeros(rows.num_rows, bool)
        self._open: dict[int, Any] = {}
        self._opening = threading.Lock()
        self._fetching = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch") if cache else None

    def frames(self, clip: int) -> Frames:
        """The pixels of a clip, uint8 (T, H, W, C): a read-only view where it is stored raw.

        Raises:
            ValueError: its shard is missing or truncated, or its bytes are not those that the manifest knows.
        """
        stored = self._remote(clip) if self._cache else self._local(clip)
        if not self._checked[clip]:
            if hashlib.sha256(stored).hexdigest() != self._sha256[clip].as_py():
                if self._cache is None:
                    raise ValueError(
                        f"clip {self._clip_ids[clip]} of shard {self._uri(clip)} is damaged: its bytes do not have the "
                        f"SHA-256 of the manifest; {_MEND}"
                    )
                self._cache.drop(self._sha256[clip].as_py())  # this disk has damaged it: the shard has it whole
                stored = self._remote(clip)
            self._checked[clip] = True
        return storing.decode(stored, self._manifest.encoding, self._manifest.frame_shape)

    def several(self, clips: Iterable[int]) -> Iterator[Frames]:
        """`frames` of each clip, in their order; those of remote shards are read side by side."""
        return self._fetching.map(self.frames, clips) if self._fetching else map(self.frames, clips)

    def _local(self, clip: int) -> memoryview:
        shard = int(self._shard_of[clip])
        with self._opening:
            if shard not in self._open:
                self._open[shard] = self._map(clip)
        begin = int(self._offset[clip])
        mapped: memoryview = self._open[shard]
        return mapped[begin : begin + int(self._num_bytes[clip])]

    def _map(self, clip: int) -> memoryview:
        uri = self._uri(clip)
        path = storage.local_path(uri)
        assert path is not None, "remote shards have a cache"
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"shard {uri} is missing: {_MEND}") from None
        if found != (known := self._manifest.shards[self._name(clip)].num_bytes):
            raise ValueError(f"shard {uri} is truncated or was changed: {found} bytes of {known}; {_MEND}")
        return _mapped(path)

    def _remote(self, clip: int) -> memoryview:
        assert self._cache is not None, "called for remote shards alone"
        path = self._cache.get(self._sha256[clip].as_py(), fetch=lambda: self._fetch(clip))
        try:
            return _mapped(path)
        except (FileNotFoundError, ValueError):  # removed by another process to make room, just now
            return memoryview(self._fetch(clip))

    def _fetch(self, clip: int) -> bytes:
        shard, uri = int(self._shard_of[clip]), self._uri(clip)
        try:
            with self._opening:
                if shard not in self._open:
                    filesystem, path = storage.filesystem(uri)
                    self._open[shard] = filesystem.open_input_file(path)
            size, begin = int(self._num_bytes[clip]), int(self._offset[clip])
            content = bytes(storage.patiently(lambda: self._open[shard].read_at(size, begin)))
        except FileNotFoundError:
            raise ValueError(f"shard {uri} is missing: {_MEND}") from None
        if hashlib.sha256(content).hexdigest() != self._sha256[clip].as_py():  # never into the cache
            raise ValueError(
                f"clip {self._clip_ids[clip]} of shard {uri} is damaged: the {len(content)} bytes that were fetched do "
                f"not have the SHA-256 of the manifest; {_MEND}"
            )
        return content

    def _name(self, clip: int) -> str:
        name: str = self._shards.dictionary[int(self._shard_of[clip])].as_py()
        return name

    def _uri(self, clip: int) -> str:
        return self._manifest.shard_uri(self._name(clip))


def cache_for(manifest: Manifest, *, folder: str | None = None, gib: float = 50.0) -> ClipCache | None:
    """The cache of this node for a data set; None where its shards are on this machine's disk.

    Args:
        manifest: data set.
        folder: `data.cache`.
        gib: `data.cache_gib`.

    Raises:
        ValueError: the folder cannot be used.
    """
    if storage.local_path(manifest.uri) is not None:
        return None
    place = Path(folder or storage.join(storage.home(), "cache")).expanduser()
    return ClipCache(place / "clips", max_bytes=int(gib * 2**30))


def _mapped(path: Path) -> memoryview:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)


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
