"""Who may write into a run's folder: one job at a time, and of that job one group of workers at a time.

`lease.json` belongs to the job. Its beat counts up while the job lives. A second job with the same name is refused, and
takes over when the beat stands still. `writer.json` belongs to the first rank of the latest group of workers. A rank
that was cut off from the cluster and still runs finds another token in it, and stops writing. Clocks are never
compared, because machines disagree about the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from vmoco import storage

LEASE, WRITER = "lease.json", "writer.json"
BEAT_SECONDS = 3.0
STILL_SECONDS = 20.0
"""A job is considered dead when its beat stands still for this long."""
_SETTLE_SECONDS = 0.5  # two jobs that start at once both read the lease again after this time; the later one has won


class FencedError(RuntimeError):
    """Another group of workers has taken over the run: this one must end."""


class Lease:
    """The right of one job to a run; a context manager.

    Args:
        folder: URI of the run's folder.
        on_lost: called once, with an error message, when another job has taken over the run.
        show: prints a line.

    Attributes:
        token: identifies the holder; its workers present it.

    Raises:
        ValueError: on entering, if another job holds the run.
    """

    def __init__(self, folder: str, *, on_lost: Callable[[str], None], show: Callable[[str], None]) -> None:
        self.token = uuid.uuid4().hex
        self._uri = storage.join(folder, LEASE)
        self._on_lost = on_lost
        self._show = show
        self._beat = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        if (holder := _read(self._uri)) is not None and not _has_died(holder):
            self._wait_until_still(holder)
        self._write()
        time.sleep(_SETTLE_SECONDS)
        if (holder := _read(self._uri)) is None or holder["token"] != self.token:
            raise ValueError(_held(holder or {}))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError, ValueError):
            if (_read(self._uri) or {}).get("token") == self.token:
                storage.delete_file(self._uri)

    def _wait_until_still(self, holder: dict[str, Any]) -> None:
        self._show(f"{_held(holder)}; waiting up to {STILL_SECONDS:.0f} s to see whether that job still runs")
        end = time.monotonic() + STILL_SECONDS
        while time.monotonic() < end:
            time.sleep(0.5)
            now = _read(self._uri)
            if now is None:
                return
            if (now["token"], now["beat"]) != (holder["token"], holder["beat"]):
                raise ValueError(_held(now))

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                holder = _read(self._uri)
                if holder is not None and holder["token"] != self.token:
                    self._on_lost(_held(holder))
                    return
                self._write()
            except (OSError, ValueError):
                continue  # the storage does not answer for a moment: the next beat tries again

    def _write(self) -> None:
        self._beat += 1
        holder = {"token": self.token, "beat": self._beat, "host": socket.gethostname(), "pid": os.getpid()}
        storage.write_atomic(self._uri, json.dumps(holder | {"machine": _machine()}).encode())


class Fence:
    """The right of one group of workers to write. Its first rank makes it, and so ends the right of earlier groups.

    Args:
        folder: URI of the run's folder.
        lease: token of the job.

    Raises:
        FencedError: another job holds the run by now.
    """

    def __init__(self, folder: str, *, lease: str) -> None:
        self._uri = storage.join(folder, WRITER)
        self._token = uuid.uuid4().hex
        holder = _read(storage.join(folder, LEASE))
        if holder is not None and holder["token"] != lease:
            raise FencedError(_held(holder))
        text = json.dumps({"token": self._token, "host": socket.gethostname(), "pid": os.getpid()})
        storage.write_atomic(self._uri, text.encode())

    def check(self) -> None:
        """Returns if this group may still write.

        Raises:
            FencedError: a later group has started.
        """
        writer = _read(self._uri) or {}
        if writer.get("token") != self._token:
            where = f"process {writer.get('pid')} on {writer.get('host')}" if writer else "nobody"
            raise FencedError(f"{where} writes to this run now: these workers were cut off and end without writing")


def _read(uri: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    return found


def _held(holder: dict[str, Any]) -> str:
    return (
        f"this --run.name is being trained by process {holder.get('pid')} on {holder.get('host')}: stop that job "
        "first, or give another --run.name"
    )


def _machine() -> str:
    """Identifies this boot of this machine and its namespace of process ids: containers may share a host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _has_died(holder: dict[str, Any]) -> bool:
    """Whether the holder has certainly ended; on another machine this is unknown."""
    if not _machine() or holder.get("machine") != _machine():
        return False
    try:
        state = Path(f"/proc/{holder['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"  # it has ended, and its parent has not waited for it yet
