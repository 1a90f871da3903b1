"""The trials of a sweep are known, checked and the same each time before the first starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmoco.presets import PRESETS
from vmoco.sweep.space import load_space, make_plan

BASE = PRESETS["tiny"][1]


def test_the_named_grid_has_all_sixteen_combinations() -> None:
    """Each ratio meets each kind of decay once, with the settings that its name says."""
    points = make_plan(load_space("ratio-decay"), BASE, search="grid", samples=1).points
    found = {(p.settings.generator.drop_ratio, p.values["decay"]) for p in points}
    assert found == {(r, d) for r in (0, 0.25, 0.5, 0.75) for d in ("none", "constant", "linear", "cosine")}
    for point in points:
        moco = point.settings.moco
        assert (moco.decay == 1) == (point.values["decay"] == "none")
        assert moco.decay_schedule == {"none": "constant"}.get(point.values["decay"], point.values["decay"])


def test_random_draws_follow_from_the_seed_and_stay_in_the_range() -> None:
    """The same seed gives the same trials, another gives others, none outside its range."""
    space = {"moco.momentum": {"low": 0.5, "high": 0.9}, "model.embedding-dim": {"low": 8, "high": 64, "log": True}}
    first, again = (make_plan(space, BASE, search="random", samples=20).points for _ in range(2))
    assert first == again
    other = BASE.model_copy(update={"run": BASE.run.model_copy(update={"seed": 1})})
    assert [p.values for p in make_plan(space, other, search="random", samples=20).points] != [p.values for p in first]
    assert all(0.5 <= p.settings.moco.momentum <= 0.9 and 8 <= p.settings.model.embedding_dim <= 64 for p in first)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"moco.decai": [1.0]}, "did you mean 'moco.decay'"),
        ({"moco.decay": []}, "has no value"),
        ({"moco.decay": [2.0]}, "no combination of the space is a valid run"),
        ({"moco.decay": {"low": 0.5, "high": 0.9}}, "--search random"),
        ({"data.uri": ["a", "b"]}, "give it as a flag"),
    ],
)
def test_a_bad_space_gets_a_sentence(space: dict[str, object], said: str) -> None:
    """What is wrong is named before any trial."""
    with pytest.raises(ValueError, match=said):
        make_plan(space, BASE, search="grid", samples=1)


def test_an_unknown_or_empty_file_is_refused(tmp_path: Path) -> None:
    """A name that is no space lists those that there are."""
    with pytest.raises(ValueError, match="ratio-decay"):
        load_space("nothing")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_space(str(tmp_path / "empty.yaml"))
