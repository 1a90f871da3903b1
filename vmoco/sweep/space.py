"""What a sweep tries: a space of settings, and how the next trials are chosen in it.

A space has axes, and each combination of their values gives the settings of one pretraining. Trials are every
combination, random draws, draws that learn from the scores (Optuna), or a population. The next trial is a function of
the seed and of the trials so far, so a resumed sweep needs no saved state of the search.

Population-based training (Jaderberg et al., 2017) finds a schedule of settings rather than one value of each. The
members of a population train for some steps, which is a generation. Then each of the worst members takes the training
state of one of the best, and settings near that one's. All members continue. Each member of the next generation is a
run that begins from the last checkpoint of its donor; a member that is not among the worst is its own donor.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vmoco.config import PretrainSettings
from vmoco.seed import hash64
from vmoco.sweep.record import Trial

# They do not change what an encoder learns, or the sweep sets them itself.
_SAME_FOR_ALL = ("run.name", "run.storage", "data.uri", "tracking", "evaluation")

BUILT_IN: dict[str, dict[str, Any]] = {
    "ratio-decay": {
        "generator.drop_ratio": [0.0, 0.25, 0.5, 0.75],
        "decay": {
            "none": {"moco.decay": 1.0, "moco.decay_schedule": "constant"},
            "constant": {"moco.decay_schedule": "constant"},
            "linear": {"moco.decay_schedule": "linear"},
            "cosine": {"moco.decay_schedule": "cosine"},
        },
    }
}
"""Built-in spaces by name; the preset or flags set t and its end."""

_TRIES = 64
"""Most draws for a new or a changed trial. It is given up if all of them equal earlier trials or are not valid."""
_SHARE = 0.25
"""Share of a population that is replaced, and share that is copied."""
_RESAMPLE = 0.25
"""Probability that a setting is drawn anew instead of moved."""
_FACTOR = 1.2
"""Factor by which a setting is moved."""

Values = dict[str, Any]
"""For each axis, as the user writes it: a value, or the name of a choice."""


@dataclass(frozen=True)
class Choices:
    """An axis with a list of values. Each has a label, and the fields that it sets."""

    choices: list[tuple[Any, dict[str, Any]]]

    @property
    def labels(self) -> list[Any]:
        """The values as the user writes them."""
        return [label for label, _ in self.choices]

    def fields(self, label: Any) -> dict[str, Any]:
        """The fields that a value sets."""
        return next(fields for own, fields in self.choices if own == label)

    def draw(self, random: np.random.Generator) -> Any:
        """A random value; all are equally likely."""
        return self.choices[int(random.integers(len(self.choices)))][0]


@dataclass(frozen=True)
class Range:
    """An axis with all numbers between two limits."""

    field: str
    low: float
    high: float
    log: bool
    integer: bool

    def fields(self, label: Any) -> dict[str, Any]:
        """The fields that a value sets."""
        return {self.field: label}

    def draw(self, random: np.random.Generator) -> Any:
        """A random value: all values are equally likely, or all logarithms."""
        if self.log:
            value = math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = float(random.uniform(self.low, self.high))
        return round(value) if self.integer else value


@dataclass(frozen=True)
class Space:
    """Axes over settings that all trials share."""

    base: PretrainSettings
    axes: dict[str, Choices | Range]

    @staticmethod
    def read(space: Mapping[str, Any], base: PretrainSettings) -> Space:
        """Reads the axes of a file.

        Args:
            space: for each axis, a list of values, {low, high, log}, or {name: {field: value}}.
            base: settings that all trials share.

        Raises:
            ValueError: a field is unknown, or an axis cannot be read.
        """
        return Space(base, {axis: _axis(axis, values, base) for axis, values in space.items()})

    def fields(self) -> set[str]:
        """Every field that some value sets, as group.field_name."""
        found: set[str] = set()
        for axis in self.axes.values():
            found |= {axis.field} if isinstance(axis, Range) else {name for _, sets in axis.choices for name in sets}
        return {name.replace("-", "_") for name in found}

    def combinations(self) -> Iterator[Values]:
        """Every combination, in order.

        Raises:
            ValueError: an axis is a range.
        """
        for axis, values in self.axes.items():
            if isinstance(values, Range):
                raise ValueError(
                    f"axis {axis} of the space is a range, and --search grid needs a list: list values, or give "
                    "--search random or --search optuna"
                )
        labels = [values.labels for values in self.axes.values() if isinstance(values, Choices)]
        return (dict(zip(self.axes, chosen, strict=True)) for chosen in itertools.product(*labels))

    def draw(self, seed: int) -> Values:
        """A random combination."""
        random = np.random.default_rng(seed)
        return {axis: values.draw(random) for axis, values in self.axes.items()}

    def settings(self, values: Mapping[str, Any]) -> PretrainSettings:
        """The pretraining of a combination.

        Raises:
            ValueError: it is not valid.
        """
        changed = self.base.model_dump()
        for axis, label in values.items():
            for field, value in self.axes[axis].fields(label).items():
                group, _, name = field.replace("-", "_").partition(".")
                changed[group][name] = value
        return PretrainSettings(**changed)


def as_text(values: Mapping[str, Any]) -> str:
    """A combination as text, such as "moco.decay 0.99, generator.drop_ratio 0.5"."""
    return ", ".join(f"{axis} {short(value)}" for axis, value in values.items())


def short(value: Any) -> str:
    """A value as text; numbers have four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def load_space(name: str) -> dict[str, Any]:
    """The axes of a built-in space or of a YAML file.

    Raises:
        ValueError: there is no such space or file, or it cannot be read.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"--space {name!r} is neither a file nor a built-in space: give the path of a YAML file, or "
            f"{', '.join(BUILT_IN)}"
        )
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--space {name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"--space {name} is empty: write one line per field, such as `moco.decay: [0.99, 1.0]`")
    return {str(axis): _with_numbers(values) for axis, values in found.items()}


def _with_numbers(found: Any) -> Any:
    """The values that YAML read, with 1e-4 as a number: YAML itself reads it as text, and only 1.0e-4 as a number."""
    if isinstance(found, dict):
        return {key: _with_numbers(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_with_numbers(value) for value in found]
    if isinstance(found, str):
        with contextlib.suppress(ValueError):
            return float(found)
    return found


def _axis(axis: str, values: Any, base: PretrainSettings) -> Choices | Range:
    if isinstance(values, Sequence) and not isinstance(values, str):
        _check_field(axis, base)
        if not values:
            raise ValueError(f"axis {axis} of the space has no value: list some, or leave it out")
        return Choices([(value, {axis: value}) for value in values])
    if isinstance(values, Mapping) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        _check_field(axis, base)
        return _range(axis, values)
    if isinstance(values, Mapping) and values and all(isinstance(change, Mapping) for change in values.values()):
        for field in {field for change in values.values() for field in change}:
            _check_field(field, base)
        return Choices([(str(name), dict(change)) for name, change in values.items()])
    raise ValueError(
        f"axis {axis} of the space is {values!r}: write a list of values, {{low: A, high: B, log: true}}, or "
        "named choices {NAME: {FIELD: VALUE}}"
    )


def _range(axis: str, values: Mapping[str, Any]) -> Range:
    low, high, log = values["low"], values["high"], values.get("log", False)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not low < high or (log and low <= 0):
        raise ValueError(
            f"axis {axis} of the space has the range {low!r} to {high!r}: low must be a number below high, and above 0 "
            "with log"
        )
    return Range(axis, low, high, bool(log), isinstance(low, int) and isinstance(high, int))


def _check_field(field: str, base: PretrainSettings) -> None:
    field = field.replace("-", "_")
    groups = base.model_dump(exclude={"preset"})
    known = [f"{group}.{name}" for group, fields in groups.items() for name in fields]
    if field not in known:
        nearest = difflib.get_close_matches(field, known, n=1, cutoff=0)
        raise ValueError(f"the space names the field {field!r}, which no run has: did you mean {nearest[0]!r}?")
    if field in _SAME_FOR_ALL or field.split(".")[0] in _SAME_FOR_ALL:
        flag = f"--{field.replace('_', '-')}"
        raise ValueError(f"the space names {field!r}, which is the same for all trials: give it as a flag ({flag})")


@dataclass(frozen=True)
class Point:
    """A combination for one trial."""

    values: Values
    settings: PretrainSettings
    generation: int = 0


@dataclass(frozen=True)
class Points:
    """All points that are known before the first trial starts."""

    points: list[Point]
    refused: list[str]
    """A message for each combination that is not valid."""


def grid(space: Space) -> Points:
    """Every combination, in order; equal ones appear once.

    Raises:
        ValueError: an axis is a range, or no combination is valid.
    """
    return _points(space, space.combinations(), None)


def random(space: Space, *, samples: int) -> Points:
    """Different random combinations, from the seed of the base settings; fewer than `samples` if no more exist.

    Raises:
        ValueError: no combination is valid.
    """
    draws = (space.draw(hash64("sweep", space.base.run.seed, place)) for place in range(samples * _TRIES))
    return _points(space, draws, samples)


def _points(space: Space, combinations: Iterable[Values], count: int | None) -> Points:
    points: dict[str, Point] = {}
    refused: dict[str, None] = {}
    for values in combinations:
        try:
            settings = space.settings(values)
        except ValueError as error:
            refused[f"{as_text(values)}: {error}"] = None
            continue
        points.setdefault(settings.canonical_json(), Point(values, settings))
        if len(points) == count:
            break
    if not points:
        first = next(iter(refused), "it has none")
        raise ValueError(f"no combination of the space is a valid run: {first}")
    return Points(list(points.values()), list(refused))


def suggest(space: Space, trials: Sequence[Trial], *, score: str) -> Point | None:
    """What to try next, by Optuna's tree-structured Parzen estimator.

    Args:
        space: space to choose from.
        trials: trials so far. Those without a score count as no better than the worst, so that trials that run at the
            same time are not close together.
        score: name of the score to raise.

    Returns:
        The next point, or None if nothing new was found.
    """
    import optuna  # takes 1 s: imported only if it is used

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {axis: _distribution(values) for axis, values in space.axes.items()}
    known = {str(trial.values) for trial in trials}
    for attempt in range(_TRIES):
        seed = hash64("sweep", space.base.run.seed, len(trials), attempt) % 2**32
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4, constant_liar=True, multivariate=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(
            _for_optuna(trial, space, distributions, score) for trial in trials if trial.status != "failed"
        )
        asked = study.ask(distributions).params
        values = {axis: _label(chosen, space.axes[axis]) for axis, chosen in asked.items()}
        if str(values) in known:
            continue
        with contextlib.suppress(ValueError):  # not valid
            return Point(values, space.settings(values))
    return None


def _distribution(axis: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(axis, Range):
        return CategoricalDistribution(range(len(axis.choices)))  # by place, as a value may be a list
    if axis.integer:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _label(chosen: Any, axis: Any) -> Any:
    return chosen if isinstance(axis, Range) else axis.labels[chosen]


def _for_optuna(trial: Trial, space: Space, distributions: dict[str, Any], score: str) -> Any:
    from optuna.trial import TrialState, create_trial

    params = {
        axis: trial.values[axis] if isinstance(values, Range) else values.labels.index(trial.values[axis])
        for axis, values in space.axes.items()
    }
    value = trial.scores.get(score) if trial.ended else None
    state = TrialState.RUNNING if value is None else TrialState.COMPLETE
    return create_trial(params=params, distributions=distributions, value=value, state=state)


@dataclass(frozen=True)
class Member:
    """A member of the next generation."""

    donor: Trial
    values: Values


def next_generation(space: Space, members: Sequence[Trial], *, score: str) -> list[Member]:
    """The next generation, in the order of this one.

    Args:
        space: in which the settings move.
        members: those of this generation, in order; those without a score are the worst.
        score: name of the score that chooses; higher is better.

    Returns:
        The members; an empty list if no member of this generation has a score.
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
    for _ in range(_TRIES):
        moved = {axis: _moved(values[axis], space.axes[axis], random) for axis in space.axes}
        with contextlib.suppress(ValueError):  # not valid
            space.settings(moved)
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
    # If a range is not logarithmic, a step is a share of its width. A factor would move 0.99 too far and 0 not at all.
    width = (axis.high - axis.low) * (_FACTOR - 1)
    near = value * (_FACTOR if up else 1 / _FACTOR) if axis.log else value + (width if up else -width)
    kept = min(max(near, axis.low), axis.high)
    return round(kept) if axis.integer else float(kept)
