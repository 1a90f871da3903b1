"""A rank that hangs leaves the stacks of all its threads, and the run's folder has those of all ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.dataset import make_data_set
from tests.train.test_loop import SETTINGS, Notes
from tests.train.test_step import CPU, changed
from vmoco.cluster.local import LocalCluster
from vmoco.train.run import Run, prepare
from vmoco.train.stacks import StackDump, Watched, read_stacks, stacks_document

HANGS = """
import ctypes, pathlib, sys, threading, time
from vmoco.train.stacks import StackDump
dump = StackDump(pathlib.Path(sys.argv[1]))
print(dump.path, flush=True)
lock = threading.Lock()
lock.acquire()
def waits_for_the_lock():
    lock.acquire()
threading.Thread(target=waits_for_the_lock, daemon=True).start()
def holds_the_interpreter():
    ctypes.PyDLL(None).sleep(3)  # a call that does not release the interpreter: no thread of Python runs meanwhile
dump.expect(0.4)
holds_the_interpreter()
print(len(dump.path.read_text()), flush=True)
dump.expect(100)
print(len(dump.path.read_text()), flush=True)
dump.close()
"""


def test_a_process_whose_interpreter_is_held_writes_its_stacks(tmp_path: Path) -> None:
    """After 0.75 of the limit, with the functions of all threads. The next step empties the file."""
    process = subprocess.Popen([sys.executable, "-c", HANGS, tmp_path], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    end = time.monotonic() + 2.5  # the interpreter is held for longer
    while not (path.exists() and "holds_the_interpreter" in path.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    text = path.read_text()
    assert text.startswith("Timeout (0:00:00.3")
    assert "in holds_the_interpreter" in text
    assert "in waits_for_the_lock" in text
    rest, _ = process.communicate(timeout=20)
    assert [int(size) > 0 for size in rest.split()] == [True, False]
    assert list(tmp_path.iterdir()) == []


def test_a_document_has_all_ranks(tmp_path: Path) -> None:
    """Those that hang, those that do not, and those whose machine is lost; what was read is taken away."""
    dump = StackDump(tmp_path)
    dump.path.write_text("Thread 1\n")
    dump.close()  # the rank has given up, and its process ends
    assert read_stacks(str(dump.path)) == "Thread 1\n"
    assert read_stacks(str(dump.path)) == ""
    watched = {rank: Watched("node", f"host-{rank}", "path", 90.0) for rank in range(3)}
    text = stacks_document(watched, {0: "Thread 1\n", 1: "", 2: None})
    assert "==== rank 0 on host-0 ====\nThread 1\n" in text
    assert "==== rank 1 on host-1 ====\nno stacks: its step ended in time, or it was stopped itself" in text
    assert "==== rank 2 on host-2 ====\nno stacks: its machine does not answer" in text


def hang_once(config: dict[str, Any]) -> None:
    """A worker whose second rank never begins its third step, in the first group of workers."""
    import socket
    import threading

    import ray
    import ray.train

    from vmoco.data.manifest import Manifest
    from vmoco.train import distributed
    from vmoco.train.loop import Requests, train
    from vmoco.train.state import TrainState

    rank = ray.train.get_context().get_world_rank()
    started = Path(config["folder"], f"started-{rank}")
    is_first = not started.exists()
    started.parent.mkdir(parents=True, exist_ok=True)
    started.touch()
    if is_first:
        distributed.STEP_SECONDS = 10.0
    dump = StackDump()
    node_id = ray.get_runtime_context().get_node_id()
    ray.get(config["channel"].watch.remote(rank, Watched(node_id, socket.gethostname(), str(dump.path), 7.5)))

    class Host(Notes):
        def expect_step(self, within_seconds: float) -> None:
            dump.expect(within_seconds)

        def requests(self) -> Requests:
            if rank == 1 and is_first and self._asked == 2:
                self.hangs_here()
            return super().requests()

        def hangs_here(self) -> None:
            threading.Event().wait()

    settings, manifest = changed(SETTINGS, train={"steps": 4}), Manifest.load(config["data"])
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    try:
        train(settings, manifest, state, device=CPU, host=Host())
    finally:
        dump.close()  # as a worker does, also one that has given up


@pytest.mark.slow  # it waits for a time limit, and for workers
@pytest.mark.cluster
def test_stacks_of_all_ranks_are_kept_before_the_restart(
    ray_cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning names the file; rank 1 is where it hangs, and rank 0 waits for it. Then the run goes on to its end."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    from vmoco.train.channel import Channel, Listener
    from vmoco.train.launch import run_config

    make_data_set(tmp_path / "data")
    settings = changed(
        SETTINGS,
        run={"name": "hangs", "storage": str(tmp_path / "runs")},
        data={"uri": str(tmp_path / "data")},
    )
    run = Run(**vars(prepare(settings)), run_id="none", is_new=True)
    channel = Channel.remote()  # type: ignore[attr-defined]
    lines: list[str] = []
    listener = Listener(channel, lines.append)
    trainer = TorchTrainer(
        hang_once,
        train_loop_config={"folder": run.folder, "data": str(tmp_path / "data"), "channel": channel},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=run_config(run, channel, []),
    )
    trainer.fit()
    listener.close()
    (file,) = Path(run.folder, "faults").glob("stacks-*.txt")
    (warning,) = [line for line in lines if line.startswith("warning: workers failed")]
    assert f"where each rank was is in {file}): restart 1 of at most" in warning
    first, second = file.read_text().split("==== rank 1 on ")
    assert "in hangs_here" in second
    assert "in hangs_here" not in first
    assert "in __call__" in first, "the step in which rank 0 waits"
