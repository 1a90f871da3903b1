"""Clips of remote shards on this node's disk, with a bound on their size; all processes of the node share them.

Each clip is one file, named by the SHA-256 of its bytes. So every run finds a clip that another run has fetched, and
the name of a file is enough to check it. A file gets its name only when it is complete, so readers need no lock.
Writers take a lock: each adds the size of its clip to a total, and first removes the clips that were read longest ago
where there is no space. A file that another process still reads keeps its content until that process closes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from vmoco import storage

_SIZE = "size"
"""Name of the file that holds the total, in bytes."""
KEEP_SHARE = 0.9
"""Share of the bound that stays after clips were removed, so that not every new clip has to look through all files."""


def cache_for(uri: str, *, folder: str | None = None, gib: float = 50.0) -> ClipCache | None:
    """The cache of this node for a data set; None where the data set is on this machine's disk.

    Args:
        uri: of the data set.
        folder: `--data.cache`; $VMOCO_HOME/cache when left out.
        gib: `--data.cache-gib`, the most that the cache may hold.

    Raises:
        ValueError: the folder cannot be used.
    """
    if storage.local_path(uri) is not None:
        return None
    place = Path(folder or storage.join(storage.home(), "cache")).expanduser()
    return ClipCache(place / "clips", max_bytes=int(gib * 2**30))


class CacheError(ValueError):
    """The folder or the disk of a cache cannot take a file."""


def map_file(path: Path) -> memoryview:
    """A file as memory; it takes no file descriptor, and stays mapped until the last view of it has gone."""
    with pa.memory_map(str(path)) as file:
        return memoryview(file.read_buffer()).cast("B")


class ClipCache:
    """A folder of clips.

    Args:
        folder: on this node's disk; made if it is not there.
        max_bytes: most that it may hold.
        setting: what names the folder, for error messages.

    Raises:
        CacheError: the folder cannot be used.
    """

    def __init__(self, folder: Path, *, max_bytes: int, setting: str = "--data.cache") -> None:
        self._setting = setting
        self._folder = folder
        self._max_bytes = max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked_size():
                pass
        except OSError as error:
            raise CacheError(f"{setting} {folder} cannot be used ({error.strerror}): give another folder") from error

    def read(self, name: str, *, fetch: Callable[[], bytes]) -> memoryview:
        """The bytes of a clip; fetched first where the cache does not have them.

        They are mapped, and stay readable when another process removes the file to free space.

        Args:
            name: SHA-256 of its bytes. The bytes of a file are not checked against it.
            fetch: returns its bytes; not called while the lock is held.

        Raises:
            CacheError: the cache or the disk is too small for it.
        """
        if (kept := self.find(name)) is not None:
            return kept
        content = fetch()
        self.add(name, content)
        return memoryview(content)

    def find(self, name: str) -> memoryview | None:
        """The bytes of a clip, mapped; None if the cache does not have them."""
        path = self._folder / name[:2] / name
        try:
            os.utime(path)  # read just now, so it is removed late
            return map_file(path)
        except FileNotFoundError:  # not there yet, or removed between the two lines
            return None

    def add(self, name: str, content: bytes | memoryview) -> None:
        """Keeps the bytes of a clip.

        Raises:
            CacheError: the cache or the disk is too small for it.
        """
        path = self._folder / name[:2] / name
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        # Written under the lock, so that the total is that of the files: it takes milliseconds, the fetch takes longer.
        with self._locked_size() as size_file:
            if path.exists():  # another process was faster
                return
            self._make_space(len(content), size_file)
            try:
                path.parent.mkdir(exist_ok=True)
                temporary.write_bytes(content)
                os.replace(temporary, path)
            except OSError as error:
                raise CacheError(
                    f"{self._setting} {self._folder}: a file cannot be written ({error.strerror}); lower its bound "
                    "below the free space of the disk, or give another folder"
                ) from error
            finally:
                temporary.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Removes a clip whose content is not what its name says."""
        (self._folder / name[:2] / name).unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes of all clips, counted while no clip is added or removed."""
        with self._locked_size():
            return sum(size for _, size, _ in self._files())

    def _make_space(self, num_bytes: int, size_file: Path) -> None:
        if num_bytes > self._max_bytes:
            raise CacheError(
                f"{self._setting} {self._folder} may hold {self._max_bytes / 2**30:.3f} GiB, less than one file of "
                f"{num_bytes} bytes: raise its bound"
            )
        used = int(size_file.read_text() or 0) + num_bytes
        if used > self._max_bytes:
            # Counted from the files: a process that was killed may have left a wrong total.
            files = sorted(self._files())
            used = sum(size for _, size, _ in files) + num_bytes
            for _, size, path in files:
                if used <= self._max_bytes * KEEP_SHARE:
                    break
                path.unlink(missing_ok=True)
                used -= size
        size_file.write_text(str(used))

    @contextlib.contextmanager
    def _locked_size(self) -> Iterator[Path]:
        """The file with the total, which no other process reads or writes meanwhile."""
        with open(self._folder / f".{_SIZE}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self._folder / _SIZE
            path.touch()
            yield path

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Of each clip the time of its last read, its size and its path."""
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                status = path.stat()
                yield status.st_mtime, status.st_size, path
