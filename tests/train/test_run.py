"""A run is checked before anything begins: what does not fit is one sentence, and nothing is made."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_clip_index import write_again
from tests.data.test_clip_scores import with_scores
from tests.dataset import make_data_set
from tests.made import clips, encoder_of
from tests.train.test_loop import Notes
from tests.train.test_step import CPU, changed
from vmoco import tracking
from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.encoders import package
from vmoco.presets import PRESETS
from vmoco.train.loop import train
from vmoco.train.run import Run, close_run, introduce, open_run, prepare
from vmoco.train.run_folder import RunFolder
from vmoco.train.state import STATE_TENSORS, TrainState, checkpoint_bytes
from vmoco.train.step import TrainStep


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


def test_checkpoints_that_do_not_fit_are_refused(settings: PretrainSettings) -> None:
    """Before the run begins: the message has what is free, what is needed, and the flags to lower."""
    many = changed(settings, train={"keep_checkpoints": 10**12})
    said = (
        r"--run\.storage .* has [\d.]+ [GM]B free, .* needs [\d.]+ GB more: .* --train\.keep-checkpoints 1000000000000 "
    )
    with pytest.raises(ValueError, match=said):
        prepare(many)
    lines = introduce(open_run(prepare(settings)))
    assert [
        line for line in lines if re.fullmatch(r"checkpoints: 4 checkpoints at most, [\d.]+ MB each; .* are free", line)
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_size_of_a_checkpoint_is_known_before(settings: PretrainSettings, tmp_path: Path, optimizer: str) -> None:
    """It is that of the file after a step of both optimizers, up to its header."""
    chosen = changed(settings, train={"optimizer": optimizer}, generator={"start_percent": 0})
    manifest = prepare(chosen).mixture
    state = TrainState(chosen, manifest_hash=manifest.hash, device=CPU)
    TrainStep(chosen, state, CPU)(Loader(manifest, chosen, rank=0, world_size=1).batch(0))
    state.save(tmp_path)
    real = (tmp_path / STATE_TENSORS).stat().st_size
    assert 0.97 * real < checkpoint_bytes(chosen) <= real


def test_a_run_of_another_version_is_named_in_plain_words(settings: PretrainSettings, vmoco_home: Path) -> None:
    """The message has the run, the flag and what to do, without pydantic's words around it."""
    folder = RunFolder(str(vmoco_home / "runs" / "tested"))
    folder.write_run({"settings": {"moco": {"queue_length": 64}}})
    with pytest.raises(
        ValueError, match=r"settings of run 'tested': --moco\.queue-length does not exist: did"
    ) as raised:
        prepare(settings)
    assert "Value error" not in str(raised.value)
    assert str(raised.value).endswith("or give another --run.name")


def test_a_run_that_ended_where_it_was_told_to_goes_on_when_told_to_end_later(settings: PretrainSettings) -> None:
    """Ended at step 10 of 20: with the same end nothing is left to do; with a later one, or none, there is."""
    half = changed(settings, train={"stop_after": 10})
    close_run(open_run(prepare(half)), "models:/tested/1")
    assert prepare(half).finished == "models:/tested/1"
    assert prepare(changed(settings, train={"stop_after": 5})).finished
    assert prepare(changed(settings, train={"stop_after": 15})).finished is None
    assert prepare(settings).finished is None


def new_state(run: Run) -> TrainState:
    return TrainState(run.settings, manifest_hash=run.mixture.hash, device=CPU)


@pytest.fixture
def trunk(settings: PretrainSettings, tmp_path: Path) -> Path:
    """A checkpoint after 3 steps of `tiny` on the data set of `settings`."""
    short = changed(settings, train={"stop_after": 3})
    prepared = prepare(short)
    state = TrainState(prepared.settings, manifest_hash=prepared.mixture.hash, device=CPU)
    train(prepared.settings, prepared.mixture, state, device=CPU, host=Notes())
    place = tmp_path / "trunk" / "step-00000003"
    place.mkdir(parents=True)
    state.save(place, run_id="run of the trunk")
    return place


