"""Pretrains a video encoder on a data set, tracks the run in MLflow, and registers the encoder.

On a cluster, from the root of this repository:

    ray job submit --working-dir . -- python jobs/pretrain.py demo --data.uri URI

On this machine alone, with a Ray cluster that starts and ends with the job:

    python jobs/pretrain.py demo --data.uri URI

URI is a data set made by jobs/ingest.py. The first argument is a preset. Flags change its settings, for example
--moco.queue-size 16384. `python jobs/pretrain.py demo --help` lists all flags. --train.epochs 50 sets the length. The
run takes all GPUs of the cluster, or its CPUs if there are none (--scaling.device auto), and first prints its choice.

Each batch can mix several data sets, by weight: --data.uri URI1 URI2 --data.weights 0.7 0.3.

Ctrl-C or `ray job stop` saves a checkpoint and ends the job. To resume a run, submit it again with its --run.name.
"""

import signal

import tyro

from vmoco import job
from vmoco.presets import PRESETS


def main() -> None:
    settings = tyro.extras.overridable_config_cli(PRESETS, description=__doc__)
    from vmoco.train import run

    prepared = run.prepare(settings)
    if prepared.finished:
        print(f"run {prepared.settings.run.name} has finished already; its encoder is {prepared.finished}")
        return
    dashboard_url = job.connect(worker_output=False)
    if command := job.stop_command(dashboard_url):
        print(f"to stop this job (it writes a checkpoint first): {command}", flush=True)
    from vmoco.train import launch  # not before: Ray reads how to authenticate when it is imported

    outcome = launch.pretrain(prepared, show=job.show)
    if outcome.stopped_by:
        print(f"kept {outcome.checkpoint}; the same command with --run.name {outcome.name} continues", flush=True)
        raise SystemExit(128 + signal.Signals[outcome.stopped_by])
    print(f"last checkpoint {outcome.checkpoint}", flush=True)
    if outcome.registered:
        print(f"registered version {outcome.registered.version} as {outcome.registered.uri}", flush=True)


if __name__ == "__main__":
    job.run_job(main)
