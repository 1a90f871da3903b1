"""Several Ray nodes on this machine, in a process of their own, that a test adds and kills.

    with Nodes(cpus=[1, 1]) as nodes:           a head without CPUs, and two nodes of one
        nodes.kill(0)                           kill -9 of the first one's raylet: the node is lost
        nodes.add(1)

A process of its own, because Ray reads its token once, and because `ray.cluster_utils.Cluster` belongs to a process.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class Nodes:
    """A cluster; a context manager.

    Attributes:
        environment: what a job needs to run on it.
    """

    def __init__(self, *, cpus: Sequence[int]) -> None:
        self._cpus = list(cpus)
        self.environment: dict[str, str] = {}

    def __enter__(self) -> Nodes:
        self._folder = tempfile.mkdtemp(prefix="nodes-", dir="/tmp")  # paths of sockets are short
        token = Path(self._folder, "token")
        token.touch(mode=0o600)
        token.write_text(secrets.token_urlsafe(32))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        # Ray notes the address of the latest cluster of a machine: this one is nobody else's.
        environment["RAY_TMPDIR"] = self._folder
        Path(self._folder, "ray").mkdir()
        # A lost node is noticed within seconds, as is said to be wise for spot machines.
        environment |= {
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nodes"],
            env=environment,
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.environment = environment | {"RAY_ADDRESS": self._ask("head")["address"], "PYTHONUNBUFFERED": "1"}
        for number in self._cpus:
            self.add(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        finally:
            self._process.kill()
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, cpus: int) -> None:
        """Adds a node."""
        self._ask("add", cpus)

    def kill(self, place: int) -> None:
        """kill -9 of the raylet of a node, by its place in the order in which they came."""
        self._ask("kill", place)

    def drain(self, place: int, *, seconds: int) -> None:
        """Announces, as a cloud does, that a node will be taken away."""
        self._ask("drain", place, seconds)

    def _ask(self, *words: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                answer: dict[str, Any] = json.loads(line.removeprefix("answer "))
                return answer
        raise AssertionError(f"the process of the nodes ended at {words}")


def main() -> None:
    """Obeys one JSON list a line."""
    import signal

    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    cluster: Cluster | None = None
    nodes: list[Any] = []
    try:
        for line in sys.stdin:
            word, *rest = json.loads(line)
            answer: dict[str, Any] = {}
            if word == "head":
                cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
                answer = {"address": cluster.address}
            assert cluster is not None, "the head comes first"
            if word == "add":
                nodes.append(cluster.add_node(num_cpus=rest[0]))
            elif word == "kill":
                (raylet,) = nodes[rest[0]].all_processes[ray_constants.PROCESS_TYPE_RAYLET]
                os.kill(raylet.process.pid, signal.SIGKILL)
            elif word == "drain":
                ray = str(Path(sys.executable).with_name("ray"))
                command = [ray, "drain-node", "--address", cluster.address, "--node-id", nodes[rest[0]].node_id]
                command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the spot market"]
                subprocess.run(
                    [*command, "--deadline-remaining-seconds", str(rest[1])], check=True, stdout=subprocess.DEVNULL
                )
            print("answer", json.dumps(answer), flush=True)
    finally:
        if cluster is not None:
            cluster.shutdown()


if __name__ == "__main__":
    main()
