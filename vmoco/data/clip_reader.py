"""Reads single clips of a data set, wherever its shards are, and checks each when it is read first.

A clip is a range of its shard. On this machine's disk the shard is memory-mapped, so the pixels of a raw clip are a
view of the file. From a remote shard the range alone is fetched, into the cache of the node, and mapped from there.
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
from vmoco.data import frames as storing
from vmoco.data.clip_cache import ClipCache
from vmoco.data.frames import Frames
from vmoco.data.manifest import Manifest

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
        size = int(self._num_bytes[clip])
        path = self._cache.get(self._sha256[clip].as_py(), size, fetch=lambda: self._fetch(clip))
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
