"""Where a rank hangs: the stacks of all its threads, written when a step takes almost as long as ranks wait.

`faulthandler` writes them from a thread of C that needs no lock of Python. So they come also from a process whose
threads wait for each other, or whose interpreter is held by a library. They go into a file on the local disk, because
a store may be what hangs. The driver's side (`vmoco/train/channel.py`) fetches the files of all ranks before the run
restarts: a process that hangs cannot.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vmoco.own_folder import make_folder

SHARE = 0.75
"""Part of the time that ranks wait for each other, after which a rank writes its stacks. All ranks must have written
them before the first one gives up, and one that works ahead of its GPU begins its wait later than the others."""
FILE = "stacks.txt"


class StackDump:
    """Writes the stacks of this process if `expect` is not called again in time. There is one in a process.

    Args:
        parent: where its folder lies. Default: /tmp.

    Attributes:
        path: of the file; empty unless this process hangs.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._folder = make_folder(parent)
        self.path = self._folder / FILE
        # A descriptor and not a Python file: nothing is buffered, and C writes into it. It appends, so that a file
        # that was emptied has no hole.
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def expect(self, within_seconds: float) -> None:
        """The next step begins: writes the stacks unless this is called again within `SHARE` of the seconds."""
        if os.fstat(self._file).st_size:
            os.ftruncate(self._file, 0)  # the step before was slow, and did not hang
        faulthandler.dump_traceback_later(SHARE * within_seconds, file=self._file)

    def close(self) -> None:
        """Stops to wait, and removes the file, unless the last step hung.

        Then this process ends because it gave up, and its stacks are still to be fetched. The next process that makes
        such a folder removes this one.
        """
        faulthandler.cancel_dump_traceback_later()
        hung = os.fstat(self._file).st_size > 0
        os.close(self._file)
        if not hung:
            shutil.rmtree(self._folder, ignore_errors=True)


class Watched(NamedTuple):
    """Where the stacks of a rank would be."""

    node_id: str
    host: str
    path: str
    after_seconds: float
    """It writes them when a step has taken so long; earlier nobody needs to ask."""


def read_stacks(path: str) -> str:
    """Takes the stacks that a rank has written on this machine; empty if it has written none."""
    with contextlib.suppress(OSError):
        found = Path(path).read_text(errors="replace")
        Path(path).unlink()
        return found
    return ""


def stacks_document(watched: Mapping[int, Watched], stacks: Mapping[int, str | None]) -> str:
    """The stacks of all ranks as one text.

    Args:
        watched: all ranks.
        stacks: of each rank; empty if it wrote none, None if its machine does not answer.
    """
    parts = []
    for rank, where in sorted(watched.items()):
        text = stacks[rank]
        missing = "its machine does not answer" if text is None else "its step ended in time, or it was stopped itself"
        parts.append(f"==== rank {rank} on {where.host} ====\n{text or f'no stacks: {missing}'}")
    return "\n\n".join(parts) + "\n"
