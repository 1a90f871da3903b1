"""Runs a sweep from the driver: Ray Tune starts the trials, then the best encoder is registered.

Each trial is a run with its own name: the pretraining of `jobs/pretrain.py` within a trial of Ray Tune. A sweep that is
submitted again gives Ray Tune the trials that have not ended, and each continues from its checkpoint as any run does.
Ray Tune's own state is not used. An error that the user has to fix ends its trial, with the reason as its result. Only
a lost process or node raises an error, so that Ray Tune starts the trial again.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from vmoco import job, ray_internals, storage, tracking
from vmoco.cluster.reservation import alive_nodes, fit_to_cluster, trials_at_once
from vmoco.config import PretrainSettings
from vmoco.job_settings import RegisterSettings
from vmoco.sweep.prepare import PreparedSweep
from vmoco.sweep.record import Sweep
from vmoco.sweep.space import as_text
from vmoco.sweep.trial_callback import TrialCallback
from vmoco.train import run
from vmoco.train.launch import check_places
from vmoco.train.publish import publish_run
from vmoco.train.run import run_id_of

MEMORY = 64 * 2**20
"""Bytes that the process around a trial requests from Ray. A CPU for it could be missing for its own workers."""
_TRACKER_SECONDS = 3600.0
"""How long a trial waits for the tracker at its start: a tracker that is down for a while must not fail all trials."""
_MAX_LOST = 3
"""How often Ray Tune starts a trial again after its process or node was lost."""


def train_trial(config: dict[str, Any]) -> dict[str, Any]:
    """Runs one trial in Ray Tune; returns step, score/* and run_id; or `failed`, the reason.

    Args:
        config: settings (JSON), parent (MLflow run), environment, and index (the trial's place in its sweep).
    """
    os.environ.update(config["environment"])
    from ray.tune.integration.ray_train import TuneReportCallback

    from vmoco.train import launch

    settings = PretrainSettings.model_validate_json(config["settings"])
    try:
        tracking.await_answer(timeout=_TRACKER_SECONDS, show=job.show)
        prepared = run.prepare(settings)
        if prepared.finished:
            run_id = run.run_id_of(prepared)
            assert run_id is not None, "the trial has ended"
        else:
            run_id = launch.pretrain(
                prepared,
                show=job.show,
                callbacks=[TuneReportCallback()],
                parent_run=config["parent"],
            ).run_id
        return {"step": settings.last_step, "run_id": run_id, **tracking.scores(run_id)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": job.describe(error).removeprefix("error: ")}


def run_sweep(prepared: PreparedSweep, *, show: Callable[[str], None]) -> Sweep:
    """Runs all trials that have not ended; `ray.init` has been called, with a dashboard.

    Args:
        prepared: what `prepare` returned.
        show: prints a line.

    Raises:
        ValueError: the cluster cannot hold a trial, or the tracker cannot be used.
    """
    settings, sweep = prepared.settings, prepared.sweep
    for reason in prepared.refused:
        show(f"warning: left out, because it is not valid: {reason}")
    num_shown = len(prepared.refused)
    nodes = alive_nodes()
    planned = [settings.pretrain, *(each.settings for each in prepared.runs)]
    fitted = [fit_to_cluster(each, nodes) for each in planned]
    for line in fitted[0][1]:
        show(f"each trial: {line}")
    at_once = trials_at_once([each for each, _ in fitted], nodes)
    check_places(prepared.runs[0].settings if prepared.runs else settings.pretrain, show=show)
    at_once = min(at_once, settings.max_concurrent or at_once)
    if sweep.parent_run:
        tracking.resume_run(sweep.parent_run)
    else:
        params = settings.model_dump(mode="json", exclude={"pretrain"})
        sweep.parent_run = tracking.create_parent(
            sweep.name,
            experiment=settings.pretrain.tracking.experiment,
            params={key: str(value) for key, value in params.items()},
        )
    sweep.save()
    total = max(len(sweep.trials), settings.samples if settings.search == "optuna" else 0)
    ended = len(sweep.trials) - len(prepared.waiting())
    show(f"sweep {sweep.name}: {total} trials, {ended} have ended before, {at_once} at once")
    show(f"tracked as {sweep.parent_run} in {tracking.tracking_uri()}, folder {sweep.folder}")
    try:
        if total > ended:
            _fit(prepared, total - ended, at_once, show)
        while prepared.next_generation():
            waiting = prepared.waiting()
            show(f"generation {sweep.trials[waiting[0]].generation + 1}: {len(waiting)} trials go on from the best")
            _fit(prepared, len(waiting), at_once, show)
    except (KeyboardInterrupt, SystemExit):
        _note_stopped(prepared, show)
        raise
    for reason in prepared.refused[num_shown:]:
        show(f"warning: not tried, because it is not valid: {reason}")
    return sweep


def _note_stopped(prepared: PreparedSweep, show: Callable[[str], None]) -> None:
    """Records in the tracker that the running trials are stopped: their processes end with this one."""
    for each, its_run in zip(prepared.sweep.trials, prepared.runs, strict=True):
        run_id = run_id_of(its_run) if each.status == "running" else None
        if run_id and (problem := tracking.finish_run(run_id, "KILLED")):
            show(f"warning: {problem}")


class _Feed(Searcher):
    """Gives Ray Tune the trials that have not ended, then those that a search suggests."""

    def __init__(self, prepared: PreparedSweep) -> None:
        super().__init__()
        self._prepared = prepared
        self._waiting = prepared.waiting()

    def suggest(self, trial_id: str) -> Any:
        place = self._waiting.pop(0) if self._waiting else self._prepared.suggest()
        if place is None:
            return Searcher.FINISHED
        self._prepared.sweep.save()
        return {
            "index": place,
            "settings": self._prepared.runs[place].settings.canonical_json(),
            "parent": self._prepared.sweep.parent_run,
            "environment": _environment(),
        }

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Does nothing: the trial callback writes it to the sweep's own record."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing, for the same reason."""


def _environment() -> dict[str, str]:
    return {
        "VMOCO_HOME": storage.home(),
        "MLFLOW_TRACKING_URI": tracking.tracking_uri(),
        ray_internals.HEALTH_CHECK_SECONDS: os.environ.get(ray_internals.HEALTH_CHECK_SECONDS, "0.2"),
        ray_internals.CHANGE_DIRECTORY: "0",
    }


def _fit(prepared: PreparedSweep, count: int, at_once: int, show: Callable[[str], None]) -> None:
    sweep, settings = prepared.sweep, prepared.settings
    # The first reports have no score yet; MLflow has what Tune would log; and Ctrl-C ends the job at once, because the
    # trials have their checkpoints.
    os.environ.update(dict.fromkeys(ray_internals.TUNE_SWITCHES, "1"))
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # it warns without its loggers
    tuner = tune.Tuner(
        tune.with_resources(train_trial, {"memory": MEMORY}),
        tune_config=tune.TuneConfig(
            metric=sweep.score,
            mode="max",
            num_samples=count,
            max_concurrent_trials=at_once,
            search_alg=_Feed(prepared),
            scheduler=_scheduler(prepared),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=sweep.folder,
            failure_config=tune.FailureConfig(max_failures=_MAX_LOST),
            callbacks=[TrialCallback(sweep, prepared.runs, show=show, seconds=settings.table_seconds)],
            verbose=0,
        ),
    )
    tuner.fit()


def _scheduler(prepared: PreparedSweep) -> TrialScheduler:
    if prepared.settings.scheduler != "asha":
        return FIFOScheduler()
    steps = prepared.settings.pretrain.train.steps
    return ASHAScheduler(
        # The step of the score: a report carries the newest score, which is of an earlier checkpoint. Tune's own count
        # of reports starts anew when a trial is resumed.
        time_attr="scored_step",
        max_t=steps,
        grace_period=min(prepared.settings.asha_grace_steps, steps),
        reduction_factor=3,
        stop_last_trials=False,  # after the last step its score and its export follow
    )


def register_best(prepared: PreparedSweep, *, show: Callable[[str], None]) -> str:
    """Registers the encoder of the best trial, once; returns models:/NAME/VERSION, or "" where none has finished.

    Raises:
        ValueError: the tracker cannot be used, or the checkpoint of the best trial is gone.
    """
    sweep, tracked = prepared.sweep, prepared.settings.pretrain.tracking
    best = sweep.best()
    if best is None or best.name == sweep.registered_trial:
        return sweep.registered
    assert best.run_id is not None, "the trial has finished"
    made = publish_run(
        best.run_id,
        RegisterSettings(
            name=tracked.register_as or sweep.name, alias=tracked.alias, data_licence=tracked.data_licence
        ),
        note=f"best of {len(sweep.trials)} trials of sweep {sweep.name} by {sweep.score} "
        f"{best.scores[sweep.score]:.3f}: {as_text(best.values)}; ",
        show=show,
    )
    sweep.registered, sweep.registered_trial = f"models:/{made.name}/{made.version}", best.name
    sweep.save()
    return sweep.registered
