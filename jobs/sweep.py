"""Tries settings of a pretraining, each in a run of its own, and registers the encoder that scores best without labels.

On a cluster, from the root of this repository:

    ray job submit --working-dir . -- python jobs/sweep.py demo --data.uri URI --space ratio-decay

On this machine alone:

    python jobs/sweep.py demo --data.uri URI --space space.yaml

A space is a built-in name, or a YAML file with a line per field: `moco.decay: [0.99, 1.0]`, `moco.momentum: {low: 0.9,
high: 0.999}` (with --search random), or named choices of several fields: `decay: {none: {moco.decay: 1.0}}`. The same
command goes on with a sweep that was stopped: trials that have ended are not repeated, others go on from their
checkpoints, and those that failed are tried again.
"""

import functools
import tempfile
from pathlib import Path

import tyro

from vmoco import job
from vmoco.sweep.sweep_settings import SWEEPS

show = functools.partial(print, flush=True)


def main() -> None:
    settings = tyro.extras.overridable_config_cli(SWEEPS, description=__doc__)
    dashboard_url = job.connect(dashboard=True, worker_output=False)
    from vmoco import storage, tracking  # not before: Ray reads how to authenticate when it is imported
    from vmoco.sweep import sweep as sweeps
    from vmoco.sweep.report import PAGE, write_report

    prepared = sweeps.prepare(settings)
    if command := job.stop_command(dashboard_url):
        show(f"to stop this job: {command}; the same command goes on")
    status = "KILLED"
    try:
        sweep = sweeps.run_sweep(prepared, show=show)
        registered = sweeps.register_best(prepared)
        with tempfile.TemporaryDirectory() as folder:
            page = write_report(sweep, Path(folder)).read_text()
        place = storage.join(sweep.folder, PAGE)
        storage.write_atomic(place, page.encode())
        tracking.note_run(sweep.parent_run, tags={"vmoco.best": registered}, texts={PAGE: page})
        status = "FINISHED" if sweep.best() else "FAILED"
    finally:
        if prepared.sweep.parent_run and (problem := tracking.finish_run(prepared.sweep.parent_run, status)):
            show(f"warning: {problem}")
    show(f"report {place}")
    best = sweep.best()
    if best is None:
        raise ValueError(f"no trial has finished with a score; the reasons are above and in {place}")
    show(f"best trial {best.name} with {sweep.score} {best.scores[sweep.score]:.3f}, registered as {registered}")


if __name__ == "__main__":
    job.run_job(main)
