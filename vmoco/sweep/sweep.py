"""Runs a sweep from the driver: Ray Tune starts the trials, then the best encoder is registered.

All trials are known before the first starts, and each is a run with a name of its own. So submitting the same sweep
again hands Ray Tune those that have not ended, and a trial goes on from its checkpoint as any run does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from vmoco import registry, storage, tracking
from vmoco.config import PretrainSettings, RunSettings
from vmoco.sweep import trial
from vmoco.sweep.board import Board
from vmoco.sweep.ledger import Sweep, Trial, open_sweep
from vmoco.sweep.space import load_space, make_plan
from vmoco.sweep.sweep_settings import SweepSettings
from vmoco.train import run
from vmoco.train.evaluation import resources
from vmoco.train.run import PreparedRun

_LOST = 3  # times that Ray Tune starts a trial again after its process or node was lost


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep that has been checked and not begun."""

    settings: SweepSettings
    sweep: Sweep
    runs: list[PreparedRun]
    """Of each trial."""
    refused: list[str]
    """A sentence for each combination that is no trial."""


def prepare(settings: SweepSettings) -> PreparedSweep:
    """Checks all that can be checked without Ray, and begins nothing.

    Raises:
        ValueError: space, data, storage or metric cannot be used.
    """
    base = settings.pretrain
    if not base.evaluation.enabled:
        raise ValueError("evaluation.no-enabled leaves a sweep without a score: leave it out")
    plan = make_plan(load_space(settings.space), base, search=settings.search, samples=settings.samples)
    place = storage.absolute_uri(base.run.storage or storage.join(storage.home(), "runs"))
    checked = run.prepare(_as_run(base, name=base.run.name or "sweep", place=place))
    _check_metric(settings, checked)
    contents = [point.settings.content_hash() for point in plan.points]
    digest = hashlib.sha256(json.dumps([checked.manifest.hash, settings.metric, contents]).encode()).hexdigest()
    name = base.run.name or f"{base.preset}-sweep-{digest[:8]}"
    folder = storage.join(place, name)
    runs, trials, refused = [], [], list(plan.refused)
    for place_in_plan, point in enumerate(plan.points):
        own = f"{name}-{place_in_plan:03d}"
        try:
            runs.append(run.prepare(_as_run(point.settings, name=own, place=storage.join(folder, "trials"))))
        except ValueError as error:
            refused.append(f"{own}: {error}")
            continue
        trials.append(Trial(own, point.values, contents[place_in_plan], point.settings.train.steps))
    if not trials:
        raise ValueError(f"no combination of the space is a valid run: {refused[0]}")
    sweep = open_sweep(Sweep(name, folder, settings.metric, checked.manifest.hash, trials), runs)
    return PreparedSweep(settings, sweep, runs, refused)


def _as_run(settings: PretrainSettings, *, name: str, place: str) -> PretrainSettings:
    """A trial is a run of its own that registers nothing: the sweep does so, for the best."""
    return settings.model_copy(
        update={
            "run": RunSettings(name=name, storage=place, seed=settings.run.seed),
            "tracking": settings.tracking.model_copy(update={"register_as": None}),
        }
    )


def _check_metric(settings: SweepSettings, prepared: PreparedRun) -> None:
    table = prepared.manifest.table
    if settings.metric == "knn":
        labelled = table.filter(table["label"].is_valid())["held_out"].to_pylist()
        if set(labelled) != {True, False}:
            raise ValueError(
                f"metric knn needs labelled clips both to train on and held out, and {prepared.manifest.uri} has "
                "none of either or both: take --metric retrieval"
            )


def capacity(settings: Sequence[PretrainSettings], nodes: Sequence[dict[str, float]]) -> int:
    """Trials that the nodes hold at once, counting the largest trial.

    Args:
        settings: of the trials.
        nodes: resources of each node.

    Raises:
        ValueError: they do not hold one.
    """
    return min(_capacity(each, nodes) for each in settings)


def _capacity(settings: PretrainSettings, nodes: Sequence[dict[str, float]]) -> int:
    scaling = settings.scaling
    worker = {"CPU": float(scaling.cpus_per_worker)} | ({"GPU": 1.0} if scaling.use_gpu else {})
    bundles = [worker] * scaling.num_workers + [each for each in [resources(settings.evaluation)] if each]
    free = [dict(node) for node in nodes]
    count = 0
    while all(_take(bundle, free) for bundle in bundles):
        count += 1
    if count == 0:
        largest = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")}
        raise ValueError(
            f"a trial needs {scaling.num_workers} workers of {_said(worker)} each"
            + (f" and {_said(bundles[-1])} for the evaluation" if len(bundles) > scaling.num_workers else "")
            + f", and {len(nodes)} nodes of at most {_said(largest)} do not hold it: lower scaling.num-workers, "
            "scaling.cpus-per-worker or evaluation.num-cpus, or add nodes"
        )
    return count