def test_a_new_cycle_outlives_its_trunk_and_a_kill(settings: PretrainSettings, trunk: Path, tmp_path: Path) -> None:
    """On other data, with the trunk deleted once the run is open: restarted before its first checkpoint, and resumed
    from one, it ends with the bits of the run that was not interrupted. Tags and log say where it began.
    """
    make_data_set(tmp_path / "other", num_videos=14)
    settings = changed(
        settings,
        run={"name": "cycle"},
        data={"uri": str(tmp_path / "other")},
        model={"init": str(trunk)},
        train={"steps": 6, "optimizer": "adamw", "learning_rate": 0.001},
    )
    run = open_run(prepare(settings))
    shutil.rmtree(trunk)
    tags = tracking.client().get_run(run.run_id).data.tags
    assert (tags["vmoco.init"], tags["vmoco.init_step"]) == (str(trunk), "3")
    assert (tags["vmoco.init_run_id"], len(tags["vmoco.init_sha256"])) == ("run of the trunk", 64)
    line = f"starts from the checkpoint {trunk}, step 3: keeps both encoders with their heads, and the generator; new"
    assert any(found.startswith(line) for found in introduce(run))

    folder, straight = RunFolder(run.folder), new_state(run)
    folder.restore(straight)
    assert straight.step == 0
    assert train(run.settings, run.mixture, straight, device=CPU, host=Notes())

    again = open_run(prepare(settings))
    assert (again.is_new, again.run_id) == (False, run.run_id)
    assert any(found.startswith(line) for found in introduce(again))
    killed = new_state(again)
    folder.restore(killed)
    assert not train(run.settings, run.mixture, killed, device=CPU, host=Notes(stop_after=3))
    place = Path(folder.checkpoint_uri(killed.step))
    place.mkdir()
    killed.save(place)
    resumed = new_state(again)
    folder.restore(resumed)
    assert resumed.step == 4
    assert train(run.settings, run.mixture, resumed, device=CPU, host=Notes())
    expected, found = straight.tensors(), resumed.tensors()
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"backbone": "r2plus1d_nano"}, r"--model\.backbone r3d_nano -> r2plus1d_nano\): set these as they were"),
        ({"head": "mlp"}, r"--model\.init \S+ has other encoders \(--model\.head linear -> mlp\)"),
        (
            {"init": "/nowhere"},
            r"--model\.init /nowhere is neither an encoder nor a checkpoint: it has no encoder\.json",
        ),
    ],
)
def test_a_new_cycle_that_does_not_fit_is_refused_before_any_work(
    settings: PretrainSettings, trunk: Path, vmoco_home: Path, fields: dict[str, Any], said: str
) -> None:
    """Other encoders than those of the checkpoint, or nothing there."""
    with pytest.raises(ValueError, match=said):
        prepare(changed(settings, run={"name": "cycle"}, model={"init": str(trunk)} | fields))
    made = {path.relative_to(vmoco_home).parts[0] for path in vmoco_home.rglob("*") if path.is_file()}
    assert made <= {"cache"}


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


def test_a_window_that_saves_nothing_is_reported_at_the_start(settings: PretrainSettings) -> None:
    """On a disk it costs randomness and saves no request."""
    lines = introduce(open_run(prepare(changed(settings, data={"shuffle_window": 3}))))
    assert any(line.startswith("warning: --data.shuffle-window 3 saves requests to a store") for line in lines)
    assert not any(
        "shuffle-window" in line for line in introduce(open_run(prepare(changed(settings, run={"name": "b"}))))
    )


def test_pairs_that_may_hold_two_shots_are_reported_at_the_start(settings: PretrainSettings) -> None:
    """How many videos do not know their shots, where pairs are of two clips; nothing once all know them."""
    manifest = Manifest.load(settings.data.uri[0])
    runs = iter("abcd")

    def said(**data: Any) -> list[str]:
        chosen = changed(settings, data=data, run={"name": next(runs)})
        return [line for line in introduce(open_run(prepare(chosen))) if "shots" in line]

    assert said() == []
    (line,) = said(positives="two_clips")
    videos = manifest.counts["videos"] - manifest.counts["held_out"]
    assert line.startswith(f"warning: --data.positives two_clips: the shots of {videos} of the {videos} training")
    write_again(manifest, with_scores(manifest).table)
    assert said(positives="two_clips") == []


def test_a_setting_without_effect_is_reported_at_the_start_and_the_run_resumes(settings: PretrainSettings) -> None:
    """One warning for each, with the setting that makes it so; the same when the run is resumed."""
    unused = changed(settings, moco={"decay_end": 0.5}, train={"optimizer": "adamw", "sgd_momentum": 0.5})
    expected = [
        "warning: --moco.decay-end 0.5 has no effect, because --moco.decay-schedule is constant",
        "warning: --train.sgd-momentum 0.5 has no effect, because --train.optimizer is adamw",
    ]
    for is_new in (True, False):
        run = open_run(prepare(unused))
        assert run.is_new == is_new
        assert [line for line in introduce(run) if "has no effect" in line] == expected


