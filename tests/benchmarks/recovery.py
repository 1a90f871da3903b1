"""How long does a failure cost? `python -m tests.benchmarks.recovery [--rounds N]`.

Seconds from kill -9 of one of two workers, and of the raylet of one of two nodes (then on with one worker), to the next
step that is completed, as the job's own lines say. Real Ray nodes on this machine, which notice a lost one after three
checks of a second (Ray's own default is five of three seconds); a tiny network, so that it is Ray, the start of Python
and the loading of the checkpoint that is measured. Medians. Ends with one JSON line.
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
    """Reads what the job says up to the next line that begins with the text."""
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith(text):
            return
    raise AssertionError(f"the job has ended before it said {text!r}")


def seconds_to_recover(runs: Runs, name: str, kill: Callable[[], None], *flags: str) -> float:
    """From the kill of what a running job needs to its next step."""
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
