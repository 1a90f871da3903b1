"""The label-free score tells an encoder that has learned something from one that sees colours, guesses or collapsed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.dataset import make_data_set, never_read_at_once, write_data_set
from vmoco.clip_settings import DataSettings
from vmoco.data.check import check
from vmoco.data.manifest import Manifest
from vmoco.data.mixture import Mixture
from vmoco.data.shard import Clip
from vmoco.encoders.package import Encoder, Preprocessing
from vmoco.evaluate.score import (
    LabelFreeScore,
    choose_pairs,
    effective_rank,
    estimate,
    score,
    score_encoder,
    scored_clips,
)
from vmoco.model.backbone import build_backbone

VIDEOS, CLIPS = 60, 6


def scored(features: np.ndarray, colours: np.ndarray | None = None) -> LabelFreeScore:
    videos = [f"v{video:03d}" for video in range(VIDEOS) for _ in range(CLIPS)]
    return score(
        features.astype(np.float32),
        video_ids=videos,
        sources=videos,
        start_seconds=np.tile(np.arange(CLIPS) * 0.64, VIDEOS),
        clip_seconds=0.64,
        colours=np.zeros((VIDEOS * CLIPS, 3), np.float32) if colours is None else colours.astype(np.float32),
    )


def noise(seed: int, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(VIDEOS * CLIPS, width))


def of_the_video(seed: int, width: int = 32) -> np.ndarray:
    return np.repeat(np.random.default_rng(seed).normal(size=(VIDEOS, width)), CLIPS, axis=0)


def test_it_rises_with_what_features_know_of_the_video() -> None:
    """Chance without signal, 100 % without noise, in order between; a large common part and the scale do not matter."""
    shares = [scored(of_the_video(0) * known + noise(1)).retrieval.value for known in (0, 0.3, 0.6, 5)]
    assert shares == sorted(shares)
    assert shares[0] < 0.06
    assert shares[-1] == 1
    assert scored((of_the_video(0) * 0.6 + noise(1)) * 7 + 1000).retrieval.value == pytest.approx(shares[2], abs=0.01)


def test_chance_is_what_guessing_reaches() -> None:
    """Over 20 sets of random features, the interval contains one over the number of videos."""
    found = [scored(noise(seed)) for seed in range(20)]
    assert found[0].chance == 1 / VIDEOS
    assert np.mean([one.retrieval.value for one in found]) == pytest.approx(1 / VIDEOS, abs=0.004)
    assert sum(one.retrieval.low <= one.chance <= one.retrieval.high for one in found) >= 15


def test_a_collapsed_encoder_reaches_chance() -> None:
    """Equal features share the match equally, and only one direction is left."""
    found = scored(np.ones((VIDEOS * CLIPS, 8)))
    assert found.retrieval.value == pytest.approx(1 / VIDEOS, abs=1e-6)
    assert found.effective_rank == 1


def test_colour_alone_is_said_beside() -> None:
    """The score of colours is reported too: it finds the videos, and the features do not."""
    colours = of_the_video(2, 3) * 40 + 128 + noise(3, 3)
    found = scored(noise(4), colours)
    assert found.by_colour > 0.8
    assert found.retrieval.value < 0.06
    assert f"mean colour alone {found.by_colour:.1%}" in str(found)


@pytest.mark.parametrize("shape", [(40, 100), (300, 16)])
def test_effective_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    """By its definition, from NumPy's singular value decomposition; k equal directions count as k."""
    features = np.random.default_rng(0).normal(size=shape) * np.linspace(0.1, 2, shape[1])
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    shares = values[values > 1e-6 * values.max()] / values.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert effective_rank(np.vstack([np.eye(5), -np.eye(5)])) == pytest.approx(5)


