"""One trial: the pretraining of `jobs/pretrain.py`, within a trial of Ray Tune.

What a person has to mend ends this trial, with its reason as its result; only a lost process or node raises, so that
Ray Tune starts the trial again, and it goes on from its checkpoint by its name.
"""

from __future__ import annotations

import os
import traceback
from typing import Any

from vmoco import job, tracking
from vmoco.config import PretrainSettings
from vmoco.train import run

MEMORY = 64 * 2**20
"""What the process around a trial asks of Ray: no CPU, or it could keep its own workers from starting."""


_TRACKER_SECONDS = 3600.0
"""So long a trial waits at its start for the tracker: one that is away for a while must not fail all that wait."""


def train_trial(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in Ray Tune; returns its last result: step, score/*, run_id, seconds; or `failed`, the reason.

    Args:
        config: settings (JSON), parent (MLflow run), environment, and index, the trial's place in its sweep.
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
            assert run_id is not None, "it has ended"
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
