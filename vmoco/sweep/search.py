"""How the trials of a sweep are chosen: every combination, draws at random, or draws that learn from the scores.

What comes next is a function of the seed and of the trials so far, so going on needs no state of the search.


Population-based training (Jaderberg et al., 2017): it finds a schedule of settings rather than one value of each.

A population trains side by side for some steps: a generation. Then the worst take the training state of one of the
best and settings near to its own, and all go on. A member of the next generation is a run of its own that begins from
the last checkpoint of its donor, which is itself where it was not among the worst.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vmoco.config import PretrainSettings
from vmoco.seed import hash64
from vmoco.sweep.record import Trial
from vmoco.sweep.space import Choices, Range, Space, Values, said

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


_SHARE = 0.25
"""Of the population, how many are replaced and how many are copied."""
_RESAMPLE = 0.25
"""How often a setting is drawn anew instead of moved."""
_FACTOR = 1.2
_MOVE_TRIES = 64


@dataclass(frozen=True)
class Member:
    """What a member of the next generation is to be."""

    donor: Trial
    values: Values


def next_generation(space: Space, members: Sequence[Trial], *, score: str) -> list[Member]:
    """The next generation, in the order of this one.

    Args:
        space: that the settings move in.
        members: of this generation, in order; those without a score are the worst.
        score: name of the number that chooses, higher is better.

    Returns:
        Nothing where no member has a score.
    """
    scored = [member for member in members if member.status == "finished" and score in member.scores]
    if not scored:
        return []
    ranked = sorted(members, key=lambda member: member.scores[score] if member in scored else -math.inf, reverse=True)
    count = max(1, round(_SHARE * len(members))) if len(members) > 1 else 0
    best = ranked[: min(count, len(scored))] or ranked
    replaced = {member.name for member in ranked[len(ranked) - count :]} | {
        member.name for member in members if member not in scored
    }
    found = []
    for place, member in enumerate(members):
        if member.name not in replaced:
            found.append(Member(member, member.values))
            continue
        random = np.random.default_rng(hash64("population", space.base.run.seed, member.generation, place))
        donor = best[int(random.integers(len(best)))]
        found.append(Member(donor, _near(donor.values, space, random)))
    return found


def _near(values: Values, space: Space, random: np.random.Generator) -> Values:
    for _ in range(_MOVE_TRIES):
        moved = {axis: _moved(values[axis], space.axes[axis], random) for axis in space.axes}
        try:
            space.settings(moved)
        except ValueError:  # no run can have it
            continue
        return moved
    return values


def _moved(value: object, axis: Choices | Range, random: np.random.Generator) -> object:
    if random.random() < _RESAMPLE:
        return axis.draw(random)
    up = bool(random.integers(2))
    if isinstance(axis, Choices):
        place = axis.labels.index(value) + (1 if up else -1)
        return axis.labels[min(max(place, 0), len(axis.labels) - 1)]
    assert isinstance(value, int | float), "a range is of numbers"
    # Where a range is not logarithmic, a step is a share of its width: near 1 or 0 a factor would move it too far.
    width = (axis.high - axis.low) * (_FACTOR - 1)
    near = value * (_FACTOR if up else 1 / _FACTOR) if axis.log else value + (width if up else -width)
    kept = min(max(near, axis.low), axis.high)
    return round(kept) if axis.whole else float(kept)
