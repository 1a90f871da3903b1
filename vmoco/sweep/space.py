"""What a sweep tries: a list of points, each a full settings of a pretraining, known before the first trial starts.

The list is a pure function of the space and the run's seed. So the same sweep has the same trials whenever it is
submitted, and going on needs no state of the search.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from vmoco.config import PretrainSettings
from vmoco.seed import hash64

# Neither changes what an encoder learns, and the sweep sets them itself.
_NOT_TRIED = ("run.name", "run.storage", "data.uri", "tracking", "evaluation")

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
"""Spaces by name; t and its end are those of the preset, or of its flags."""


@dataclass(frozen=True)
class Point:
    """One trial."""

    values: dict[str, Any]
    """By axis of the space, what a person reads: a value, or the name of a choice."""
    settings: PretrainSettings


@dataclass(frozen=True)
class Plan:
    """All trials of a sweep."""

    points: list[Point]
    refused: list[str]
    """A sentence for each combination that no run can have."""


def load_space(name: str) -> dict[str, Any]:
    """The axes of a space: of a built-in name, or of a YAML file.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"--space {name!r} is neither a file nor a built-in space: write the path of a YAML file, or "
            f"{', '.join(BUILT_IN)}"
        )
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--space {name} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"--space {name} is empty: write one line per field, such as `moco.decay: [0.99, 1.0]`")
    return {str(axis): values for axis, values in found.items()}


def make_plan(
    space: Mapping[str, Any], base: PretrainSettings, *, search: Literal["grid", "random"], samples: int
) -> Plan:
    """The trials of a space, in order; equal ones once.

    Args:
        space: by axis: a list of values, {low, high, log} (random search alone), or {name: {field: value}}.
        base: what all trials share.
        search: every combination, or `samples` draws by the seed of `base`.
        samples: draws.

    Raises:
        ValueError: a field is unknown, an axis cannot be read, or no combination is a valid run.
    """
    axes = {axis: _choices(axis, values, base, search) for axis, values in space.items()}
    if search == "grid":
        combinations = [
            dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*(_listed(a) for a in axes.values()))
        ]
    else:
        combinations = [_draw(axes, hash64("sweep", base.run.seed, place)) for place in range(samples)]
    points: dict[str, Point] = {}
    refused = []
    for combination in combinations:
        fields = {field: value for _, change in combination.values() for field, value in change.items()}
        values = {axis: label for axis, (label, _) in combination.items()}
        try:
            settings = _changed(base, fields)
        except ValueError as error:
            refused.append(f"{_said(values)}: {error}")
            continue
        points.setdefault(settings.canonical_json(), Point(values, settings))
    if not points:
        raise ValueError(
            f"no combination of the space is a valid run: {refused[0]}" if refused else "the space has no combination"
        )
    return Plan(list(points.values()), refused)


Choice = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class _Range:
    field: str
    low: float
    high: float
    log: bool
    whole: bool


def _choices(axis: str, values: Any, base: PretrainSettings, search: str) -> list[Choice] | _Range:
    if isinstance(values, Sequence) and not isinstance(values, str):
        _check_field(axis, base)
        if not values:
            raise ValueError(f"axis {axis} of the space has no value: list some, or leave it out")
        return [(value, {axis: value}) for value in values]
    if isinstance(values, Mapping) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        _check_field(axis, base)
        return _range(axis, values, search)
    if isinstance(values, Mapping) and values and all(isinstance(change, Mapping) for change in values.values()):
        for field in {field for change in values.values() for field in change}:
            _check_field(field, base)
        return [(str(name), dict(change)) for name, change in values.items()]
    raise ValueError(
        f"axis {axis} of the space is {values!r}: write a list of values, {{low: A, high: B, log: true}}, or "
        "named choices {NAME: {FIELD: VALUE}}"
    )


def _range(axis: str, values: Mapping[str, Any], search: str) -> _Range:
    low, high, log = values["low"], values["high"], values.get("log", False)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not low < high or (log and low <= 0):
        raise ValueError(f"axis {axis} of the space has the range {low!r} to {high!r}: low must be a number below high")
    if search == "grid":
        raise ValueError(
            f"axis {axis} of the space is a range, and a grid needs a list: list values, or --search random"
        )
    return _Range(axis, low, high, bool(log), isinstance(low, int) and isinstance(high, int))


def _listed(axis: list[Choice] | _Range) -> list[Choice]:
    assert isinstance(axis, list), "a grid has been checked to have no range"
    return axis


def _draw(axes: Mapping[str, list[Choice] | _Range], seed: int) -> dict[str, Choice]:
    random = np.random.default_rng(seed)
    drawn: dict[str, Choice] = {}
    for name, axis in axes.items():
        if isinstance(axis, list):
            drawn[name] = axis[int(random.integers(len(axis)))]
            continue
        if axis.log:
            value = math.exp(random.uniform(math.log(axis.low), math.log(axis.high)))
        else:
            value = float(random.uniform(axis.low, axis.high))
        number = round(value) if axis.whole else value
        drawn[name] = (number, {axis.field: number})
    return drawn


def _check_field(field: str, base: PretrainSettings) -> None:
    field = field.replace("-", "_")
    groups = base.model_dump(exclude={"preset"})
    known = [f"{group}.{name}" for group, fields in groups.items() for name in fields]
    if field not in known:
        nearest = difflib.get_close_matches(field, known, n=1, cutoff=0)
        raise ValueError(f"the space names the field {field!r}, which no run has: did you mean {nearest[0]!r}?")
    if field in _NOT_TRIED or field.split(".")[0] in _NOT_TRIED:
        raise ValueError(f"the space names {field!r}, which is the same for all trials: give it as a flag")


def _changed(base: PretrainSettings, fields: Mapping[str, Any]) -> PretrainSettings:
    values = base.model_dump()
    for field, value in fields.items():
        group, _, name = field.replace("-", "_").partition(".")
        values[group][name] = value
    return PretrainSettings(**values)


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in values.items())
