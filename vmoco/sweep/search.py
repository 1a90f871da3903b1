"""How the trials of a sweep are chosen: every combination, draws at random, or draws that learn from the scores.

What comes next is a function of the seed and of the trials so far, so going on needs no state of the search.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vmoco.config import PretrainSettings
from vmoco.seed import hash64
from vmoco.sweep.ledger import Trial
from vmoco.sweep.space import Range, Space, Values, said

_TRIES = 64
"""Draws for one trial before the space counts as tried out: others were the same as before, or no run."""


@dataclass(frozen=True)
class Point:
    """What one trial is to be."""

    values: Values
    settings: PretrainSettings
    generation: int = 0


@dataclass(frozen=True)
class Plan:
    """All trials that are known before the first starts."""

    points: list[Point]
    refused: list[str]
    """A sentence for each combination that no run can have."""


def grid(space: Space) -> Plan:
    """Every combination, in order; equal ones once.

    Raises:
        ValueError: an axis is a range, or no combination is a valid run.
    """
    return _plan(space, space.combinations(), None)


def random(space: Space, *, samples: int) -> Plan:
    """So many combinations by the seed of the space's base, or fewer where there are no more that differ.

    Raises:
        ValueError: no combination is a valid run.
    """
    draws = (space.draw(hash64("sweep", space.base.run.seed, place)) for place in range(samples * _TRIES))
    return _plan(space, draws, samples)


def _plan(space: Space, combinations: Iterable[Values], count: int | None) -> Plan:
    points: dict[str, Point] = {}
    refused: dict[str, None] = {}
    for values in combinations:
        try:
            settings = space.settings(values)
        except ValueError as error:
            refused[f"{said(values)}: {error}"] = None
            continue
        points.setdefault(settings.canonical_json(), Point(values, settings))
        if len(points) == count:
            break
    if not points:
        first = next(iter(refused), "it has none")
        raise ValueError(f"no combination of the space is a valid run: {first}")
    return Plan(list(points.values()), list(refused))


def suggest(space: Space, trials: Sequence[Trial], *, score: str) -> Point | None:
    """What to try next, by Optuna's tree-structured Parzen estimator.

    Args:
        space: over what.
        trials: so far; those without a score count as not better than the worst, so that no two are tried close
            together at once.
        score: name of the number that chooses.

    Returns:
        None where nothing new has been found.
    """
    import optuna  # 1 s: only where it is asked for

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {axis: _distribution(values) for axis, values in space.axes.items()}
    known = {str(trial.values) for trial in trials}
    for attempt in range(_TRIES):
        seed = hash64("sweep", space.base.run.seed, len(trials), attempt) % 2**32
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4, constant_liar=True, multivariate=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(_told(trial, space, distributions, score) for trial in trials if trial.status != "failed")
        asked = study.ask(distributions).params
        values = {axis: _label(chosen, space.axes[axis]) for axis, chosen in asked.items()}
        if str(values) in known:
            continue
        try:
            return Point(values, space.settings(values))
        except ValueError:  # no run can have it
            continue
    return None


def _distribution(axis: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(axis, Range):
        return CategoricalDistribution(range(len(axis.choices)))  # by place, as a value may be a list
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _label(chosen: Any, axis: Any) -> Any:
    return chosen if isinstance(axis, Range) else axis.labels[chosen]


def _told(trial: Trial, space: Space, distributions: dict[str, Any], score: str) -> Any:
    from optuna.trial import TrialState, create_trial

    params = {
        axis: trial.values[axis] if isinstance(values, Range) else values.labels.index(trial.values[axis])
        for axis, values in space.axes.items()
    }
    value = trial.scores.get(score) if trial.ended else None
    state = TrialState.RUNNING if value is None else TrialState.COMPLETE
    return create_trial(params=params, distributions=distributions, value=value, state=state)
