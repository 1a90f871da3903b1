"""ASHA, as a sweep configures it, stops the worse trials by scores of the same step, and waits for a score."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from tests.train.test_step import changed
from vmoco.job_settings import SweepSettings
from vmoco.presets import PRESETS


@dataclass
class Named:
    """What the scheduler wants to know of a trial."""

    trial_id: str


def test_asha_stops_those_below_the_best_third_of_a_step() -> None:
    """Of three trials scored at step 10, two stop; a report without a score, or of the last step, stops none."""
    from vmoco.sweep.sweep import _scheduler

    pretrain = changed(PRESETS["tiny"][1], train={"steps": 90})
    settings = SweepSettings(pretrain=pretrain, scheduler="asha", asha_grace_steps=10)
    scheduler = _scheduler(SimpleNamespace(settings=settings))  # type: ignore[arg-type]
    scheduler.set_search_properties("score/retrieval", "max")
    trials = [Named(str(place)) for place in range(3)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)

    def decide(trial: Named, step: int, **score: float) -> str:
        return str(scheduler.on_trial_result(None, trial, {"step": step} | score))

    assert decide(trials[0], 10) == "CONTINUE", "no score yet"
    found = [
        decide(trial, 20, scored_step=10.0, **{"score/retrieval": score})
        for trial, score in zip(trials, (0.9, 0.5, 0.4), strict=True)
    ]
    assert found == ["CONTINUE", "STOP", "STOP"]
    assert decide(trials[0], 90, scored_step=90.0, **{"score/retrieval": 0.1}) == "CONTINUE", "it ends by itself"
