"""The one reader of shards: it finds clips by their byte ranges and checks them by their hashes.

A clip is a range of bytes of its shard. A shard on this machine's disk is memory-mapped, so a raw clip is a view of the
file and costs no copy. From a remote shard only the range is fetched, into the cache of this node, and mapped there.

`ClipReader` reads clips in any order. `ShardScan` reads one shard from its first byte to its last, as a check of
the complete file needs it.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from vmoco import storage
from vmoco.data import frames as storing
from vmoco.data.checked_clips import CheckedClips, file_mark
from vmoco.data.clip_cache import ClipCache, map_file
from vmoco.data.cores import own_cores
from vmoco.data.frames import Encoding, Frames, Shape
from vmoco.data.manifest import Manifest, shard_uri
from vmoco.data.shard import ShardFile, ShardHash

MAX_OPEN = 64
"""Shards that a reader keeps open: memory maps, or connections to a store."""
_FETCH_THREADS = 16
"""Clips that are fetched from remote shards at once: each waits for one round trip to the store."""
_MOST_THREADS = 8
"""Most threads that hash and decode clips of this machine's disk; while they do, other threads run."""
_PIECE = 2**22  # bytes
_TOGETHER = 2**23
"""Bytes of a shard that one request fetches where neighbouring clips are wanted too."""
_FIX = "restore the shard, or remove it and run jobs/ingest.py again"


class Rows(Protocol):
    """Where clips lie. `clip_index.ClipIndex` is one, and `TableRows`."""

    @property
    def num_clips(self) -> int:
        """Number of clips."""

    def clip_id(self, clip: int) -> str:
        """Name of a clip in the manifest."""

    def sha256(self, clip: int) -> str:
        """Hash of its stored bytes, 64 hex digits."""

    def extent(self, clip: int) -> tuple[int, int]:
        """Its first byte in its shard, and its number of bytes."""

    def shard(self, clip: int) -> int:
        """Number of its shard."""

    def shard_name(self, shard: int) -> str:
        """Name of a shard, by its number."""


_TABLE_ROWS = ("clip_id", "shard", "offset", "num_bytes", "sha256", "height", "width")
"""What `TableRows` and a crop need to know of clips."""
_TEXTS = ("clip_id", "sha256")


class TableRows:
    """Rows of a manifest in memory, with the first five columns of _TABLE_ROWS."""

    def __init__(self, rows: pa.Table) -> None:
        self.num_clips = rows.num_rows
        # Large strings: 2 GiB of hashes are those of 33 million clips.
        self._clip_ids, self._sha256 = (rows[name].cast(pa.large_string()).combine_chunks() for name in _TEXTS)
        self._shards = rows["shard"].combine_chunks().dictionary_encode()  # that of `Manifest.columns` is one already
        self._shard_of = self._shards.indices.to_numpy()
        self._offset, self._num_bytes = rows["offset"].to_numpy(), rows["num_bytes"].to_numpy()

    def clip_id(self, clip: int) -> str:
        """As `Rows`."""
        name: str = self._clip_ids[clip].as_py()
        return name

    def sha256(self, clip: int) -> str:
        """As `Rows`."""
        name: str = self._sha256[clip].as_py()
        return name

    def extent(self, clip: int) -> tuple[int, int]:
        """As `Rows`."""
        return int(self._offset[clip]), int(self._num_bytes[clip])

    def shard(self, clip: int) -> int:
        """As `Rows`."""
        return int(self._shard_of[clip])

    def shard_name(self, shard: int) -> str:
        """As `Rows`."""
        name: str = self._shards.dictionary[shard].as_py()
        return name


