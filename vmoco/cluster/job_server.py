"""The job server of a Ray head: submits a job and follows it to its end, or to its stop.

Submitting and following is what `ray job submit` does, so that a person reads here what they would type; asking and
stopping is Ray's Jobs REST API, which answers at once where the command takes seconds to start.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STOP_JOB_SECONDS = 60
"""How long a stopped job has to write its checkpoint; the head must know it, as RAY_JOB_STOP_WAIT_TIME_S."""

_LAST_STATES = ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer:
    """A job server that asks for a token.

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
        """Runs a job by `ray job submit`, its output passed through live, and returns its exit code.

        On Ctrl-C or SIGTERM the job is stopped, has a minute to checkpoint while its output still passes through,
        and the interrupt is raised again. A job that somebody else stopped returns 130.
        """
        job = f"vmoco-{uuid.uuid4().hex[:12]}"
        color = "true" if sys.stdout.isatty() else "false"
        command = [str(Path(sys.executable).parent / "ray"), "--logging-level=error", "job", "submit"]
        command += ["--log-style=pretty", f"--log-color={color}", f"--address={self._address}"]
        command += [f"--submission-id={job}", f"--working-dir={working_dir}", "--", *entrypoint]
        # A session of its own: Ctrl-C must not cut the output off before the job has said how it ended.
        client = subprocess.Popen(command, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = client.wait()
            details = self.ask("GET", f"/api/jobs/{job}") or {}
            return int(details.get("driver_exit_code") or (130 if details.get("status") == "STOPPED" else code))
        except (KeyboardInterrupt, SystemExit):  # the second one is what `job.run_job` makes of SIGTERM
            self._stop(job, client)
            raise
        finally:
            client.kill()
            client.wait()

    def _stop(self, job: str, client: subprocess.Popen[bytes]) -> None:
        if self.ask("POST", f"/api/jobs/{job}/stop") is None:
            client.kill()  # interrupted while submitting: now it either has arrived or never will
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
        """The server's answer, or None where it has none."""
        headers = {"Authorization": "Bearer " + Path(self._environment["RAY_AUTH_TOKEN_PATH"]).read_text()}
        request = urllib.request.Request(self._address + path, method=method, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine's loopback
        try:
            with opener.open(request, timeout=10) as answer:
                found = json.load(answer)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else {"answer": found}
