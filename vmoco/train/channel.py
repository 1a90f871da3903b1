"""What driver, workers and Ray's controller of a run tell each other: lines, errors, requests to stop, measurements.

The channel is a Ray actor, because it reaches every node at once and ends with the driver. Ray's own forwarding of
worker output puts a process name before each line and mixes in everything that any library prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.train

from vmoco import ray_internals
from vmoco.job import describe, is_user_error, root_cause
from vmoco.train.machines import Sample, Samples
from vmoco.train.run_folder import RunFolder


@ray.remote(num_cpus=0)
class Channel:
    """The actor. A call that waits is answered as soon as there is something to answer."""

    def __init__(self) -> None:
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        self._stop = asyncio.Event()
        self._error = ""
        self._starts = -1
        self._samples = Samples()

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

    async def measured(self, node: str, numbers: dict[str, float], by_worker: bool) -> None:
        """Keeps what a node measured for the first rank; see `machines.Samples`."""
        self._samples.add(Sample(node, int(time.time() * 1000), numbers), by_worker=by_worker)

    async def take_samples(self) -> list[Sample]:
        """What the nodes measured since the last call."""
        return self._samples.take()

    async def fail(self, error: str) -> None:
        """Keeps the message of an error that the user has to fix, so that no restart can help."""
        self._error = self._error or error

    async def error(self) -> str:
        """The first such message; empty where there is none."""
        return self._error

    async def request_stop(self) -> None:
        """Asks the workers to stop."""
        self._stop.set()

    async def stop_requested(self) -> bool:
        """Waits until the driver asks the workers to stop."""
        return await self._stop.wait()


class Listener:
    """Prints the workers' lines in the driver until it is closed.

    Args:
        channel: a `Channel`.
        show: prints a line.
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


@contextlib.contextmanager
def errors_reported(channel: Any) -> Iterator[None]:
    """In a worker: reports an error that the user has to fix; any other keeps its traceback, which Ray drops."""
    try:
        yield
    except Exception as error:
        cause, _ = root_cause(error)
        if is_user_error(cause):
            ray.get(channel.fail.remote(str(cause)))
        else:
            error.add_note(traceback.format_exc())
        raise


class RestartLimit(ray.train.UserCallback):
    """Ends a run that fails again and again without a new checkpoint. Ray Train calls it in its controller.

    Ray counts all failures of a run, and a run of weeks on spot machines has many. So Ray restarts without limit, and
    this counts anew after each new checkpoint. It counts before a worker starts, so a worker that cannot even import
    vmoco is counted too. Machines that are announced to be taken away do not count, as in Ray itself.

    Args:
        name: of the run.
        folder: URI of the run's folder.
        max_failures: restarts from one checkpoint.
        channel: a `Channel`.
    """

    def __init__(self, *, name: str, folder: str, max_failures: int, channel: Any) -> None:
        self._name = name
        self._folder = folder
        self._max_failures = max_failures
        self._channel = channel
        self._step: int | None = None
        self._failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Lets Ray restart the workers.

        Raises:
            ValueError: no restart can help, or there have been too many; Ray then ends the run with this error.
        """
        if message := ray.get(self._channel.error.remote()):
            raise ValueError(message)
        if ray_internals.is_preempted(worker_exceptions):
            return
        step = self._newest_step()
        self._failures = 1 if step != self._step else self._failures + 1
        self._step = step
        failure = ray.train.WorkerGroupError("", worker_exceptions)
        cause = textwrap.shorten(describe(failure).removeprefix("error: "), 500)
        since = "its start" if step is None else f"its checkpoint of step {step}"
        if self._failures <= self._max_failures:
            restart = f"restart {self._failures} of at most {self._max_failures} since {since}"
            self._channel.say.remote(f"warning: workers failed ({cause}): {restart}")
            return
        error, rank = root_cause(failure)
        for note in getattr(error, "__notes__", ()):  # the traceback
            ray.get(self._channel.say.remote(f"on rank {rank}: {note.rstrip()}"))
        times = "once" if self._failures == 1 else f"{self._failures} times"
        raise ValueError(
            f"run {self._name} has failed {times} since {since}: {cause}. --scaling.max-failures {self._max_failures} "
            f"allows no more without a new checkpoint: fix the cause and submit the same command with --run.name "
            f"{self._name} to resume, or raise --scaling.max-failures"
        )

    def _newest_step(self) -> int | None:
        try:
            found = RunFolder(self._folder).steps()
        except (OSError, ValueError):  # the storage does not answer: no progress that is known
            return self._step
        return found[-1] if found else None


class StopWatch:
    """Tells a worker whether it should stop, without a question over the network at each step."""

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
