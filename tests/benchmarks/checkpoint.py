"""Does a checkpoint delay training? `python -m tests.benchmarks.checkpoint [--backbone r3d_18]`.

One process with two threads runs real steps with the default queue of 65,536 keys. After every few steps it writes a
checkpoint as the loop does: fingerprints of the ranks, a copy, and the hand-over to the writer thread. The stall is the
time of this in the training thread, plus the extra time of the steps during which the writer works (they share the
processor), divided by the time of a step without a checkpoint. Figures are medians. Resuming is the time to find, check
and load the newest checkpoint into a new state. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks.step import state_and_step
from tests.train.test_checkpoint_writer import Tracker
from vmoco.spool import Spool
from vmoco.train.checkpoint_writer import CheckpointWriter
from vmoco.train.loop import check_state
from vmoco.train.run_folder import RunFolder
from vmoco.train.state import STATE_TENSORS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="r3d_18")
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="number of steps between two checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    state, step = state_and_step(arguments.backbone)
    plain, stalls, extra = [], [], []
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(place)
        folder.claim(lease="benchmark")
        writer = CheckpointWriter(
            folder, state.settings.train, run_id=None, spool=Spool(Tracker(), name="none"), evaluator=None, show=print
        )
        step()
        for _ in range(arguments.checkpoints):
            for _ in range(arguments.steps):
                started = time.perf_counter()
                step()
                plain.append(time.perf_counter() - started)
            started = time.perf_counter()
            check_state(state)
            writer.keep(state)
            stalls.append(time.perf_counter() - started)
            beside = 0.0
            while writer.is_writing():
                started = time.perf_counter()
                step()
                beside += time.perf_counter() - started - statistics.median(plain)
            extra.append(beside)
        fresh, _ = state_and_step(arguments.backbone)
        started = time.perf_counter()
        writer.close()
        found = folder.resume(fresh)
        resumed = time.perf_counter() - started
        assert found is not None
        size = Path(folder.checkpoint_uri(found.record.step), STATE_TENSORS).stat().st_size
    of_a_step = statistics.median(plain)
    result = {
        "stall_steps": round(statistics.median(stalls) / of_a_step, 3),
        "resume_s": round(resumed, 2),
        "beside_steps": round(statistics.median(extra) / of_a_step, 3),
        "stall_s": round(statistics.median(stalls), 3),
        "step_s": round(of_a_step, 3),
        "size_mib": round(size / 2**20),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
