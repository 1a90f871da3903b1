"""How a job begins and ends: the connection to Ray, requests to stop, and the last line that says what went wrong.

A job is submitted to a cluster, runs on the cluster of RAY_ADDRESS, or runs alone; alone it starts a Ray of its own,
which ends with it. Whatever happens, the last line of its output says how it ended, below any traceback.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

from vmoco import ray_internals
from vmoco.job_settings import plain_errors
from vmoco.own_folder import make_folder

_OBJECT_STORE_MEMORY = 512 * 2**20
_received: list[int] = []
"""Signals that this process has received and that end it."""


def show(line: str) -> None:
    """Prints a line at once. It can be pickled; `print` cannot, because Ray replaces it by a function of its own."""
    print(line, flush=True)


def run_job(main: Callable[[], None]) -> NoReturn:
    """Calls `main` and ends the process: exit code 0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM."""
    _exit_on_signals()
    try:
        with plain_errors():
            main()
        line, code = "", 0
    except KeyboardInterrupt:
        line, code = "stopped", 130
    except SystemExit as ended:
        # Where a handler raises it while Ray waits, Ray replaces it by another one with the code 1.
        wanted = 128 + _received[0] if _received else ended.code
        if wanted not in (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP):
            raise
        line, code = "stopped", int(wanted)
    except Exception as error:
        line, code = describe(error), 1
        if not is_user_error(root_cause(error)[0]):
            traceback.print_exc()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on there is nothing to interrupt
    _disconnect()  # before the last line, because it still prints what workers have printed
    sys.stdout.flush()
    if line:
        print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def describe(error: BaseException) -> str:
    """The error message as one line: `error: MESSAGE`, with the rank, and with the type of an unexpected error."""
    cause, rank = root_cause(error)
    text = _one_line(cause)
    if not is_user_error(cause):
        text = f"{type(cause).__name__}: {text}" if text else type(cause).__name__
    return f"error: {text}" if rank is None else f"error: {text} (on rank {rank})"


def is_user_error(error: BaseException) -> bool:
    """Whether the message alone tells the user what to do: a ValueError of vmoco, or a setting that pydantic refused.

    A subclass that another library raised (a decoding error, an Arrow error) does not: its traceback is needed.
    """
    home = type(error).__module__.split(".")[0]
    return isinstance(error, ValueError) and (type(error) is ValueError or home in ("vmoco", "pydantic_core"))


def root_cause(error: BaseException) -> tuple[BaseException, int | None]:
    """The error that caused this one, without what Ray wrapped around it, and the rank where it happened, if any."""
    rank: int | None = None
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        failures, inner = ray_internals.wrapped_errors(error)
        if failures:
            # When one rank raises, the others lose their connection to it: prefer the error that is meant for users.
            ranked = {at: not is_user_error(root_cause(each)[0]) for at, each in failures.items()}
            rank = min(failures, key=lambda at: (ranked[at], at))
            error = failures[rank]
        elif inner is not None:
            error = inner
    return error, rank


def _one_line(error: BaseException) -> str:
    if type(error).__module__.startswith("pydantic_core") and hasattr(error, "errors"):
        problems = ((".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors())
        return "; ".join(f"{field}: {message}" if field else message for field, message in problems)
    text = str(error).strip()
    if '  File "' in text:  # Ray puts a remote traceback into the message, and its last line names the cause
        text = text.splitlines()[-1]
    return " ".join(text.split())


def in_submitted_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return ray_internals.submission_id() is not None


def stop_command(dashboard_url: str | None = None) -> str | None:
    """The command that stops this submitted job so that it can checkpoint; None where it is no submitted job.

    A job cannot know the address that it was submitted to. It uses RAY_API_SERVER_ADDRESS of the head's environment, or
    `dashboard_url` (what `connect` returns) where that is the loopback: then the user is on that machine too.
    """
    submission_id = ray_internals.submission_id()
    if submission_id is None:
        return None
    address = os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address and dashboard_url and dashboard_url.startswith(("127.", "localhost")):
        address = f"http://{dashboard_url}"
    return f"ray job stop {submission_id} --address {address or '<the one you submitted to>'}"


def connect(*, dashboard: bool = False, worker_output: bool = True) -> str | None:
    """Connects to the cluster of RAY_ADDRESS (a submitted job has one), or starts a Ray that ends with this process.

    Args:
        dashboard: whether a Ray of its own serves the State API; without it Ray Tune leaks workers of stopped trials.
        worker_output: whether the output of workers is printed here, each line after the name of its process.

    Returns:
        host:port of the dashboard, where there is one.

    Raises:
        ValueError: the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(ray_internals.HEALTH_CHECK_SECONDS, "0.2")  # Ray's 2 s block each report for as long
    address = os.environ.get("RAY_ADDRESS")
    folder = "" if address else _own_folder()  # before Ray is imported: it reads how to authenticate then
    import ray

    if address:
        try:
            context = ray.init(address=address, logging_level=logging.WARNING, log_to_driver=worker_output)
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            raise ValueError(
                f"cannot connect to the Ray cluster at RAY_ADDRESS {address}: {_one_line(error)}. "
                "Check the address and RAY_AUTH_TOKEN_PATH, or unset RAY_ADDRESS to run on this machine"
            ) from error
    else:
        context = ray_internals.start_local(
            folder,
            include_dashboard=dashboard,
            object_store_memory=_OBJECT_STORE_MEMORY,
            logging_level=logging.WARNING,
            log_to_driver=worker_output,
        )
    _exit_on_signals()  # again, because Ray's own handler prints a stack of C++ frames
    found: str | None = context.dashboard_url
    return found or None


def _exit_on_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may set a handler
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup has it ignored
            signal.signal(signum, _exit_on)


def _exit_on(signum: int, frame: FrameType | None) -> NoReturn:
    _received.append(signum)
    sys.exit(128 + signum)


def _own_folder() -> str:
    """A folder for Ray's sockets, logs and token, which is removed when this process ends."""
    folder = str(make_folder())
    # Ray's ports listen on all interfaces, so a token guards them, as in `local.py`.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=os.path.join(folder, "token"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # runs after Ray's own, which was registered later
    return folder


def _disconnect() -> None:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


class StopRequest:
    """Turns SIGTERM and SIGINT into a request to stop that a long job obeys after its current step.

    Enter it in the main thread, after `connect`, which sets a handler of its own. `on_stop` runs once, in a normal
    thread: a signal handler interrupts the main thread anywhere, also while it holds a lock that the callback needs. A
    second Ctrl-C raises KeyboardInterrupt. A second SIGTERM changes nothing: its sender kills the job in the end.
    """

    def __init__(self, on_stop: Callable[[], None]) -> None:
        self.signal_name: str | None = None
        self._on_stop = on_stop
        # SimpleQueue.put may be called from a signal handler; Event.set may deadlock there.
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the job has been asked to stop."""
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        threading.Thread(target=self._wait, name="stop-request", daemon=True).start()
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._wake.put(False)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(signum).name
            self._wake.put(True)
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt

    def _wait(self) -> None:
        if self._wake.get():
            self._on_stop()