class ClipReader:
    """Reads clips of a data set, local or remote. Several threads may use one reader.

    Args:
        uri: folder of the data set.
        rows: its clips, as an index or as rows of its manifest; a clip is named by its place here.
        frame_shape: (T, H, W, C) of every stored clip.
        encoding: how its frames are stored.
        shard_bytes: sizes of the shards by name, to notice a truncated one before its first clip is read.
        crop: cut off the padding of pictures that do not fill the frame; needs rows of a manifest.
        cache: for clips of remote shards that are read more than once; without one they are fetched each time.
        max_open: shards that are kept open; the one that was used longest ago is closed first.
        threads: that read several clips at once; 0 chooses.
        checked: clips on this node's disk that need no hash, because another rank has hashed them.
        together: from a remote shard, fetch the clips around a clip into the cache with it, by one request.
    """

    def __init__(
        self,
        uri: str,
        rows: pa.Table | Rows,
        *,
        frame_shape: Shape,
        encoding: Encoding,
        shard_bytes: Mapping[str, int] | None = None,
        crop: bool = False,
        cache: ClipCache | None = None,
        max_open: int = MAX_OPEN,
        threads: int = 0,
        checked: CheckedClips | None = None,
        together: bool = False,
    ) -> None:
        self._uri, self._frame_shape, self._encoding, self._shard_bytes = uri, frame_shape, encoding, shard_bytes or {}
        self._rows: Rows = TableRows(rows) if isinstance(rows, pa.Table) else rows
        self._pictures = None
        if crop:
            assert isinstance(rows, pa.Table), "an index does not know the pictures"
            self._pictures = rows["height"].to_numpy(), rows["width"].to_numpy()
        self._checked = np.zeros(self._rows.num_clips, bool)
        self._cache, self._is_remote = cache, storage.local_path(uri) is None
        self._known = None if self._is_remote else checked
        self._open: OrderedDict[int, Future[Any]] = OrderedDict()
        self._max_open = max_open
        self._file_marks: dict[int, str] = {}  # of the shards that are or were open
        self._together = together
        self._fetching: dict[tuple[int, int], Future[dict[int, memoryview]]] = {}  # by shard and piece of it
        self._lock = threading.Lock()  # of `_open` and `_fetching`; never held while a file is opened or read
        threads = threads or (_FETCH_THREADS if self._is_remote else min(_MOST_THREADS, own_cores()))
        self._pool = ThreadPoolExecutor(threads, "clips") if threads > 1 or self._is_remote else None
        self._ahead = 2 * threads

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        rows: pa.Table | Rows | None = None,
        *,
        crop: bool = False,
        cache: ClipCache | None = None,
        threads: int = 0,
        checked: CheckedClips | None = None,
        together: bool = False,
    ) -> ClipReader:
        """A reader of some clips of a data set, or of all."""
        return cls(
            manifest.uri,
            manifest.columns(_TABLE_ROWS) if rows is None else rows,
            frame_shape=manifest.frame_shape,
            encoding=manifest.encoding,
            shard_bytes={name: file.num_bytes for name, file in manifest.shards.items()},
            crop=crop,
            cache=cache,
            threads=threads,
            checked=checked,
            together=together,
        )

    def frames(self, clip: int, numbers: Sequence[int] | None = None) -> Frames:
        """Frames of a clip; no others are decoded.

        Args:
            clip: its place in the rows.
            numbers: of the frames that are wanted, in order; all when left out.

        Returns:
            uint8 (len(numbers), H, W, C); of a raw clip a read-only view where the numbers are a `range`.

        Raises:
            ValueError: its shard is missing or truncated, or its bytes are not those that ingest wrote.
            OSError: the store cannot be reached.
        """
        stored = self._stored(clip)
        try:
            frames = storing.decode(stored, self._encoding, self._frame_shape, numbers)
        except ValueError as error:
            raise ValueError(f"{self._name(clip)} cannot be decoded: {error}; {_FIX}") from None
        if self._pictures is None:
            return frames
        height, width = (int(sizes[clip]) for sizes in self._pictures)
        return frames[:, :height, :width]

    def several(
        self, clips: Iterable[int], numbers: Iterable[Sequence[int] | None] = itertools.repeat(None)
    ) -> Iterator[Frames]:
        """`frames` of each clip, in the order asked for; several threads fetch, hash and decode what needs it.

        Reads only a few clips ahead of the caller, so any number of clips may be asked for.
        """
        if self._pool is None:
            yield from map(self.frames, clips, numbers)
            return
        waiting: deque[Future[Frames]] = deque()
        try:
            for clip, wanted in zip(clips, numbers, strict=False):
                waiting.append(self._start(self._pool, clip, wanted))
                if len(waiting) == self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _start(self, pool: ThreadPoolExecutor, clip: int, numbers: Sequence[int] | None) -> Future[Frames]:
        """`frames` in a thread; of a raw clip on disk that was read before, here: a view costs less than a thread."""
        if self._is_remote or self._encoding != "raw" or not self._checked[clip]:
            return pool.submit(self.frames, clip, numbers)
        future: Future[Frames] = Future()
        future.set_result(self.frames(clip, numbers))
        return future

    def _stored(self, clip: int) -> memoryview:
        """The stored bytes of a clip, hashed when they are read for the first time."""
        stored = self._read(clip)
        if not self._checked[clip] and not self._is_known(clip):
            if not self._is_intact(clip, stored):
                if not self._is_remote or self._cache is None:
                    raise ValueError(self._damage(clip, stored))
                self._cache.drop(self._rows.sha256(clip))  # this disk has damaged it: the store has the original
                stored = self._read(clip)
            if self._known is not None and (mark := self._mark(clip)):
                self._known.add(mark)
        self._checked[clip] = True
        return stored

    def _is_known(self, clip: int) -> bool:
        """Whether a rank of this node has hashed the clip."""
        mark = self._mark(clip)
        return mark is not None and self._known is not None and mark in self._known

    def _mark(self, clip: int) -> tuple[int, int] | None:
        shard = self._file_marks.get(self._rows.shard(clip))
        return self._known.mark(self._rows.sha256(clip), shard) if self._known and shard else None

    def _read(self, clip: int) -> memoryview:
        if not self._is_remote:
            return self._mapped(clip)
        if self._cache is None:
            return memoryview(self._fetch(clip))
        fetch = self._fetch_together if self._together else self._fetch
        return self._cache.read(self._rows.sha256(clip), fetch=lambda: fetch(clip))

    def _mapped(self, clip: int) -> memoryview:
        mapped = self._opened(clip)
        begin, size = self._rows.extent(clip)
        end = begin + size
        if end > mapped.nbytes:
            raise ValueError(
                f"shard {self._shard_uri(clip)} is truncated or was changed: it has {mapped.nbytes} bytes, and clip "
                f"{self._rows.clip_id(clip)} ends at byte {end}; {_FIX}"
            )
        return mapped[begin:end]

    def _fetch(self, clip: int) -> bytes:
        begin, size = self._rows.extent(clip)
        content = bytes(storage.patiently(lambda: self._opened(clip).read_at(size, begin)))
        if not self._is_intact(clip, content):  # damage never enters the cache
            raise ValueError(self._damage(clip, content))
        return content

    def _fetch_together(self, clip: int) -> bytes:
        """As `_fetch`, and puts the other clips of this piece of the shard into the cache.

        One thread fetches a piece, and others that want it wait for that one.
        """
        assert self._cache is not None
        shard, (begin, _) = self._rows.shard(clip), self._rows.extent(clip)
        piece = shard, begin // _TOGETHER
        with self._lock:
            future = self._fetching.get(piece)
            fetches = future is None
            if future is None:
                future = self._fetching[piece] = Future()
        if fetches:
            try:
                kept = self._cache.find(self._rows.sha256(clip))  # by a thread that has just left
                future.set_result(self._fetch_piece(clip, *piece, self._cache) if kept is None else {clip: kept})
            except BaseException as error:
                future.set_exception(error)
            finally:
                with self._lock:
                    del self._fetching[piece]
        stored = future.result().get(clip)
        # It is not there if it is damaged, or if the piece was fetched for a clip whose neighbours end before this one.
        return self._fetch(clip) if stored is None else bytes(stored)

    def _fetch_piece(self, clip: int, shard: int, piece: int, cache: ClipCache) -> dict[int, memoryview]:
        """The clips around a clip that are not damaged, by one request; they are in the cache then."""
        extents = {clip: self._rows.extent(clip)}
        for rows, last in ((range(clip - 1, -1, -1), clip), (range(clip + 1, self._rows.num_clips), clip)):
            for at in rows:
                begin, size = self._rows.extent(at)
                gap = abs(begin - extents[last][0]) - (size if at < last else extents[last][1])
                # What lies between two clips of a sparse selection is not worth its bytes.
                if self._rows.shard(at) != shard or begin // _TOGETHER != piece or not 0 <= gap <= size:
                    break
                extents[at], last = (begin, size), at
        first, end = min(at for at, _ in extents.values()), max(at + size for at, size in extents.values())
        content = memoryview(storage.patiently(lambda: self._opened(clip).read_at(end - first, first)))
        read = {each: content[at - first : at - first + size] for each, (at, size) in extents.items()}
        intact = {each: own for each, own in read.items() if self._is_intact(each, own)}
        for each, own in intact.items():
            cache.add(self._rows.sha256(each), own)
        return intact

    def _opened(self, clip: int) -> Any:
        """The shard of a clip: its mapped bytes, or the remote file. One thread opens it, others wait for that one."""
        shard = self._rows.shard(clip)
        with self._lock:
            future = self._open.get(shard)
            opens = future is None
            if future is None:
                future = self._open[shard] = Future()
                if len(self._open) > self._max_open:
                    self._open.popitem(last=False)  # whoever still reads it keeps it open
            else:
                self._open.move_to_end(shard)
        if opens:
            try:
                future.set_result(self._open_shard(clip))
            except BaseException as error:
                with self._lock:
                    if self._open.get(shard) is future:
                        del self._open[shard]  # the next try opens it again
                future.set_exception(error)
        return future.result()

    def _open_shard(self, clip: int) -> Any:
        uri = self._shard_uri(clip)
        filesystem, path = storage.filesystem(uri)
        try:
            if self._is_remote:
                return filesystem.open_input_file(path)
            before = file_mark(path)
            mapped = map_file(Path(path))
            # A file that is replaced just now has no mark, so all its clips are hashed.
            if file_mark(path) == before:
                self._file_marks[self._rows.shard(clip)] = before
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"shard {uri} is missing: {_FIX}") from None
        known = self._shard_bytes.get(self._shard_name(clip), mapped.nbytes)
        if mapped.nbytes != known:
            raise ValueError(f"shard {uri} is truncated or was changed: {mapped.nbytes} bytes of {known}; {_FIX}")
        return mapped

    def _is_intact(self, clip: int, stored: bytes | memoryview) -> bool:
        return hashlib.sha256(stored).hexdigest() == self._rows.sha256(clip)

    def _damage(self, clip: int, stored: bytes | memoryview) -> str:
        return (
            f"{self._name(clip)} is damaged: the SHA-256 of its {len(stored)} bytes is not that of the manifest; {_FIX}"
        )

    def _name(self, clip: int) -> str:
        return f"clip {self._rows.clip_id(clip)} of shard {self._shard_uri(clip)}"

    def _shard_uri(self, clip: int) -> str:
        return shard_uri(self._uri, self._shard_name(clip))

    def _shard_name(self, clip: int) -> str:
        return self._rows.shard_name(self._rows.shard(clip))


