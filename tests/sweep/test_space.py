"""The trials of a sweep are known and checked before the first one starts, and depend only on the seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmoco.presets import PRESETS
from vmoco.sweep import space as spaces
from vmoco.sweep.record import Trial
from vmoco.sweep.space import Space, load_space, next_generation

BASE = PRESETS["tiny"][1]


def test_the_named_grid_has_all_sixteen_combinations() -> None:
    """Each ratio meets each kind of decay once, with the settings that its name says."""
    points = spaces.grid(Space.read(load_space("ratio-decay"), BASE)).points
    found = {(p.settings.generator.drop_ratio, p.values["decay"]) for p in points}
    assert found == {(r, d) for r in (0, 0.25, 0.5, 0.75) for d in ("none", "constant", "linear", "cosine")}
    for point in points:
        moco = point.settings.moco
        assert (moco.decay == 1) == (point.values["decay"] == "none")
        assert moco.decay_schedule == {"none": "constant"}.get(point.values["decay"], point.values["decay"])


def test_random_draws_follow_from_the_seed_and_stay_in_the_range() -> None:
    """The same seed gives the same trials, another gives others, none outside its range."""
    axes = {"moco.momentum": {"low": 0.5, "high": 0.9}, "model.embedding-dim": {"low": 8, "high": 64, "log": True}}
    first, again = (spaces.random(Space.read(axes, BASE), samples=20).points for _ in range(2))
    assert first == again
    assert len(first) == 20
    other = BASE.model_copy(update={"run": BASE.run.model_copy(update={"seed": 1})})
    assert [p.values for p in spaces.random(Space.read(axes, other), samples=20).points] != [p.values for p in first]
    assert all(0.5 <= p.settings.moco.momentum <= 0.9 and 8 <= p.settings.model.embedding_dim <= 64 for p in first)


def test_random_draws_of_a_small_space_are_each_tried_once() -> None:
    """More samples than there are combinations: every combination, none twice."""
    points = spaces.random(Space.read({"moco.decay": [0.9, 0.99, 1.0]}, BASE), samples=10).points
    assert sorted(point.settings.moco.decay for point in points) == [0.9, 0.99, 1.0]


def test_combinations_that_no_run_can_have_are_left_out_with_a_reason() -> None:
    """The others are tried; the reason names the combination."""
    found = spaces.grid(Space.read({"moco.decay": [0.9, 2.0], "generator.drop_ratio": [0.0, 0.5]}, BASE))
    assert [point.values["moco.decay"] for point in found.points] == [0.9, 0.9]
    assert len(found.refused) == 2
    assert "moco.decay 2, generator.drop_ratio 0.5" in found.refused[1]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"moco.decai": [1.0]}, "did you mean 'moco.decay'"),
        ({"moco.decay": []}, "has no value"),
        ({"moco.decay": [2.0]}, "no combination of the space is a valid run"),
        ({"moco.decay": {"low": 0.5, "high": 0.9}}, "--search random"),
        ({"moco.decay": {"low": 0.9, "high": 0.5}}, "low must be a number below high"),
        ({"data.uri": ["a", "b"]}, "give it as a flag"),
    ],
)
def test_a_bad_space_is_refused_with_a_message(axes: dict[str, object], message: str) -> None:
    """What is wrong is named before any trial."""
    with pytest.raises(ValueError, match=message):
        spaces.grid(Space.read(axes, BASE))


def test_a_file_may_write_numbers_as_people_do(tmp_path: Path) -> None:
    """1e-4 is a number, as a value and as the end of a range; words stay words."""
    path = tmp_path / "space.yaml"
    path.write_text("train.learning-rate: {low: 1e-4, high: 1e-2, log: true}\nmoco.decay: [1e-1]\nmoco.fill: [mean]")
    axes = load_space(str(path))
    assert axes["train.learning-rate"] == {"low": 1e-4, "high": 1e-2, "log": True}
    assert axes["moco.decay"] == [0.1]
    assert axes["moco.fill"] == ["mean"]


def test_an_unknown_or_empty_file_is_refused(tmp_path: Path) -> None:
    """A name that is no space lists those that there are."""
    with pytest.raises(ValueError, match="ratio-decay"):
        load_space("nothing")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_space(str(tmp_path / "empty.yaml"))


def optimise(space: Space, count: int) -> list[float]:
    """Scores of trials that Optuna chose one after the other; the best is at momentum 0.8 and a ratio of 0.5."""
    trials: list[Trial] = []
    while len(trials) < count and (point := spaces.suggest(space, trials, score="score/retrieval")):
        score = 1 - abs(point.values["moco.momentum"] - 0.8) - abs(point.values["generator.drop_ratio"] - 0.5)
        trials.append(Trial(str(len(trials)), point.values, 1, status="finished", scores={"score/retrieval": score}))
    return [trial.scores["score/retrieval"] for trial in trials]


def test_optuna_learns_from_the_scores_and_follows_from_the_seed() -> None:
    """Late trials score better than early ones and than random draws; the same history gives the same next trial."""
    space = Space.read(
        {"moco.momentum": {"low": 0.1, "high": 0.9}, "generator.drop_ratio": [0.0, 0.25, 0.5, 0.75]}, BASE
    )
    scores = optimise(space, 30)
    assert scores == optimise(space, 30)
    assert sum(scores[-10:]) / 10 > sum(scores[:10]) / 10 + 0.1
    drawn = [p.values for p in spaces.random(space, samples=30).points]
    plain = [1 - abs(v["moco.momentum"] - 0.8) - abs(v["generator.drop_ratio"] - 0.5) for v in drawn]
    assert sum(scores) > sum(plain)


def test_optuna_ends_where_all_has_been_tried() -> None:
    """A space of three values gives three trials, none twice."""
    space = Space.read({"moco.momentum": [0.7, 0.8, 0.9], "generator.drop_ratio": [0.5]}, BASE)
    assert len(set(optimise(space, 10))) == 3


POPULATION = Space.read(
    {"moco.momentum": {"low": 0.5, "high": 0.9}, "generator.drop_ratio": [0.0, 0.25, 0.5, 0.75]}, BASE
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
    """Of eight members, two descend from the two best, with other values; six continue unchanged."""
    before = members([0.1, 0.9, 0.5, 0.4, 0.3, 0.8, 0.6, 0.2])
    found = next_generation(POPULATION, before, score=SCORE)
    assert [member.donor.name for place, member in enumerate(found) if place not in (0, 7)] == [
        trial.name for place, trial in enumerate(before) if place not in (0, 7)
    ]
    for place in (0, 7):
        assert found[place].donor in (before[1], before[5])
        assert found[place].values != found[place].donor.values
        assert 0.5 <= found[place].values["moco.momentum"] <= 0.9
        POPULATION.settings(found[place].values)
    assert found == next_generation(POPULATION, before, score=SCORE)


def test_one_that_failed_is_always_replaced_and_never_copied() -> None:
    """All members descend from finished ones, however many failed; if none finished, there is no next generation."""
    before = members([None, 0.3, None, None])
    found = next_generation(POPULATION, before, score=SCORE)
    assert [member.donor for member in found] == [before[1]] * 4
    assert found[1].values == before[1].values
    assert next_generation(POPULATION, members([None, None]), score=SCORE) == []


def test_changed_values_are_near() -> None:
    """Over many generations, a number moves by a fifth of its range or is drawn anew; a choice moves to a neighbour."""
    moves, choices = [], set()
    for generation in range(100):
        before = members([0.9, 0.1])
        for trial in before:
            trial.generation = generation
        found = next_generation(POPULATION, before, score=SCORE)[1]
        moves.append(round(found.values["moco.momentum"] - before[0].values["moco.momentum"], 6))
        choices.add(found.values["generator.drop_ratio"])
    assert 50 < sum(abs(move) == 0.08 for move in moves) < 95
    assert choices == {0.0, 0.25, 0.5, 0.75}
