"""A Ray cluster of one machine with its job server, for the demo and the tests.

The head is `ray start` in its own session. Ctrl-C in the terminal does not reach it, so its owner can stop the job
first. Ray's own ports (GCS, raylet, object manager, metrics) listen on ALL interfaces, whatever node address they are
given; only the job server stays on 127.0.0.1. So every request needs a token, and each cluster has its own random one.

The command `ray job submit` submits and follows a job, as a user would. To read the state of a job and to stop it, this
file uses Ray's Jobs REST API, because it answers at once while the command takes seconds to start.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vmoco import ray_internals
from vmoco.own_folder import make_folder

STOP_JOB_SECONDS = 60
"""Time that a stopped job has to write its checkpoint. The head reads it from its environment."""

_LAST_STATES = ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer:
    """The job server of a Ray head, which asks for a token.

    Args:
        address: http://host:port.
        environment: for `ray job`; the file in RAY_AUTH_TOKEN_PATH holds the token.
    """

    def __init__(self, address: str, environment: Mapping[str, str]) -> None:
        self._address = address
        self._environment = environment

    def answers(self) -> bool:
        """Whether the server is up."""
        return self.ask("GET", "/api/version") is not None

    def submit(self, entrypoint: Sequence[str], working_dir: str | Path) -> int:
        """Runs a job by `ray job submit`, shows its output live, and returns its exit code.

        On Ctrl-C or SIGTERM it stops the job and raises the interrupt again. The job has a minute to write a
        checkpoint, and its output is still shown. The exit code of a job that somebody else stopped is 130.
        """
        job = f"vmoco-{uuid.uuid4().hex[:12]}"
        color = "true" if sys.stdout.isatty() else "false"
        command = [str(Path(sys.executable).parent / "ray"), "--logging-level=error", "job", "submit"]
        command += ["--log-style=pretty", f"--log-color={color}", f"--address={self._address}"]
        command += [f"--submission-id={job}", f"--working-dir={working_dir}", "--", *entrypoint]
        # Its own session: Ctrl-C must not end the output before the last lines of the job.
        client = subprocess.Popen(command, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = client.wait()
            details = self.ask("GET", f"/api/jobs/{job}") or {}
            return int(details.get("driver_exit_code") or (130 if details.get("status") == "STOPPED" else code))
        except (KeyboardInterrupt, SystemExit):  # `job.run_job` turns SIGTERM into a SystemExit
            self._stop(job, client)
            raise
        finally:
            client.kill()
            client.wait()

    def _stop(self, job: str, client: subprocess.Popen[bytes]) -> None:
        if self.ask("POST", f"/api/jobs/{job}/stop") is None:
            client.kill()  # interrupted during submission: now the job has arrived, or it never will
            client.wait()
            self.ask("POST", f"/api/jobs/{job}/stop")
        deadline = time.monotonic() + STOP_JOB_SECONDS + 10
        while time.monotonic() < deadline:
            details = self.ask("GET", f"/api/jobs/{job}")
            if details is None or details["status"] in _LAST_STATES:
                break
            time.sleep(0.2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            client.wait(timeout=10)  # it still prints the last lines of the job

    def ask(self, method: str, path: str) -> dict[str, Any] | None:
        """The server's answer; None if it does not answer or refuses."""
        headers = {"Authorization": "Bearer " + Path(self._environment["RAY_AUTH_TOKEN_PATH"]).read_text()}
        request = urllib.request.Request(self._address + path, method=method, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach the loopback
        try:
            with opener.open(request, timeout=10) as answer:
                found = json.load(answer)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else {"answer": found}


LOOPBACK = "127.0.0.1"
START_SECONDS = 120.0

# All of Ray's ports get a free number: the defaults of two clusters on one machine collide.
_PORT_FLAGS = (
    "--port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--metrics-export-port",
    "--node-manager-port",
    "--object-manager-port",
    "--runtime-env-agent-port",
    "--ray-client-server-port",
)

# This process becomes the head. The kernel ends it (PR_SET_PDEATHSIG = 1) when its owner dies, even by kill -9.
_HEAD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that starts the cluster has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


class LocalCluster:
    """A Ray head on this machine: a context manager that leaves no process and no file.

    Enter it in a thread that outlives it: the head ends with the thread that started it.

    Attributes:
        address: of the job server, for `ray job submit --address`.
        gcs_address: for `ray.init(address=...)`, with `environment` set.
        environment: variables by which a process reaches the cluster; pass it as `env` to subprocesses.
    """

    def __init__(
        self,
        *,
        num_cpus: int | None = None,
        object_store_memory: int = 512 * 2**20,
        dashboard_port: int | None = None,
    ) -> None:
        """Prepares a cluster; entering the context starts it.

        Args:
            num_cpus: CPUs that Ray may use; all of this machine when None.
            object_store_memory: bytes of shared memory.
            dashboard_port: port of the job server; a free one when None.

        Raises:
            ValueError: the port is taken, or not allowed.
        """
        self._num_cpus = num_cpus or len(os.sched_getaffinity(0))
        self._object_store_memory = object_store_memory
        if dashboard_port is not None:
            _check_port(dashboard_port)
        ports = _free_ports(len(_PORT_FLAGS) + 1)
        self._port = dashboard_port or ports.pop()
        self._ports = dict(zip(_PORT_FLAGS, ports, strict=False))
        self.address = f"http://{LOOPBACK}:{self._port}"
        self.gcs_address = f"{LOOPBACK}:{self._ports['--port']}"
        self.environment: dict[str, str] = {}
        self._folder: Path | None = None
        self._head: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the head, and returns when it is up and its job server answers.

        Raises:
            ValueError: the head died, or did not answer in time; the message ends with its last lines.
        """
        self._folder = make_folder()
        self.environment = self._make_environment(self._folder / "token")
        ports = [f"{flag}={port}" for flag, port in self._ports.items()]
        command = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--head",
            "--block",
            f"--node-ip-address={LOOPBACK}",
            *ports,
        ]
        command += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={self._port}", "--include-dashboard=true"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]  # 0: each worker takes any free port
        command += [f"--num-cpus={self._num_cpus}", f"--object-store-memory={self._object_store_memory}"]
        command += [f"--temp-dir={self._folder}"]
        with open(self._folder / "head.log", "wb") as log:
            self._head = subprocess.Popen(
                [sys.executable, "-c", _HEAD, str(os.getpid()), *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_up()

    def stop(self) -> None:
        """Ends every process of this cluster and no other process, and removes its folder. May be called twice."""
        if self._folder is None:
            return
        with _no_interrupt():
            if self._head is not None:
                self._head.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._head.wait(timeout=20)
            deadline = time.monotonic() + 20
            while left := self._processes():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"processes {left} of the local Ray cluster in {self._folder} do not end")
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
            if self._head is not None:
                self._head.wait()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = self._head = None

    def submit(self, entrypoint: Sequence[str], working_dir: str | Path) -> int:
        """Runs a job to its end, as `JobServer.submit` does."""
        return JobServer(self.address, self.environment).submit(entrypoint, working_dir)

    def _make_environment(self, token: Path) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = [
            str(Path(sys.executable).parent),
            environment.get("PATH", os.defpath),
        ]  # so that `python` in a job is this one
        return environment | {
            "PATH": os.pathsep.join(path),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": self.address,  # `ray job` reads it, and a job prints it in its stop command
            "RAY_USAGE_STATS_ENABLED": "0",
            ray_internals.JOB_STOP_SECONDS: str(STOP_JOB_SECONDS),  # Ray's 3 s are too short to checkpoint
            ray_internals.HEALTH_CHECK_SECONDS: "0.2",  # with Ray's 2 s each report of a checkpoint takes 2 s
            ray_internals.DRAIN_SECONDS: "0",  # jobs are stopped before the cluster, so there is nothing to wait for
        }

    def _wait_until_up(self) -> None:
        assert self._head is not None
        assert self._folder is not None
        server = JobServer(self.address, self.environment)
        deadline = time.monotonic() + START_SECONDS
        # The job server answers first. The last thing that Ray writes is the address of the cluster, in this file.
        while not (self._folder / ray_internals.HEAD_IS_UP).exists() or not server.answers():
            if self._head.poll() is not None or time.monotonic() > deadline:
                lines = (self._folder / "head.log").read_text(errors="replace").strip().splitlines()[-15:]
                ended = self._head.returncode
                reason = (
                    f"gave no answer in {START_SECONDS:.0f} s" if ended is None else f"ended with exit code {ended}"
                )
                raise ValueError(f"the local Ray cluster {reason}; its last lines:\n" + "\n".join(lines))
            time.sleep(0.1)

    def _processes(self) -> list[int]:
        """Every live process of this cluster: in the head's session, or with our folder in its environment.

        Ray's daemons and workers stay in the head's session; a job's driver has its own session, but inherits the
        environment.
        """
        mark = os.fsencode(f"RAY_AUTH_TOKEN_PATH={self._folder}/token")
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()):
            with contextlib.suppress(OSError):  # it has ended, or is not ours
                status = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
                of_session = self._head is not None and int(status[3]) == self._head.pid
                ours = of_session or mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if ours and status[0] != b"Z":
                    found.append(pid)
        return found


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ignores Ctrl-C during a stop: a second one must not interrupt it. The stop ends soon in any case."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _check_port(port: int) -> None:
    if not 1024 <= port <= 65535:
        raise ValueError(f"--dashboard-port {port} is not allowed: choose one from 1024 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was in use a moment ago is free
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise ValueError(
                f"--dashboard-port {port} is taken on {LOOPBACK} ({error.strerror}): choose another one, or leave the "
                "flag out to use any free port"
            ) from None


def _free_ports(number: int) -> list[int]:
    """Different free ports below the range from which the kernel serves outgoing connections (32768 on Linux)."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < number:
            port = 20000 + secrets.randbelow(12000)
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                found.append(port)
    return found