class ShardScan:
    """Reads a shard once, from one end to the other: its stored clips, and in the end its size and hash.

    Args:
        uri: of the shard.
        rows: all its clips, as `shard.read_rows` gives them, in any order.
        by_clips: `ShardFile.by_clips`.
    """

    def __init__(self, uri: str, rows: list[dict[str, Any]], *, by_clips: bool) -> None:
        self._uri, self._by_clips = uri, by_clips
        self._rows = sorted(rows, key=lambda row: int(row["offset"]))
        self._hash, self._num_bytes = ShardHash(), 0

    def __iter__(self) -> Iterator[tuple[dict[str, Any], bytes, bool]]:
        """Each row, its stored bytes, and whether their SHA-256 is that of the row.

        Raises:
            OSError: the shard cannot be read.
        """
        filesystem, path = storage.filesystem(self._uri)
        with filesystem.open_input_stream(path) as file:
            for row in self._rows:
                self._skip(file, row["offset"] - self._num_bytes)
                stored = self._read(file, row["num_bytes"])
                found = hashlib.sha256(stored).hexdigest()
                if self._by_clips:
                    self._hash.add_clip(found)
                else:
                    self._hash.add(stored)
                yield row, stored, found == row["sha256"]
            self._skip(file, 2**62)

    @property
    def file(self) -> ShardFile:
        """Size and hash of what was read: of the complete shard once the iteration has ended."""
        return ShardFile(self._num_bytes, self._hash.hexdigest(), by_clips=self._by_clips)

    def _skip(self, file: Any, size: int) -> None:
        while size > 0 and (piece := self._read(file, min(_PIECE, size))):
            self._hash.add(piece)
            size -= len(piece)

    def _read(self, file: Any, size: int) -> bytes:
        piece: bytes = file.read(size)
        self._num_bytes += len(piece)
        return piece
