"""What a sweep may try: axes, of which each combination of values is the settings of a pretraining."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vmoco.config import PretrainSettings

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


Values = dict[str, Any]
"""By axis, what a person reads: a value, or the name of a choice."""


@dataclass(frozen=True)
class Choices:
    """An axis of some values; each has a label, and the fields that it sets."""

    choices: list[tuple[Any, dict[str, Any]]]

    @property
    def labels(self) -> list[Any]:
        """What a person reads of each."""
        return [label for label, _ in self.choices]

    def fields(self, label: Any) -> dict[str, Any]:
        """What a value sets."""
        return next(fields for own, fields in self.choices if own == label)

    def draw(self, random: np.random.Generator) -> Any:
        """Any, equally likely."""
        return self.choices[int(random.integers(len(self.choices)))][0]


@dataclass(frozen=True)
class Range:
    """An axis of all numbers between two."""

    field: str
    low: float
    high: float
    log: bool
    whole: bool

    def fields(self, label: Any) -> dict[str, Any]:
        """What a value sets."""
        return {self.field: label}

    def draw(self, random: np.random.Generator) -> Any:
        """Any, equally likely, or with equally likely logarithms."""
        if self.log:
            value = math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = float(random.uniform(self.low, self.high))
        return round(value) if self.whole else value


@dataclass(frozen=True)
class Space:
    """Axes over a base of settings that all trials share."""

    base: PretrainSettings
    axes: dict[str, Choices | Range]

    @staticmethod
    def read(space: Mapping[str, Any], base: PretrainSettings) -> Space:
        """Reads axes as a file has them.

        Args:
            space: by axis: a list of values, {low, high, log}, or {name: {field: value}}.
            base: what all trials share.

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
                    f"axis {axis} of the space is a range, and a grid needs a list: list values, or give "
                    "--search random or optuna"
                )
        labels = [values.labels for values in self.axes.values() if isinstance(values, Choices)]
        return (dict(zip(self.axes, chosen, strict=True)) for chosen in itertools.product(*labels))

    def draw(self, seed: int) -> Values:
        """A combination at random."""
        random = np.random.default_rng(seed)
        return {axis: values.draw(random) for axis, values in self.axes.items()}

    def settings(self, values: Mapping[str, Any]) -> PretrainSettings:
        """The pretraining of a combination.

        Raises:
            ValueError: no run can have it.
        """
        changed = self.base.model_dump()
        for axis, label in values.items():
            for field, value in self.axes[axis].fields(label).items():
                group, _, name = field.replace("-", "_").partition(".")
                changed[group][name] = value
        return PretrainSettings(**changed)


def said(values: Mapping[str, Any]) -> str:
    """A combination as words; numbers to four digits."""
    return ", ".join(f"{axis} {short(value)}" for axis, value in values.items())


def short(value: Any) -> str:
    """A value as a person reads it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    return {str(axis): _with_numbers(values) for axis, values in found.items()}


def _with_numbers(found: Any) -> Any:
    """What YAML found, with 1e-4 as a number: to YAML it is one only with a point, as 1.0e-4."""
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
    if field in _NOT_TRIED or field.split(".")[0] in _NOT_TRIED:
        raise ValueError(f"the space names {field!r}, which is the same for all trials: give it as a flag")
