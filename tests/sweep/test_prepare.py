"""Before Ray starts, a sweep refuses what cannot work, and finds what was done before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dataset import make_data_set
from tests.train.test_step import CPU, changed
from vmoco.config import PretrainSettings
from vmoco.job_settings import SweepSettings
from vmoco.presets import PRESETS
from vmoco.sweep.prepare import PreparedSweep, prepare
from vmoco.train.run import close_run, open_run
from vmoco.train.run_folder import RunFolder
from vmoco.train.state import TrainState
from vmoco.unused_settings import unused_settings

SPACE = {"moco.decay": {"low": 0.9, "high": 1.0}}


@pytest.fixture
def population(tmp_path: Path, tracker_home: Path) -> SweepSettings:
    """A population of three members of `tiny` with a selection at step 10 of 20."""
    make_data_set(tmp_path / "data", clips_per_video=4, num_held_out=4)
    (tmp_path / "space.yaml").write_text(json.dumps(SPACE))
    pretrain = changed(PRESETS["tiny"][1], data={"uri": str(tmp_path / "data")}, run={"name": "tested"})
    return SweepSettings(
        space=str(tmp_path / "space.yaml"), search="random", samples=3, scheduler="pbt", pbt_steps=10, pretrain=pretrain
    )


def end(prepared: PreparedSweep, place: int, score: float) -> None:
    """Ends a trial, with a checkpoint."""
    trial, run = prepared.sweep.trials[place], prepared.runs[place]
    folder = Path(RunFolder(run.folder).checkpoint_uri(trial.steps))
    folder.mkdir(parents=True)
    state = TrainState(run.settings, manifest_hash=run.mixture.hash, device=CPU)
    state.step = trial.steps
    record = state.snapshot().write(folder)
    assert record.step == trial.steps
    close_run(open_run(run), str(folder))
    trial.status, trial.step, trial.scores = "finished", trial.steps, {"score/retrieval": score}


def test_a_generation_goes_on_from_the_best_and_is_found_again(population: SweepSettings) -> None:
    """A failed member copies the best; it is not tried again in its old generation, and its reason is kept."""
    prepared = prepare(population)
    assert [trial.steps for trial in prepared.sweep.trials] == [10, 10, 10]
    end(prepared, 0, 0.5)
    end(prepared, 1, 0.9)
    prepared.sweep.trials[2].status, prepared.sweep.trials[2].reason = "failed", "it was lost"
    assert prepared.next_generation()
    assert prepared.refused == []
    assert [trial.steps for trial in prepared.sweep.trials[3:]] == [20, 20, 20]
    again = prepare(population)
    assert again.sweep.trials == prepared.sweep.trials
    assert again.waiting() == [3, 4, 5]
    assert (again.sweep.trials[2].status, again.sweep.trials[2].reason) == ("failed", "it was lost")
    assert Path(again.runs[5].settings.run.fork or "").parent.name == "tested-001"


def test_a_population_starts_from_a_checkpoint_once(population: SweepSettings, tmp_path: Path) -> None:
    """The first generation starts from the networks of --model.init; the next one only continues its donors."""
    trunk = tmp_path / "step-00000000"
    trunk.mkdir()
    TrainState(population.pretrain, manifest_hash="data of the trunk", device=CPU).save(trunk)
    pretrain = changed(population.pretrain, model={"init": str(trunk)})
    prepared = prepare(population.model_copy(update={"pretrain": pretrain}))
    for place in range(3):
        end(prepared, place, 0.5)
    assert prepared.next_generation()
    began = [(run.settings.model.init, bool(run.settings.run.fork)) for run in prepared.runs]
    assert began == [(str(trunk), False)] * 3 + [(None, True)] * 3
    for run in prepared.runs:
        PretrainSettings.model_validate_json(run.settings.canonical_json())  # as a worker reads them


def test_a_generation_whose_donors_are_gone_ends_the_sweep_with_a_reason(population: SweepSettings) -> None:
    """If no donor has a checkpoint, there is no next generation, and the reasons are kept."""
    prepared = prepare(population)
    for trial in prepared.sweep.trials:
        trial.status, trial.scores = "finished", {"score/retrieval": 0.5}
    assert not prepared.next_generation()
    assert all("is not a checkpoint" in reason for reason in prepared.refused)
    assert len(prepared.refused) == 3


def test_a_trial_that_failed_is_tried_again_where_nobody_went_on_from_it(population: SweepSettings) -> None:
    """Submitted again, it waits, as one does that was running when the driver died; one that has ended does not."""
    prepared = prepare(population)
    end(prepared, 0, 0.5)
    prepared.sweep.trials[1].status, prepared.sweep.trials[1].reason = "failed", "it was lost"
    prepared.sweep.trials[2].status = "running"
    prepared.sweep.save()
    assert prepare(population).waiting() == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 1}, "with --samples 1: give .*--samples 2 or more"),
        ({"search": "grid"}, "--search random"),
        ({"pbt_steps": 20}, "leaves a single generation"),
        ({"metric": "knn"}, "needs labelled clips"),
        ({"metric": "speed"}, "--metric speed cannot be measured: the data set has 12 videos, and motion needs 20"),
        ({"space": "elsewhere"}, "neither a file nor a built-in"),
    ],
)
def test_bad_flags_are_refused_with_a_message(
    population: SweepSettings, change: dict[str, object], message: str
) -> None:
    """Before anything is made."""
    with pytest.raises(ValueError, match=message):
        prepare(SweepSettings.model_validate(population.model_dump() | change))


def test_a_sweep_by_a_motion_probe_measures_it(population: SweepSettings, tmp_path: Path) -> None:
    """Its trials set --evaluation.motion; clips that are too short for three speeds are refused with the advice."""
    make_data_set(tmp_path / "long", num_videos=20, clips_per_video=3, num_held_out=10, num_frames=16)
    make_data_set(tmp_path / "short", num_videos=20, clips_per_video=3, num_held_out=10, num_frames=8)

    def by_order(data: str) -> SweepSettings:
        pretrain = changed(population.pretrain, data={"uri": str(tmp_path / data)})
        return population.model_copy(update={"metric": "order", "pretrain": pretrain})

    prepared = prepare(by_order("long"))
    assert prepared.sweep.score == "score/order"
    assert all(run.settings.evaluation.motion for run in prepared.runs)
    assert not population.pretrain.evaluation.motion
    with pytest.raises(ValueError, match=r"playback speed is left out: stored clips have 8 frames.*--num-frames 29"):
        prepare(by_order("short"))


def test_a_population_cannot_change_its_tensors(population: SweepSettings, tmp_path: Path) -> None:
    """Members continue from the state of others, so all need the same length of the queue."""
    (tmp_path / "space.yaml").write_text(json.dumps({"moco.queue-size": [64, 128]}))
    with pytest.raises(ValueError, match=r"names moco\.queue_size, which cannot change within a run"):
        prepare(population)


def test_the_name_of_a_sweep_belongs_to_its_space(population: SweepSettings, tmp_path: Path) -> None:
    """Another space under the same name is refused."""
    prepare(population).sweep.save()
    (tmp_path / "space.yaml").write_text(json.dumps({"moco.decay": [0.9, 1.0]}))
    with pytest.raises(ValueError, match="belongs to a sweep with another space"):
        prepare(population)


def test_a_trial_reports_no_setting_that_the_sweep_uses(population: SweepSettings) -> None:
    """A trial registers nothing, and does not say that the alias for the best encoder has no effect."""
    named = changed(population.pretrain, tracking={"register_as": "mine", "alias": "best-of-march"})
    prepared = prepare(population.model_copy(update={"pretrain": named}))
    assert prepared.runs[0].settings.tracking.register_as is None
    assert unused_settings(prepared.runs[0].settings) == []


def test_the_weights_of_data_sets_can_be_swept(tmp_path: Path, tracker_home: Path) -> None:
    """Each trial mixes the same sets by other weights; a space that leaves a set without weight has no such trial."""
    make_data_set(tmp_path / "films", num_videos=14, num_held_out=4)
    make_data_set(tmp_path / "sports", num_videos=9, num_frames=12, num_held_out=3)
    (tmp_path / "space.yaml").write_text("data.weights: [[0.5, 0.5], [0.8, 0.2], [1.0, 0.0]]")
    uris = [str(tmp_path / name) for name in ("films", "sports")]
    pretrain = changed(PRESETS["tiny"][1], data={"uri": uris}, run={"name": "tested"})
    prepared = prepare(SweepSettings(space=str(tmp_path / "space.yaml"), pretrain=pretrain))
    assert [run.settings.data.weights for run in prepared.runs] == [(0.5, 0.5), (0.8, 0.2)]
    assert len({run.settings.content_hash() for run in prepared.runs}) == 2
    (refused,) = prepared.refused
    assert "--data.weights 1 0 is not allowed: each weight must be above 0" in refused