def test_a_transformer_is_introduced_as_one(settings: PretrainSettings) -> None:
    """With SGD the start warns and names what to set; clips of one micro-batch do not tell each other's keys apart.

    With a backbone that has batch normalisation the second is a warning, and the first is not there.
    """

    def said(name: str, **groups: dict[str, Any]) -> tuple[bool, bool]:
        changes = {"model": {}, "train": {"micro_batch": 8}} | groups
        lines = introduce(open_run(prepare(changed(settings, run={"name": name}, **changes))))
        return any("is a transformer, which" in line for line in lines), any(
            "lets the encoder cheat" in line for line in lines
        )

    swin = {"backbone": "swin3d_nano"}
    assert said("cnn") == (False, True)
    assert said("sgd", model=swin) == (True, False)
    assert said("adamw", model=swin, train={"micro_batch": 8, "optimizer": "adamw"}) == (False, False)


@pytest.mark.parametrize(
    ("generator", "expected"),
    [
        ({"start_percent": 50.0}, "; the generator drops 2 of 8 frames from step 10; "),
        ({"start_percent": 100.0, "before_start": "random"}, "; 2 of 8 frames are dropped at random, without a gen"),
        ({"start_percent": 100.0, "before_start": "whole"}, "; no frame is dropped; "),
        ({"drop_ratio": 0.0}, "; no frame is dropped; "),
    ],
)
def test_the_first_lines_say_which_frames_are_dropped(
    settings: PretrainSettings, generator: dict[str, Any], expected: str
) -> None:
    """By the generator from a step on, at random, or none."""
    lines = introduce(open_run(prepare(changed(settings, generator=generator))))
    assert sum(expected in line for line in lines) == 1


@pytest.mark.parametrize(
    ("steps", "momentum", "expected"),
    [
        (400, 0.99, "within 100 steps, which is 25% of this run; .* lower it to about 0.9 "),
        (4000, 0.999, "within 1,000 steps, which is 25% of this run; .* lower it to about 0.99 "),
        (200_000, 0.99999, "within 100,000 steps, which is 50% of this run; .* lower it to about 0.9998 "),
        (2000, 0.995, None),  # a tenth of the run
        (20, 0.9, None),  # no run of so few steps is for its encoder
        (187_500, 0.999, None),
    ],
)
def test_a_key_encoder_too_slow_for_the_run_is_named(
    settings: PretrainSettings, steps: int, momentum: float, expected: str | None
) -> None:
    """The first lines say how much of the run it lags behind, and advise a momentum of which they do not warn."""

    def said(momentum: float) -> list[str]:
        chosen = changed(settings, run={"name": f"{momentum}"}, train={"steps": steps}, moco={"momentum": momentum})
        return [line for line in introduce(open_run(prepare(chosen))) if "key encoder follows" in line]

    if expected is None:
        assert said(momentum) == []
        return
    (line,) = said(momentum)
    assert re.search(expected, line)
    advised = re.search(r"about ([0-9.]+) ", line)
    assert advised
    assert said(float(advised[1])) == []


def test_positions_of_other_clips_are_no_start(settings: PretrainSettings, tmp_path: Path) -> None:
    """An mvit_v2_s for 6 frames is refused where a run trains on 8, with both; a swin3d is taken."""
    for name in ("mvit_v2_s", "swin3d_nano"):
        encoder = encoder_of(name, num_frames=6)
        place = tmp_path / name
        place.mkdir()
        lineage = {"step": 1, "run_id": None, "data": {}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(package, "write_program", lambda encoder, folder: None)
            package.write_folder(place, encoder.backbone, name, encoder.preprocessing, lineage=lineage)
        assert torch.equal(
            package.load_encoder(str(place)).embed(clips(num_frames=6)), encoder.embed(clips(num_frames=6))
        )
        run = prepare(changed(settings, run={"name": name}, model={"init": str(place), "backbone": name}))
        if name == "mvit_v2_s":
            with pytest.raises(
                ValueError, match=r"of 6 frames of 32 pixels, .* trains on 8 of 32: set --data\.num-frames 6 and"
            ):
                open_run(run)
        else:
            assert open_run(run).start == f"the encoder {place}"


def test_the_tracker_knows_data_set_and_commit(settings: PretrainSettings) -> None:
    """MLflow shows the data set as an input of the run, with its hash, counts and place; preset and commit are tags."""
    run = open_run(prepare(settings))
    manifest = run.mixture.manifests[0]
    kept = tracking.client().get_run(run.run_id)
    (entry,) = kept.inputs.dataset_inputs
    data = entry.dataset
    assert (data.name, data.digest, data.source_type) == (Path(manifest.uri).name, manifest.hash, "local")
    assert json.loads(data.source) == {"uri": manifest.uri}
    assert json.loads(data.profile) == manifest.counts
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]
    command = ["git", "-C", str(Path(__file__).parents[2]), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert kept.data.tags["mlflow.source.git.commit"].removesuffix("+") == commit
    assert kept.data.tags["vmoco.preset"] == "tiny"
