"""Which clips of this node's disk were hashed already, known to all ranks of the node.

A clip is hashed when it is read for the first time. Each epoch gives a rank other clips, so eight ranks would hash each
clip eight times, and again after a restart. The ranks share a mapped file instead, a table. A place of it holds 64 bits
made of a clip's SHA-256, of its shard's file as it was opened, and of the job. A shard that is written anew, and
another job, have other bits, so their clips are hashed again. Two clips at one place replace each other, which costs
one more hash and is never wrong. Nothing is locked: a place is one aligned number.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
import tempfile
from pathlib import Path

import numpy as np

_PLACES_PER_CLIP = 4  # 1 of 5 clips shares its place with another one
_MOST_PLACES = 2**24  # 128 MiB


class CheckedClips:
    """A table of the clips that ranks of this node have hashed.

    Args:
        job: name that the ranks of one job share, and no other job.
        num_clips: of the data set.
        folder: where the file of the table lies. Default: that of temporary files.

    Attributes:
        is_shared: whether other processes see the table. It is the own one of this process if the file cannot be used.
    """

    def __init__(self, job: str, *, num_clips: int, folder: Path | None = None) -> None:
        places = min(_MOST_PLACES, 1 << (_PLACES_PER_CLIP * max(num_clips, 1) - 1).bit_length())
        self._job = job
        self._mask = places - 1
        self.is_shared = False
        self._table = np.zeros(0, np.uint64)
        folder = folder or Path(tempfile.gettempdir())
        # No such folder, no space left, a file of another user, or a system that cannot reserve space (macOS).
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._table = _map(folder / f"vmoco-checked-{os.getuid()}-{places}", 8 * places)
            self.is_shared = True
        if not self.is_shared:
            self._table = np.zeros(places, np.uint64)

    def mark(self, sha256: str, shard: str) -> tuple[int, int]:
        """The place of a clip in the table, and what the table holds there once the clip is checked.

        Args:
            sha256: of the clip, by the manifest.
            shard: what tells the file of its shard, as it was opened, from every other file.
        """
        text = f"{self._job} {shard} {sha256}"
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        return value & self._mask, value | 1  # never 0, which an empty place holds

    def __contains__(self, mark: tuple[int, int]) -> bool:
        place, value = mark
        return int(self._table[place]) == value

    def add(self, mark: tuple[int, int]) -> None:
        """Notes that a clip was hashed, and was as it should be."""
        place, value = mark
        self._table[place] = value


def _map(path: Path, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Maps the file of a table, which is made if it is not there.

    Raises:
        OSError: it cannot be made or mapped, or the disk is full.
        ValueError: it belongs to somebody else, who could write into it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ValueError(f"{path} is not a file of this user alone")
        if found.st_size != size:
            # All of it now: a write into a mapped file that has no place on a full disk would kill the process.
            os.posix_fallocate(file, 0, size)
        return np.frombuffer(mmap.mmap(file, size), np.uint64)
    finally:
        os.close(file)


def file_mark(path: str) -> str:
    """What tells a file, as it is now, from every other file of this node and from its own earlier content."""
    found = os.stat(path)
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"
