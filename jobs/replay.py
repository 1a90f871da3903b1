"""Redoes the step in which a run met a value that is not finite, and says where the first one appears.

The error message of the run names the file. On a machine that reaches the run's folder and the data set:

    python jobs/replay.py RUN_FOLDER/faults/step-00000123.json

The job loads the last checkpoint before the step and redoes the steps from there, each rank of the run as a process of
this machine. It needs no Ray, and changes nothing in the run's folder.
"""

import os
from typing import Annotated

import tyro

from vmoco import job


def replay(file: Annotated[str, tyro.conf.Positional], ranks: int | None = None, data: tuple[str, ...] = ()) -> None:
    """Redoes a step.

    Args:
        file: Replay file of a run: a path or a URI, as its error message names it.
        ranks: Number of processes. When left out, as many as the run had; on GPUs one, if this machine has fewer GPUs.
            Another number than that of the run gives other rounding. With 1 a debugger can be used.
        data: Folder or URI of the data set, if it is no longer where the run read it; of several, all in their order.
    """
    # Before torch is imported, here and in the processes: it would warn of a choice of ours in each of them.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from vmoco.train import replay as module

    outcome = module.replay(file, ranks=ranks, data_uri=data, show=job.show)
    if outcome.is_exact is not None:
        print(f"the state before the step {'has' if outcome.is_exact else 'does not have'} the bits of the run")
    if not outcome.findings and not outcome.error:
        raise ValueError(
            f"step {outcome.step} is finite here, so the cause is not in the state, the data and the settings: repeat "
            "it on the machines of the run with all its ranks, and check their memory and GPUs for errors"
        )
    print(f"step {outcome.step} is not finite here either: {outcome.error or 'the state after it is not finite'}")
    for place, finding in enumerate(outcome.findings[:6]):
        print(f"{'first' if place == 0 else ' then'}: {finding}")
    if (more := len(outcome.findings) - 6) > 0:
        print(f"       and {more} more that follow from these")
    if not outcome.findings:
        print("all values that were looked at are finite: the sum over ranks or clips is not")


if __name__ == "__main__":
    job.run_job(lambda: tyro.cli(replay, description=__doc__))