def _take(bundle: dict[str, float], free: list[dict[str, float]]) -> bool:
    for node in free:
        if all(node.get(name, 0.0) >= number for name, number in bundle.items()):
            for name, number in bundle.items():
                node[name] -= number
            return True
    return False


def _said(bundle: dict[str, float]) -> str:
    return " and ".join(f"{number:g} {name}" for name, number in bundle.items())


def run_sweep(prepared: PreparedSweep, *, show: Callable[[str], None]) -> Sweep:
    """Runs all trials that have not ended; `ray.init` has been called, with a dashboard.

    Args:
        prepared: what `prepare` returned.
        show: takes each line for a person.

    Raises:
        ValueError: the cluster cannot hold a trial, or the tracker cannot be used.
    """
    settings, sweep = prepared.settings, prepared.sweep
    open_trials = [place for place, trial in enumerate(sweep.trials) if not trial.ended]
    for sentence in prepared.refused:
        show(f"warning: left out, because no run can have it: {sentence}")
    if open_trials:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        at_once = capacity([prepared.runs[place].settings for place in open_trials], nodes)
        at_once = min(at_once, settings.max_concurrent or at_once)
    if not sweep.parent_run:
        base = settings.pretrain
        params = settings.model_dump(mode="json", exclude={"pretrain"}) | {"trials": len(sweep.trials)}
        sweep.parent_run = tracking.create_parent(
            sweep.name, experiment=base.tracking.experiment, params={key: str(value) for key, value in params.items()}
        )
    sweep.save()
    show(f"sweep {sweep.name}: {len(sweep.trials)} trials, {len(sweep.trials) - len(open_trials)} have ended before")
    if open_trials:
        tracking.resume_run(sweep.parent_run)
        show(f"{at_once} at once; tracked as {sweep.parent_run} in {tracking.tracking_uri()}, folder {sweep.folder}")
        _fit(prepared, open_trials, at_once, show)
    return sweep


def _fit(prepared: PreparedSweep, places: list[int], at_once: int, show: Callable[[str], None]) -> None:
    sweep, settings = prepared.sweep, prepared.settings
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # the first reports come before the first score
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # MLflow has all of it
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the job at once: the trials have their checkpoints
    environment = {
        "VMOCO_HOME": storage.home(),
        "MLFLOW_TRACKING_URI": tracking.tracking_uri(),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": os.environ.get("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2"),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    configs = [
        {
            "index": place,
            "settings": prepared.runs[place].settings.canonical_json(),
            "parent": sweep.parent_run,
            "environment": environment,
        }
        for place in places
    ]
    board = Board(sweep, prepared.runs, show=show, seconds=settings.table_seconds)
    tuner = tune.Tuner(
        tune.with_resources(_trainable, {"memory": trial.MEMORY}),
        param_space={"trial": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(
            metric=sweep.score, mode="max", max_concurrent_trials=at_once, scheduler=_scheduler(prepared, places)
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=sweep.folder,
            failure_config=tune.FailureConfig(max_failures=_LOST),
            callbacks=[board],
            verbose=0,
        ),
    )
    tuner.fit()


def _trainable(config: dict[str, dict[str, object]]) -> dict[str, object]:
    return trial.train_trial(config["trial"])


def _scheduler(prepared: PreparedSweep, places: list[int]) -> TrialScheduler:
    if prepared.settings.scheduler == "none":
        return FIFOScheduler()
    steps = max(prepared.sweep.trials[place].steps for place in places)
    return ASHAScheduler(
        time_attr="step",  # Tune's own count of reports begins anew when a trial is resumed
        max_t=steps,
        grace_period=min(prepared.settings.asha_grace_steps, steps),
        reduction_factor=3,
        stop_last_trials=False,  # the last step is followed by the export of the encoder
    )


def register_best(prepared: PreparedSweep) -> str:
    """Registers the encoder of the best trial, once; returns models:/NAME/VERSION, or "" where none has finished."""
    sweep, tracked = prepared.sweep, prepared.settings.pretrain.tracking
    best = sweep.best()
    if best is None or sweep.registered:
        return sweep.registered
    assert best.run_id is not None, "it has finished"
    values = ", ".join(f"{axis} {value}" for axis, value in best.values.items())
    made = registry.register(
        best.run_id,
        name=tracked.register_as or sweep.name,
        alias=tracked.alias,
        description=f"best of {len(sweep.trials)} trials of sweep {sweep.name} by {sweep.score} "
        f"{best.scores[sweep.score]:.3f}: {values}; run {best.name}, data {sweep.manifest_hash}",
    )
    sweep.registered = f"models:/{made.name}/{made.version}"
    sweep.save()
    return sweep.registered
