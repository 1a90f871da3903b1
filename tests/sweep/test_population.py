"""Selection of a population: the worst copy the best and change a little; all follows from the seed."""

from __future__ import annotations

from vmoco.presets import PRESETS
from vmoco.sweep.record import Trial
from vmoco.sweep.search import next_generation
from vmoco.sweep.space import Space

SPACE = Space.read(
    {"moco.momentum": {"low": 0.5, "high": 0.9}, "generator.drop_ratio": [0.0, 0.25, 0.5, 0.75]}, PRESETS["tiny"][1]
)
SCORE = "score/retrieval"


def members(scores: list[float | None]) -> list[Trial]:
    """A generation; None is one that failed."""
    return [
        Trial(
            f"t-{place}",
            {"moco.momentum": 0.6 + place / 50, "generator.drop_ratio": 0.25},
            10,
            status="failed" if score is None else "finished",
            scores={} if score is None else {SCORE: score},
        )
        for place, score in enumerate(scores)
    ]


def test_the_worst_quarter_copies_the_best_and_changes() -> None:
    """Of eight, two descend from the two best with other values; six go on as they are."""
    before = members([0.1, 0.9, 0.5, 0.4, 0.3, 0.8, 0.6, 0.2])
    found = next_generation(SPACE, before, score=SCORE)
    assert [member.donor.name for place, member in enumerate(found) if place not in (0, 7)] == [
        trial.name for place, trial in enumerate(before) if place not in (0, 7)
    ]
    for place in (0, 7):
        assert found[place].donor in (before[1], before[5])
        assert found[place].values != found[place].donor.values
        assert 0.5 <= found[place].values["moco.momentum"] <= 0.9
        SPACE.settings(found[place].values)
    assert found == next_generation(SPACE, before, score=SCORE)


def test_one_that_failed_is_always_replaced_and_never_copied() -> None:
    """However many failed, all descend from those that finished; where none did, there is no next generation."""
    before = members([None, 0.3, None, None])
    found = next_generation(SPACE, before, score=SCORE)
    assert [member.donor for member in found] == [before[1]] * 4
    assert found[1].values == before[1].values
    assert next_generation(SPACE, members([None, None]), score=SCORE) == []


def test_changed_values_are_near() -> None:
    """Over many generations, a number moves by a fifth of its range or is drawn anew; a choice goes to a neighbour."""
    moves, choices = [], set()
    for generation in range(100):
        before = members([0.9, 0.1])
        for trial in before:
            trial.generation = generation
        found = next_generation(SPACE, before, score=SCORE)[1]
        moves.append(round(found.values["moco.momentum"] - before[0].values["moco.momentum"], 6))
        choices.add(found.values["generator.drop_ratio"])
    assert 50 < sum(abs(move) == 0.08 for move in moves) < 95
    assert choices == {0.0, 0.25, 0.5, 0.75}
