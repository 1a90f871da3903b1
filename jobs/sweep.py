"""Tries several settings of a pretraining, each in its own run, and registers the encoder with the best score.

On a cluster, from the root of this repository:

    ray job submit --working-dir . -- python jobs/sweep.py demo --data.uri URI --space ratio-decay

On this machine alone:

    python jobs/sweep.py demo --data.uri URI --space space.yaml

A space is a built-in name, or a YAML file. Each line of the file is one of these:

- a list of values: `moco.decay: [0.99, 1.0]`
- a range, for --search random or optuna: `moco.momentum: {low: 0.9, high: 0.999}`
- named choices that set several fields: `decay: {none: {moco.decay: 1.0}, slow: {moco.decay: 0.9999}}`

To continue a sweep that was stopped, submit the same command again. Finished trials are not repeated, interrupted ones
continue from their checkpoints, and failed ones are tried again.
"""

import tyro

from vmoco import job
from vmoco.job_settings import SWEEPS


def main() -> None:
    settings = tyro.extras.overridable_config_cli(SWEEPS, description=__doc__)
    from vmoco.sweep.prepare import prepare

    prepared = prepare(settings)
    dashboard_url = job.connect(dashboard=True, worker_output=False)
    from vmoco import tracking
    from vmoco.sweep import sweep as sweeps  # not before: Ray reads how to authenticate when it is imported
    from vmoco.sweep.report import write_report
    from vmoco.train.lease import Lease

    if command := job.stop_command(dashboard_url):
        job.show(f"to stop this job: {command}; to continue it later, submit it again")
    # Two drivers would overwrite each other's record.
    with Lease(prepared.sweep.folder, on_lost=job.show, show=job.show):
        status = "FAILED"
        try:
            sweep = sweeps.run_sweep(prepared, show=job.show)
            registered = sweeps.register_best(prepared, show=job.show)
            job.show(f"report: {write_report(sweep, show=job.show)}, with its pictures beside it")
            best = sweep.best()
            status = "FINISHED" if best else "FAILED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            if prepared.sweep.parent_run and (problem := tracking.finish_run(prepared.sweep.parent_run, status)):
                job.show(f"warning: {problem}")
    if best is None:
        raise ValueError("no trial has finished with a score: the reasons are above and in the report")
    job.show(f"best trial {best.name} with {sweep.score} {best.scores[sweep.score]:.3f}, registered as {registered}")


if __name__ == "__main__":
    job.run_job(main)