def test_pairs_are_of_one_video_and_disjoint_in_time() -> None:
    """The clips of each pair are half a video apart; clips that overlap, and videos of one clip, are left out."""
    videos = ["a"] * 7 + ["b"] * 2 + ["overlapping"] * 3 + ["single"]
    starts = np.array([0, 1, 2, 3, 4, 5, 6, 0, 1, 0, 0.3, 0.6, 0], float)
    pairs = choose_pairs(videos, start_seconds=starts, clip_seconds=1.0, sources=videos, rounds=3)
    assert pairs.shape == (3, 2, 2)
    assert {tuple(pair) for pair in pairs[:, 0]} == {(0, 4), (1, 5), (2, 6)}
    assert {tuple(pair) for pair in pairs[:, 1]} == {(7, 8)}


def test_a_large_set_is_bounded_by_a_fixed_draw() -> None:
    """At most the given number of videos take part, always the same ones, and no rows of others are read."""
    videos = [f"v{video:05d}" for video in range(3000) for _ in range(2)]
    starts = np.tile([0.0, 1.0], 3000)
    pairs = choose_pairs(videos, start_seconds=starts, clip_seconds=1.0, sources=videos, max_videos=50)
    assert pairs.shape == (1, 50, 2)
    assert np.array_equal(
        pairs, choose_pairs(videos, start_seconds=starts, clip_seconds=1.0, sources=videos, max_videos=50)
    )
    features = np.full((6000, 4), np.nan, np.float32)
    features[pairs.ravel()] = np.random.default_rng(0).normal(size=(pairs.size, 4))
    colours = np.zeros((6000, 3), np.float32)
    found = score(
        features,
        video_ids=videos,
        start_seconds=starts,
        clip_seconds=1.0,
        colours=colours,
        sources=videos,
        max_videos=50,
    )
    assert found.num_videos == 50


def test_what_cannot_be_scored_is_said() -> None:
    """Too few videos are refused with what to change, and so is a feature that is not a number."""
    with pytest.raises(ValueError, match=r"1 of 2 held-out videos have two clips .*--held-out-percent"):
        choose_pairs(["a", "a", "b"], start_seconds=[0.0, 1.0, 0.0], clip_seconds=1.0, sources=["a", "a", "b"])
    with pytest.raises(ValueError, match="a feature is not finite"):
        scored(np.full((VIDEOS * CLIPS, 2), np.nan))


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(build_backbone("r3d_nano"), Preprocessing(num_frames=8, fps=25.0, size=32), {}).eval()


def test_an_encoder_cannot_win_by_colour(tmp_path: Path) -> None:
    """Videos that differ only in a tint: mean colour finds them all, and the encoder is at chance."""
    random = np.random.default_rng(0)
    clips = []
    for video in range(16):
        tint = random.uniform(0.3, 1, 3)
        for place in range(2):
            frames = random.integers(100, 250, (8, 32, 40, 1)) * tint
            clips.append(
                Clip(f"{video:08d}{place:08d}", f"v{video:02d}", place * 1.0, 25.0, True, frames.astype(np.uint8))
            )
    found = score_encoder(encoder(), write_data_set(tmp_path, clips))
    assert found.by_colour > 0.9
    assert found.retrieval.low <= found.chance < 0.2
    assert found.retrieval.value < found.by_colour / 2


def test_an_encoder_is_scored_on_held_out_videos_only(tmp_path: Path) -> None:
    """The number of videos and clips is theirs, and the score is repeatable."""
    manifest = make_data_set(tmp_path, num_videos=12, clips_per_video=4, num_held_out=5)
    found = score_encoder(encoder(), manifest)
    assert (found.num_videos, found.num_clips) == (5, 20)
    assert found == score_encoder(encoder(), manifest)
    assert set(found.numbers()) >= {"retrieval", "retrieval_by_colour", "effective_rank"}


