"""A run on several data sets: it is introduced, tracked, resumed, scored and exported as what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.dataset import make_data_set, training_clips
from tests.train.test_loop import Notes
from tests.train.test_step import CPU, changed
from vmoco import tracking
from vmoco.config import PretrainSettings
from vmoco.data.mixture import Mixture
from vmoco.encoders import model_card, package
from vmoco.evaluate.mixture_score import joined_numbers, joined_score, score_mixture
from vmoco.evaluate.score import TooFewVideosError, score_encoder
from vmoco.presets import PRESETS
from vmoco.train import replay
from vmoco.train.loop import train
from vmoco.train.publish import encoder_in, write_encoder
from vmoco.train.replay_file import ReplayFile
from vmoco.train.run import introduce, open_run, prepare
from vmoco.train.state import TrainState


@pytest.fixture
def settings(tmp_path: Path, vmoco_home: Path) -> PretrainSettings:
    """A run of `tiny` on two sets of clips of different size and length, each with held-out videos."""
    make_data_set(tmp_path / "films", num_videos=14, num_held_out=4, labels=("a", "b"))
    make_data_set(tmp_path / "sports", num_videos=9, num_frames=12, height=44, clips_per_video=3, num_held_out=3)
    uris = [str(tmp_path / name) for name in ("films", "sports")]
    return changed(PRESETS["tiny"][1], data={"uri": uris, "weights": [3.0, 1.0]}, run={"name": "mixed"})


def test_a_mixture_is_introduced_and_tracked(settings: PretrainSettings) -> None:
    """Each set with its share, its epochs and what it shares with the other; MLflow has one input for each."""
    run = open_run(prepare(settings))
    lines = introduce(run)
    draws = run.settings.last_step * run.settings.train.global_batch
    # 14 - 4 videos of the first set; 6, 7 and 8 of them have the content of videos that the second holds out.
    (films,) = [line for line in lines if line.startswith("films: ")]
    assert films == f"films: 75.0% of the draws, {0.75 * draws / 7:.1f} epochs of its own; 14 clips of 7 videos, " + (
        "10 frames of 40x48"
    )
    (shared,) = [line for line in lines if "count twice" in line]
    assert re.match(
        r"9 videos are both in .*films and in .*sports, .*; 3 of them are held out in one of the two", shared
    )
    (left_out,) = [line for line in lines if "left out of training" in line]
    assert "(what another data set holds out)" in left_out
    inputs = tracking.client().get_run(run.run_id).inputs.dataset_inputs
    assert {each.dataset.name for each in inputs} == {"films", "sports"}
    assert {each.dataset.digest for each in inputs} == {each.hash for each in run.mixture.manifests}


def test_losses_are_told_apart_and_a_resumed_run_ends_with_the_same_bits(
    settings: PretrainSettings, tmp_path: Path
) -> None:
    """The mean loss is that of the sets by their clips; a run that was stopped goes on exactly."""
    run = open_run(prepare(changed(settings, train={"log_every": 1})))
    straight = TrainState(run.settings, manifest_hash=run.mixture.hash, device=CPU)
    host = Notes()
    assert train(run.settings, run.mixture, straight, device=CPU, host=host)
    last, before, apart = max(host.points), [0.0, 0.0], 0
    assert sorted(host.points) == list(range(1, last + 1))
    for step, numbers in sorted(host.points.items()):
        drawn = [numbers[f"clips_of_{name}"] for name in ("films", "sports")]
        assert sum(drawn) == step * run.settings.train.global_batch
        losses = [numbers.get(f"loss_of_{name}", 0.0) for name in ("films", "sports")]
        assert numbers["loss"] == pytest.approx(float(np.average(losses, weights=np.subtract(drawn, before))), rel=1e-5)
        before, apart = drawn, apart + (losses[0] != losses[1])
    assert apart > last / 2
    np.testing.assert_allclose(host.points[last]["clips_of_films"] / sum(drawn), 0.75, atol=0.01)
    assert host.points[last]["epoch_of_films"] == host.points[last]["clips_of_films"] / 7

    killed = TrainState(run.settings, manifest_hash=run.mixture.hash, device=CPU)
    assert not train(run.settings, run.mixture, killed, device=CPU, host=Notes(stop_after=3))
    killed.save(tmp_path)
    resumed = TrainState(run.settings, manifest_hash=run.mixture.hash, device=CPU)
    resumed.load(tmp_path)
    assert train(run.settings, Mixture.load(run.settings.data), resumed, device=CPU, host=Notes())
    found = resumed.tensors()
    assert all(torch.equal(tensor, found[name]) for name, tensor in straight.tensors().items())


def test_another_mixture_under_the_name_of_a_run_is_refused(settings: PretrainSettings, tmp_path: Path) -> None:
    """Other weights, another order, or one set less: the message has what differs. The same goes on."""
    open_run(prepare(settings))
    first, second = settings.data.uri
    with pytest.raises(ValueError, match=r"other settings \(--data.weights .* -> .*\): set"):
        prepare(changed(settings, data={"weights": [2.0, 1.0]}))
    with pytest.raises(
        ValueError, match=r"belongs to a run on data set \w+, .*sports, .*films is \w+: give --data.uri"
    ):
        prepare(changed(settings, data={"uri": [second, first]}))
    with pytest.raises(ValueError, match=r"belongs to a run"):
        prepare(changed(settings, data={"uri": [first], "weights": []}))
    assert not open_run(prepare(settings)).is_new


def test_scores_and_lineage_name_all_sets(settings: PretrainSettings, tmp_path: Path) -> None:
    """The score is the mean of the sets by weight; the card has both sets, and the list of videos those of both."""
    from vmoco.train.evaluation import score_checkpoint

    run = prepare(settings)
    state = TrainState(run.settings, manifest_hash=run.mixture.hash, device=CPU)
    (tmp_path / "checkpoint").mkdir()
    state.save(tmp_path / "checkpoint")
    encoder = encoder_in(tmp_path / "checkpoint", data=run.mixture)
    scored = score_mixture(encoder, run.mixture, max_videos=100)
    alone = [score_encoder(encoder, each, max_videos=50) for each in run.mixture.manifests]
    score, numbers = joined_score(scored), joined_numbers(scored)
    assert score.value == pytest.approx(0.75 * alone[0].retrieval.value + 0.25 * alone[1].retrieval.value)
    assert score.low <= score.value <= score.high
    assert numbers["retrieval"] == score.value
    assert numbers["retrieval_of_sports"] == alone[1].retrieval.value
    uri = str(tmp_path / "checkpoint")
    again, tracked = score_checkpoint(uri, run.settings.data, max_videos=100, device="cpu")
    assert again == score
    assert tracked["score/knn"] == tracked["score/knn_of_films"]  # the other has no labels

    card = write_encoder(tmp_path / "checkpoint", tmp_path / "encoder", data=run.mixture)
    assert [(each["name"], each["weight"]) for each in card["data"]["sets"]] == [("films", 0.75), ("sports", 0.25)]
    assert card["data"]["manifest_hash"] == run.mixture.hash
    assert "films: 75.0% of the draws" in model_card.page(card, usage="")
    videos = pq.read_table(tmp_path / "encoder" / "videos.parquet").to_pydict()
    named = dict(zip(videos["video_id"], videos["held_out"], strict=True))
    trained, held_out = set[str](), set[str]()
    for manifest in run.mixture.manifests:
        chosen = training_clips(manifest, run.settings.data, others=run.mixture.others(manifest))
        trained |= set(chosen["video_id"].to_pylist())
        held_out |= set(manifest.table.filter(manifest.table["held_out"])["video_id"].to_pylist())
    assert named == dict.fromkeys(held_out, True) | dict.fromkeys(trained, False)
    assert set(named.values()) == {True, False}
    assert package.load_encoder(str(tmp_path / "encoder")).card["data"]["sets"] == card["data"]["sets"]


def test_a_set_that_cannot_be_scored_leaves_the_score_to_the_others(settings: PretrainSettings, tmp_path: Path) -> None:
    """The run says so; with no such set at all there is no score, and no run of a sweep."""
    third = make_data_set(tmp_path / "third", num_videos=5, num_frames=11)
    films = Mixture.load(settings.data).manifests[0]
    both = changed(settings, data={"uri": [films.uri, third.uri]})
    lines = introduce(open_run(prepare(both)))
    (line,) = [line for line in lines if "one data set gets no score" in line]
    assert "0 of 0 held-out videos" in line
    state = TrainState(both, manifest_hash=prepare(both).mixture.hash, device=CPU)
    (tmp_path / "checkpoint").mkdir()
    state.save(tmp_path / "checkpoint")
    mixture = prepare(both).mixture
    scored = score_mixture(encoder_in(tmp_path / "checkpoint", data=mixture), mixture, max_videos=100)
    assert [(each.name, each.weight) for each in scored] == [("films", 1.0)]
    encoder = encoder_in(tmp_path / "checkpoint", data=mixture)
    with pytest.raises(TooFewVideosError, match="0 of 0 held-out"):
        score_mixture(encoder, Mixture.of(third), max_videos=100)


def test_a_step_on_a_mixture_is_replayed(settings: PretrainSettings, tmp_path: Path) -> None:
    """From a file that names both places; another number of places is refused."""
    run = prepare(settings)
    content = ReplayFile(
        message="a loss is not finite",
        step=2,
        clip_ids=[],
        run_folder=run.folder,
        start_step=0,
        checkpoint=None,
        checkpoint_sha256=None,
        num_ranks=1,
        threads=1,
        device="cpu",
        autocast_dtype=None,
        data_uri=run.settings.data.uri,
        manifest_hash=run.mixture.hash,
        seed=0,
        state_hash=None,
        settings=json.loads(run.settings.canonical_json()),
        torch_version=torch.__version__,
    )
    file = tmp_path / "step.json"
    file.write_text(json.dumps({"version": 1, "vmoco": "0"} | vars(content)))
    outcome = replay.replay(str(file), show=lambda line: None)
    assert (outcome.step, outcome.findings) == (2, [])
    with pytest.raises(ValueError, match=r"--data /a does not fit the run: it has read 2 data sets"):
        replay.replay(str(file), data_uri=["/a"])
