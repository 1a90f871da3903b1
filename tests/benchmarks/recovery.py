"""How much time does a failure cost? `python -m tests.benchmarks.recovery [--rounds N]`.

Measures the seconds from a kill -9 to the next completed step, by the job's own output. It kills one of two workers,
and the raylet of one of two nodes (the run then continues with one worker). The Ray nodes are real nodes on this
machine; they notice a lost node after three checks of one second (Ray's default is five of three seconds). The network
is tiny, so the time is that of Ray, of Python's start and of loading the checkpoint. Figures are medians. Ends with one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.nodes import Nodes
from tests.train.test_recovery import Runs


def next_line(job: subprocess.Popen[str], text: str) -> None:
    """Reads the job's output up to the next line that begins with the text."""
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith(text):
            return
    raise AssertionError(f"the job ended before it printed {text!r}")


def seconds_to_recover(runs: Runs, name: str, kill: Callable[[], None], *flags: str) -> float:
    """Seconds from the kill of a process that a running job needs to the job's next step."""
    job = runs.start(name, "--train.steps", "100000", "--train.log-every", "1", *flags)
    try:
        next_line(job, "checkpoint of step 10 ")
        next_line(job, "step ")
        kill()
        started = time.perf_counter()
        next_line(job, "1 workers on" if flags else "2 workers on")
        next_line(job, "step ")
        return time.perf_counter() - started
    finally:
        job.kill()
        job.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    worker, node = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as home, Nodes(cpus=[1, 1]) as nodes:
            runs = Runs(Path(home), nodes)

            def kill_worker(runs: Runs = runs) -> None:
                os.kill(runs.workers()[0], signal.SIGKILL)

            def kill_node(nodes: Nodes = nodes) -> None:
                nodes.kill(0)

            worker.append(seconds_to_recover(runs, "worker", kill_worker))
            node.append(seconds_to_recover(runs, "node", kill_node, "--scaling.min-workers", "1"))
            print(f"worker {worker[-1]:.1f} s, node {node[-1]:.1f} s", flush=True)
    print(json.dumps({"worker_s": round(statistics.median(worker), 1), "node_s": round(statistics.median(node), 1)}))


if __name__ == "__main__":
    main()
