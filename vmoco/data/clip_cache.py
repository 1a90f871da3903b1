"""Clips of remote shards on this node's own disk, with a bound on their size; shared by all processes of the node.

Each clip is one file, named by the SHA-256 of its bytes: whoever needs the same clip finds it, whatever the run, and a
file can be checked by its name. A file gets its name when it is whole, so readers need no lock. Writers take one: each
newcomer adds its size to an account, and first removes those that were not read for longest where there is no room.
A file that another process still reads keeps its content until that process lets go of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_ACCOUNT = "size"
_FILL_AGAIN = 0.9
"""Share of the bound that is left after making room: not every newcomer has to look through all files."""


class CacheError(ValueError):
    """The folder or the disk of a cache cannot take a file."""


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
            with self._account():
                pass
        except OSError as error:
            raise CacheError(f"{setting} {folder} cannot be used ({error.strerror}): give another folder") from error

    def get(self, name: str, *, fetch: Callable[[], bytes]) -> Path:
        """The file of a clip; fetched first where it is not there.

        Args:
            name: SHA-256 of its bytes.
            fetch: returns its bytes.

        Raises:
            CacheError: there is no room for it.
        """
        path = self._folder / name[:2] / name
        try:
            os.utime(path)  # read now, so removed late
            return path
        except FileNotFoundError:
            pass
        content = fetch()
        temporary = path.with_name(f".{name}.{uuid.uuid4().hex}.tmp")
        # Written under the lock, so that what is accounted for is there: milliseconds beside the fetching.
        with self._account() as account:
            if path.exists():  # another process was faster
                return path
            self._make_room(len(content), account)
            try:
                path.parent.mkdir(exist_ok=True)
                temporary.write_bytes(content)
                os.replace(temporary, path)
            except OSError as error:
                raise CacheError(
                    f"{self._setting} {self._folder} cannot take a file ({error.strerror}): lower its bound below what "
                    "the disk has free, or give another folder"
                ) from error
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def drop(self, name: str) -> None:
        """Removes a clip whose content is not what its name says."""
        (self._folder / name[:2] / name).unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes of all clips that are there, counted while none is added or removed."""
        with self._account():
            return sum(size for _, size, _ in self._files())

    def _make_room(self, num_bytes: int, account: Path) -> None:
        if num_bytes > self._max_bytes:
            raise CacheError(
                f"{self._setting} {self._folder} may hold {self._max_bytes / 2**30:.3f} GiB, less than one file of "
                f"{num_bytes} bytes: raise its bound"
            )
        used = int(account.read_text() or 0) + num_bytes
        if used > self._max_bytes:
            # Counted anew: a process that was killed has left the account a little wrong.
            files = sorted(self._files())
            used = sum(size for _, size, _ in files) + num_bytes
            for _, size, path in files:
                if used <= self._max_bytes * _FILL_AGAIN:
                    break
                path.unlink(missing_ok=True)
                used -= size
        account.write_text(str(used))

    @contextlib.contextmanager
    def _account(self) -> Iterator[Path]:
        """The file of the account, which no other process reads or writes meanwhile."""
        with open(self._folder / f".{_ACCOUNT}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self._folder / _ACCOUNT
            path.touch()
            yield path

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each clip was read last, its size and its path."""
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                status = path.stat()
                yield status.st_mtime, status.st_size, path
