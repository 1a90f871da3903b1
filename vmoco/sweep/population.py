"""Population-based training (Jaderberg et al., 2017): it finds a schedule of settings rather than one value of each.

A population trains side by side for some steps: a generation. Then the worst take the training state of one of the
best and settings near to its own, and all go on. A member of the next generation is a run of its own that begins from
the last checkpoint of its donor, which is itself where it was not among the worst.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vmoco.seed import hash64
from vmoco.sweep.ledger import Trial
from vmoco.sweep.space import Choices, Range, Space, Values

_SHARE = 0.25
"""Of the population, how many are replaced and how many are copied."""
_RESAMPLE = 0.25
"""How often a setting is drawn anew instead of moved."""
_FACTOR = 1.2
_TRIES = 64


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
    for _ in range(_TRIES):
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
