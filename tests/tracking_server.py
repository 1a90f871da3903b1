"""An MLflow server of a test's own, which it starts and stops as it likes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType


class TrackingServer:
    """A server on a free port, with its database and artifacts in a folder; a context manager.

    Args:
        folder: of both.
        flags: of `mlflow server`, in place of the one that has it serve artifacts.

    Attributes:
        address: of the server, whether it runs or not.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self._command = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1"]
        self._command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
        self._command += ["--workers", "1", *(flags or ("--artifacts-destination", str(folder / "artifacts")))]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TrackingServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts it and returns when it answers."""
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = subprocess.Popen(
            self._command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < end, "the server never answered"
                time.sleep(0.2)

    def stop(self) -> None:
        """Ends it, if it runs."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    self._process.pid, signal.SIGKILL
                )  # uvicorn outlives the command that starts it, in MLflow 3.9
            self._process = None
