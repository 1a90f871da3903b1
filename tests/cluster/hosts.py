"""Several hosts on one machine: network namespaces on one bridge, each with its own address and its own processes."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType


class Host:
    """One host. Processes that are started on it end with it.

    Attributes:
        name: of the host.
        address: IP address.
        folder: of its own, for logs and secrets.
    """

    def __init__(self, name: str, namespace: str, address: str, folder: Path) -> None:
        self.name = name
        self.address = address
        self.folder = folder
        self._namespace = namespace
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, script: str, *, log: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts a bash script in the background; its output goes to folder/log."""
        with open(self.folder / log, "ab") as output:
            process = subprocess.Popen(
                [*self._enter(), "bash", "-euc", script],
                cwd=self.folder,
                env=_clean(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(self, script: str, *, environment: Mapping[str, str] | None = None, timeout: float = 120) -> str:
        """Runs a bash script to its end and returns its output, of both streams.

        Raises:
            AssertionError: it failed.
        """
        code, said = self.attempt(script, environment=environment, timeout=timeout)
        assert code == 0, said
        return said

    def attempt(
        self, script: str, *, environment: Mapping[str, str] | None = None, timeout: float = 120
    ) -> tuple[int, str]:
        """Exit code and output of a bash script, also if it fails."""
        done = subprocess.run(
            [*self._enter(), "bash", "-euc", script],
            cwd=self.folder,
            env=_clean(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def listening(self) -> set[int]:
        """TCP ports that processes of this host offer to others."""
        lines = self.run("ss --tcp --listening --numeric --no-header").splitlines()
        ends = [line.split()[3] for line in lines]
        return {int(end.rpartition(":")[2]) for end in ends if "127.0.0" not in end and "[::1]" not in end}

    def said(self, log: str) -> str:
        """The last lines of a log."""
        return "\n".join((self.folder / log).read_text(errors="replace").splitlines()[-30:])

    def stop(self) -> None:
        """Ends every process of this host."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 5
            while pids := subprocess.run(
                ["ip", "netns", "pids", self._namespace], capture_output=True, text=True, check=True
            ).stdout.split():
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), number)
                if time.monotonic() > deadline:
                    break
                time.sleep(0.2)
        for process in self._started:
            process.wait()

    def _enter(self) -> list[str]:
        return ["ip", "netns", "exec", self._namespace]


class Network:
    """A bridge with hosts; a context manager that removes all of it at the end.

    Args:
        folder: hosts get folders of their own below it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tag = secrets.token_hex(3)
        self._bridge = f"vm{self._tag}"
        self._prefix = f"10.{100 + secrets.randbelow(100)}.{secrets.randbelow(255)}"
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Network:
        _ip(f"link add {self._bridge} type bridge")
        _ip(f"link set {self._bridge} up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        def stop(host: Host) -> None:
            with contextlib.suppress(subprocess.SubprocessError):
                host.stop()

        with ThreadPoolExecutor() as threads:  # at once: Ray takes seconds to end
            list(threads.map(stop, self.hosts.values()))
        for name in self.hosts:
            _ip(f"netns del {self._tag}-{name}", check=False)
        _ip(f"link del {self._bridge}", check=False)

    def add(self, name: str) -> Host:
        """A new host."""
        number = len(self.hosts) + 2
        namespace, cable = f"{self._tag}-{name}", f"v{self._tag}{number}"
        address = f"{self._prefix}.{number}"
        _ip(f"netns add {namespace}")
        _ip(f"link add {cable} type veth peer name eth0 netns {namespace}")
        _ip(f"link set {cable} master {self._bridge} up")
        for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _ip(f"-n {namespace} {command}")
        folder = self._folder / name
        folder.mkdir()
        host = self.hosts[name] = Host(name, namespace, address, folder)
        return host

    def cut(self, host: Host) -> None:
        """Disconnects a host: its processes continue, but reach no other host."""
        _ip(f"-n {self._tag}-{host.name} link set eth0 down")

    def mend(self, host: Host) -> None:
        """Connects a host again."""
        _ip(f"-n {self._tag}-{host.name} link set eth0 up")

    def host_of(self, pid: int) -> Host:
        """The host that a process runs on."""
        found = subprocess.run(["ip", "netns", "identify", str(pid)], capture_output=True, text=True, check=True)
        return self.hosts[found.stdout.strip().removeprefix(f"{self._tag}-")]


def wait_until(true: Callable[[], bool], *, what: str, seconds: float, blame: Callable[[], str] = str) -> None:
    """Waits until something is true.

    Raises:
        AssertionError: it is not in time; with what `blame` says.
    """
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not in {seconds:.0f} s\n{blame()}"
        time.sleep(0.3)


def _clean(more: Mapping[str, str] | None) -> dict[str, str]:
    """This process's environment without variables that name other clusters, stores and trackers."""
    foreign = ("RAY_", "MLFLOW_", "AWS_", "PG", "VMOCO_", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | dict(more or {})


def _ip(arguments: str, *, check: bool = True) -> None:
    words: Sequence[str] = ["ip", *arguments.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
