"""A run is checked before anything begins: what does not fit is one sentence, and nothing is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dataset import make_data_set
from tests.train.test_step import changed
from vmoco.config import PretrainSettings
from vmoco.presets import PRESETS
from vmoco.train.run import close_run, introduce, open_run, prepare


@pytest.fixture
def settings(tmp_path: Path, vmoco_home: Path) -> PretrainSettings:
    """A run of `tiny` on clips of 10 frames of 40x48 pixels."""
    make_data_set(tmp_path / "data")
    return changed(PRESETS["tiny"][1], data={"uri": str(tmp_path / "data")}, run={"name": "tested"})


@pytest.mark.parametrize(
    ("group", "fields", "said"),
    [
        ("data", {"num_frames": 11}, r"--data\.num-frames 11 at --data\.stride 1 spans 11 frames, .* have 10: lower"),
        ("augment", {"size": 41}, r"--augment\.size 41 is larger than the stored frames of .*\(40x48\): lower it"),
        ("data", {"uri": ""}, r"--data\.uri is missing: give the data set"),
        ("run", {"name": "a/b"}, r"--run\.name 'a/b' is not allowed"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(
    settings: PretrainSettings, vmoco_home: Path, group: str, fields: dict[str, Any], said: str
) -> None:
    """One line, and nothing is left behind."""
    with pytest.raises(ValueError, match=said) as raised:
        prepare(changed(settings, **{group: fields}))
    assert "\n" not in str(raised.value)
    assert not vmoco_home.exists()


def test_name_of_a_run_belongs_to_its_architecture_and_data(settings: PretrainSettings, tmp_path: Path) -> None:
    """Once opened, the name takes neither another backbone nor other data; scaling may change."""
    run = open_run(prepare(settings))
    assert run.is_new
    with pytest.raises(ValueError, match=r"other settings \(--model\.backbone r3d_nano -> r2plus1d_nano\): set"):
        prepare(changed(settings, model={"backbone": "r2plus1d_nano"}))
    make_data_set(tmp_path / "other", num_videos=14)
    with pytest.raises(ValueError, match=r"belongs to a run on data set \w+, .*other is \w+: give --data\.uri as"):
        prepare(changed(settings, data={"uri": str(tmp_path / "other")}))
    again = open_run(prepare(changed(settings, scaling={"num_workers": 2})))
    assert not again.is_new
    assert again.run_id == run.run_id
    close_run(run, "models:/tested/1")
    assert prepare(settings).finished == "models:/tested/1"


def test_a_run_that_ended_where_it_was_told_to_goes_on_when_told_to_end_later(settings: PretrainSettings) -> None:
    """Ended at step 10 of 20: with the same end nothing is left to do; with a later one, or none, there is."""
    half = changed(settings, train={"stop_after": 10})
    close_run(open_run(prepare(half)), "models:/tested/1")
    assert prepare(half).finished == "models:/tested/1"
    assert prepare(changed(settings, train={"stop_after": 5})).finished
    assert prepare(changed(settings, train={"stop_after": 15})).finished is None
    assert prepare(settings).finished is None


def test_a_run_whose_checkpoints_cannot_be_scored_says_so_at_its_start(
    settings: PretrainSettings, tmp_path: Path
) -> None:
    """In place of how long a score takes; without evaluation nothing is said, and with enough videos the time."""
    warning = "warning: no checkpoint gets a score: 0 of 0 held-out videos have two clips that do not overlap in time"
    lines = introduce(open_run(prepare(settings)))
    (line,) = [line for line in lines if line.startswith(warning)]
    assert "--held-out-percent" in line
    assert not any(line.startswith("each checkpoint is scored") for line in lines)
    without = changed(settings, run={"name": "without"}, evaluation={"enabled": False})
    assert not any("score" in line for line in introduce(open_run(prepare(without))))
    enough = make_data_set(tmp_path / "enough", num_held_out=3)
    scored = changed(settings, run={"name": "scored"}, data={"uri": enough.uri})
    lines = introduce(open_run(prepare(scored)))
    assert any(line.startswith("each checkpoint is scored on 3 held-out videos") for line in lines)
    assert not any(line.startswith(warning) for line in lines)