def test_a_checkpoint_is_scored_without_all_rows(tmp_path: Path) -> None:
    """Score, kNN, list of videos and the check of a data set read the manifest piece by piece."""
    from vmoco.train import publish  # not before: Ray reads how to authenticate when it is imported
    from vmoco.train.evaluation import knn_accuracy

    made = make_data_set(tmp_path, num_videos=12, clips_per_video=4, num_held_out=5, labels=("a", "b"))
    expected, manifest = knn_accuracy(encoder(), made, max_clips=50), Manifest.load(made.uri)
    with never_read_at_once():
        assert score_encoder(encoder(), manifest).num_videos == 5
        assert knn_accuracy(encoder(), manifest, max_clips=50) == expected
        listed = publish._videos(Mixture.of(manifest), DataSettings(uri=(made.uri,)))
        assert check(made.uri, lambda line: None) == []
    assert listed["held_out"].to_pylist().count(True) == 5
    assert listed.num_rows == 12


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 samples of 60 videos, 95 % of the intervals should contain the true mean; 90 to 99 % is accepted."""
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        difficulty = random.beta(2, 2, 60)  # mean 0.5
        right = random.random((60, 4)) < difficulty[:, None]
        found = estimate(right.ravel(), np.repeat(np.arange(60), 4), num_samples=300, seed=trial)
        covered += found.low <= 0.5 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_copies_of_a_clip_make_no_score_surer() -> None:
    """Ten equal clips of each video give the interval of one clip of each."""
    right = np.random.default_rng(1).random(50) < 0.7
    once = estimate(right, np.arange(50))
    assert estimate(np.repeat(right, 10), np.repeat(np.arange(50), 10)) == once
    assert once.value == right.mean()
    assert once.low < once.value < once.high


def test_nothing_measured_is_an_error() -> None:
    """An error message, and no division by zero."""
    with pytest.raises(ValueError, match="no clip was measured"):
        estimate([], [])


def test_a_clip_of_the_same_source_is_never_wrong() -> None:
    """Features that know the film but not its range find everything; chance counts only videos of other films."""
    films = 12
    film = np.arange(VIDEOS) % films
    features = np.repeat(np.random.default_rng(0).normal(size=(films, 32))[film], CLIPS, axis=0)
    features = features + 0.01 * noise(1)
    arguments = {
        "video_ids": [f"v{video:03d}" for video in range(VIDEOS) for _ in range(CLIPS)],
        "start_seconds": np.tile(np.arange(CLIPS) * 0.64, VIDEOS),
        "clip_seconds": 0.64,
        "colours": features[:, :3],
    }
    by_video = score(features, sources=arguments["video_ids"], **arguments)
    by_film = score(features, sources=[f"film {film[row // CLIPS]}" for row in range(len(features))], **arguments)
    assert by_video.retrieval.value < 0.5
    assert by_film.retrieval.value == by_film.by_colour == 1
    assert by_film.chance == pytest.approx(1 / (VIDEOS - VIDEOS // films + 1))
    guessed = [
        score(noise(seed), sources=[f"film {film[row // CLIPS]}" for row in range(len(features))], **arguments)
        for seed in range(20)
    ]
    assert np.mean([found.retrieval.value for found in guessed]) == pytest.approx(by_film.chance, abs=0.005)


def test_the_draw_of_a_large_set_has_two_sources() -> None:
    """Where nearly all videos are of one film, a small draw takes one of another film too."""
    videos = [f"v{video:05d}" for video in range(400) for _ in range(2)]
    sources = ["film"] * 798 + ["other"] * 2
    pairs = choose_pairs(
        videos, start_seconds=np.tile([0.0, 1.0], 400), clip_seconds=1.0, sources=sources, max_videos=5
    )
    assert {sources[row] for row in pairs[0, :, 0]} == {"film", "other"}
    assert pairs.shape == (1, 5, 2)


def test_sources_are_part_of_the_evaluation_set(tmp_path: Path) -> None:
    """Scores with and without shared sources do not compare; complete files keep the hash of earlier versions."""
    manifest = make_data_set(tmp_path, num_held_out=4)
    place = manifest.table.column_names.index("source")
    hashes = []
    for sources in ([None] * 4, ["a", "b", "c", "d"], ["a", "a", "b", "b"]):
        names = sorted({row["video_id"] for row in manifest.table.to_pylist() if row["held_out"]})
        of = dict(zip(names, sources, strict=True))
        column = pa.array([of.get(name) for name in manifest.table["video_id"].to_pylist()], pa.string())
        hashes.append(scored_clips(manifest.with_table(manifest.table.set_column(place, "source", column)))[1])
    assert hashes[0] == hashes[1] != hashes[2]
