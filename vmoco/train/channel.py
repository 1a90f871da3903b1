"""What the driver and the workers of a run say to each other: lines to print, errors, and the wish to stop.

A Ray actor, because it reaches every node at once and ends with the driver. Ray's own forwarding of worker output puts
a process name before each line and mixes in everything that any library prints.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Channel:
    """The actor; every wait in it is answered the moment there is something to answer."""

    def __init__(self) -> None:
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        self._stop = asyncio.Event()
        self._error = ""
        self._starts = -1

    async def started(self) -> int:
        """Counts groups of workers; returns how many there were before this one."""
        self._starts += 1
        return self._starts

    async def num_started(self) -> int:
        """How many groups of workers there have been."""
        return self._starts + 1

    async def say(self, line: str | None) -> None:
        """Queues a line for the driver; None ends the listening."""
        await self._lines.put(line)

    async def next_line(self) -> str | None:
        """Waits for the next line."""
        return await self._lines.get()

    async def fail(self, error: str) -> None:
        """Notes an error that a person has to mend, so that no restart can help."""
        self._error = self._error or error

    async def error(self) -> str:
        """The first such error; empty where there is none."""
        return self._error

    async def request_stop(self) -> None:
        """Asks the workers to stop."""
        self._stop.set()

    async def stop_requested(self) -> bool:
        """Waits until somebody asks the workers to stop."""
        return await self._stop.wait()


class Listener:
    """Prints the workers' lines in the driver until it is closed.

    Args:
        channel: a `Channel`.
        show: takes each line.
    """

    def __init__(self, channel: Any, show: Callable[[str], None]) -> None:
        self._channel = channel
        self._show = show
        self._thread = threading.Thread(target=self._listen, name="channel", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while (line := ray.get(self._channel.next_line.remote())) is not None:
            self._show(line)

    def close(self) -> None:
        """Prints what is still queued, and ends."""
        ray.get(self._channel.say.remote(None))
        self._thread.join(timeout=10)


class StopWatch:
    """Tells a worker, without asking over the network at each step, whether it should stop."""

    def __init__(self, channel: Any) -> None:
        self._stop = threading.Event()
        threading.Thread(target=self._wait, args=(channel,), name="stop-watch", daemon=True).start()

    def _wait(self, channel: Any) -> None:
        try:
            if ray.get(channel.stop_requested.remote()):
                self._stop.set()
        except ray.exceptions.RayError:
            pass  # the driver has ended, and Ray ends this worker

    def requested(self) -> bool:
        """Whether the driver has asked to stop."""
        return self._stop.is_set()
