"""What does a sweep cost, and how well does it choose? `python -m tests.benchmarks.sweep`.

Needs `.venv/bin/pip install -e '.[benchmarks]'`. Trials differ in drop ratio, decay, learning rate and temperature, as
`jobs/sweep.py --search random` draws them. Two run at a time, with one worker each. They train on clips of Freedoom's
maps 1 to 16 (`tests/benchmarks/doom.py`) and are scored without labels on clips of maps 17 to 24. The reference is the
linear probe of the ablation: fitted on labels of maps 1 to 22, tested on maps 25 to 32, which no trial or score has
seen.

- overhead_share: share of a trial's time, from start to end, outside its steps (median over trials); overhead_s: the
  same in seconds.
- rank_correlation: Spearman's correlation between score and probe over all trials.
- asha_saving: share of the full sweep's steps that the same sweep with ASHA did not train; same_best: whether it chose
  the same trial.

Results are kept in the folder, and a second start continues from them. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from scipy.stats import spearmanr

from tests.benchmarks import ablation
from tests.dataset import write_data_set
from tests.train.test_step import changed
from vmoco import job, storage, tracking
from vmoco.data.manifest import Manifest
from vmoco.job_settings import SweepSettings
from vmoco.sweep.prepare import prepare
from vmoco.sweep.record import Sweep, Trial
from vmoco.train.publish import encoder_in

SPACE = {
    "generator.drop_ratio": [0.0, 0.25, 0.5, 0.75],
    "decay": {"none": {"moco.decay": 1.0}, "exp": {f"moco.{name}": value for name, value in ablation.DECAY.items()}},
    "train.learning_rate": {"low": 1e-4, "high": 2e-2, "log": True},
    "moco.temperature": {"low": 0.03, "high": 1.0, "log": True},
}
HELD_OUT_MAPS = range(17, 25)
STEPS, EVERY, LOG_EVERY = 162, 18, 6  # ASHA decides at 18, 54 and 162


def make_data(folder: Path) -> str:
    """Makes the trials' data set, with maps 17 to 24 held out, and the probe's data sets."""
    ablation.make_data(folder, "doom")
    place = folder / "sweep"
    if not (place / "manifest.parquet").exists():
        from tests.benchmarks.doom import render

        seed, count = ablation.PRETRAIN_SEED, ablation.PLACES_PER_MAP
        clips = render(maps=ablation.PRETRAIN_MAPS, places_per_map=count, seed=seed)
        clips += render(maps=HELD_OUT_MAPS, places_per_map=24, seed=seed, held_out=True)
        write_data_set(place, clips)
    return str(place)


def run(name: str, uri: str, folder: Path, *, scheduler: str, samples: int) -> tuple[Sweep, float]:
    """Runs one sweep to its end; returns it and its seconds in this process."""
    space = folder / "space.yaml"
    space.write_text(json.dumps(SPACE))
    pretrain = changed(
        ablation.BASE,
        run={"name": name, "storage": str(folder / "runs")},
        data={"uri": uri},
        train={
            "steps": STEPS,
            "checkpoint_every": EVERY,
            "log_every": LOG_EVERY,
            "global_batch": 32,
            "micro_batch": 16,
        },
        evaluation={"num_cpus": 0, "max_videos": 200},
        tracking={"register_as": name},
    )
    settings = SweepSettings(
        space=str(space),
        search="random",
        samples=samples,
        scheduler=scheduler,
        asha_grace_steps=EVERY,
        pretrain=pretrain,
    )
    prepared = prepare(settings)
    from vmoco.sweep import sweep as sweeps

    started = time.monotonic()
    return sweeps.run_sweep(prepared, show=job.show), time.monotonic() - started


def probed(trial: Trial, folder: Path) -> float:
    """Accuracy of a linear probe on the encoder of a finished trial, in percent."""
    checkpoint = max((folder / "runs" / "full" / "trials" / trial.name).glob("step-*"))
    encoder = encoder_in(checkpoint, data=Manifest.load(str(folder / "sweep")))
    return ablation.probe(encoder.backbone, ablation.BASE, folder / "doom")["linear_test"]


def training_seconds(trial: Trial) -> float:
    """Seconds of the steps alone, by the times of its points; the first interval, with the start, counts as others."""
    assert trial.run_id is not None, "the trial has finished"
    points = tracking.client().get_metric_history(trial.run_id, "loss")
    times = sorted(point.timestamp for point in points)
    return (times[-1] - times[0]) / 1000 * len(times) / (len(times) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(storage.home()) / "sweep-benchmark", help="data and runs")
    parser.add_argument("--samples", type=int, default=8, help="trials")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    uri = make_data(folder)
    job.connect(dashboard=True, worker_output=False)
    full, seconds = run("full", uri, folder, scheduler="none", samples=arguments.samples)
    asha, asha_seconds = run("asha", uri, folder, scheduler="asha", samples=arguments.samples)
    finished = [trial for trial in full.trials if trial.status == "finished"]
    truth = [probed(trial, folder) for trial in finished]
    scores = [trial.scores[full.score] for trial in finished]
    for trial, linear in sorted(zip(finished, truth, strict=True), key=lambda row: -row[1]):
        job.show(f"{trial.name}  probe {linear:5.2f}  {full.score} {trial.scores[full.score]:.3f}  "
             f"rank {trial.scores['score/effective_rank']:5.1f}  {trial.values}")  # fmt: skip
    overheads = [trial.seconds - training_seconds(trial) for trial in finished]
    shares = [overhead / trial.seconds for overhead, trial in zip(overheads, finished, strict=True)]
    best, chosen = full.best(), asha.best()
    assert best is not None, "trials have finished"
    result = {
        "overhead_share": round(statistics.median(shares), 3),
        "rank_correlation": round(float(spearmanr(scores, truth).statistic), 3),
        "asha_saving": round(1 - sum(t.step for t in asha.trials) / sum(t.step for t in full.trials), 3),
        "overhead_s": round(statistics.median(overheads), 1),
        "same_best": chosen is not None and chosen.values == best.values,
        "probe_of_chosen": truth[finished.index(best)],
        "probe_range": [min(truth), max(truth)],
        "trials": len(finished),
        "failed": sum(trial.status == "failed" for trial in full.trials),
        "full_s": round(seconds),
        "asha_s": round(asha_seconds),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    job.run_job(main)
