"""Several data sets are drawn from by weight: evenly, each in its own order, whatever they look like."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import dataset
from tests.data.test_loader import equal, settings_with, window_of
from tests.data.test_plan import clips_of
from tests.dataset import make_data_set, upload
from tests.store import Store
from vmoco.clip_settings import DataSettings
from vmoco.config import PretrainSettings
from vmoco.data.augment import augment
from vmoco.data.fit import check_fits, epoch_clips, fit_to_data
from vmoco.data.loader import Loader
from vmoco.data.mixture import Mixture, absolute, shared_videos
from vmoco.data.plan import Plan, Stream, Turns
from vmoco.seed import hash64

WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Three sets that differ in size, length and encoding; the second holds out two of its videos."""
    place = tmp_path_factory.mktemp("sets")
    return Mixture.of(
        [
            make_data_set(place / "raw", num_videos=12),
            make_data_set(place / "long", num_videos=6, num_frames=14, height=36, width=60, num_held_out=2),
            make_data_set(place / "jpeg", num_videos=5, height=56, width=40, encoding="jpeg"),
        ],
        WEIGHTS,
    )


def settings_of(mixture: Mixture, **data: object) -> PretrainSettings:
    return settings_with(data={"uri": [each.uri for each in mixture.manifests], "weights": mixture.weights, **data})


@given(st.lists(st.floats(1e-7, 1.0), min_size=2, max_size=9))
def test_turns_are_even_and_leave_nothing_out(weights: list[float]) -> None:
    """Each stream is taken from its first draw on without a gap, and no piece of the whole strays from the weights."""
    turns, count = Turns(weights), 2 * Turns.CYCLE
    streams, places = turns.of(np.arange(count))
    assert turns.draws.sum() == Turns.CYCLE
    for number, draws in enumerate(turns.draws.tolist()):
        np.testing.assert_array_equal(places[streams == number], np.arange(2 * draws))
        taken = np.cumsum(streams == number)
        exact = np.arange(1, count + 1) * draws / Turns.CYCLE
        assert np.abs(taken - exact).max() <= 1 + len(weights) / 2
    shares = np.array(weights) / sum(weights)
    assert np.abs(turns.draws / Turns.CYCLE - shares).max() <= len(weights) / Turns.CYCLE
    for at in (0, 1, 1000, Turns.CYCLE + 17):
        np.testing.assert_array_equal(turns.before(at), np.bincount(streams[:at], minlength=len(weights)))


def test_each_set_keeps_its_own_order() -> None:
    """What a mixture draws from a set is that set's stream; its numbers follow those of the sets before."""
    counts = [[3, 1, 2], [2] * 5, [4]]
    streams = [Stream(clips_of(each), seed=at, draws_per_video=2) for at, each in enumerate(counts)]
    plan = Plan(streams, weights=WEIGHTS, seed=9, global_batch=8, micro_batch=4)
    batches = [plan.batch(step) for step in range(12)]
    firsts = np.cumsum([0, 6, 10, 4])
    for number, stream in enumerate(streams):
        drawn = np.concatenate([draws.clip[plan.data_sets(draws) == number] for draws in batches])
        seeds = np.concatenate([draws.seed[plan.data_sets(draws) == number] for draws in batches])
        alone = stream.draws(np.arange(len(drawn)))
        np.testing.assert_array_equal(drawn - firsts[number], alone.clip)
        np.testing.assert_array_equal(seeds, alone.seed)
        assert plan.drawn(12)[number] == len(drawn)
    for draws in batches:
        others = plan.second_clips(draws)
        np.testing.assert_array_equal(
            np.searchsorted(firsts, others, "right"), np.searchsorted(firsts, draws.clip, "right")
        )
        assert set(draws.video.tolist()) <= set(range(3 + 5 + 1))


def test_batches_hold_the_clips_of_each_set_as_they_are_stored(mixture: Mixture) -> None:
    """Whatever their size, length and encoding: windows, names and pixels after augmentation are those of the set."""
    settings = settings_of(mixture, stride=1, positives="two_clips")
    loader = Loader(mixture, settings, rank=0, world_size=1)
    stored = [
        dict(zip(each.table["clip_id"].to_pylist(), dataset.stored_clips(each), strict=True))
        for each in mixture.manifests
    ]
    seen = [set[str](), set[str](), set[str]()]
    for step in range(6):
        batch = loader.batch(step)
        assert batch.query.frames.shape[2:4] == (56, 60)
        for place, (number, clip) in enumerate(zip(batch.data_sets.tolist(), batch.clip_ids, strict=True)):
            seen[number].add(clip)
            original = stored[number][clip]
            height, width = original.shape[1:3]
            frames = batch.query.frames[place]
            own = frames[:, :height, :width]
            window_of(own.numpy(), original, stride=1)
            size = settings.augment.size
            draws = batch.query.draws[place : place + 1]
            mixed, alone = (augment(each[None].contiguous(), draws, size=size) for each in (frames, own))
            torch.testing.assert_close(mixed, alone, rtol=0, atol=1e-6)
    held_out = mixture.manifests[1].table.filter(mixture.manifests[1].table["held_out"])["clip_id"].to_pylist()
    assert not seen[1] & set(held_out)
    assert all(seen)


def test_a_mixture_is_the_same_on_any_number_of_ranks_and_wherever_it_begins(mixture: Mixture) -> None:
    """The ranks' parts join to the batch of one rank, bit for bit; a loader that begins later yields the same."""
    settings = settings_of(mixture)
    straight = list(Loader(mixture, settings, rank=0, world_size=1))
    late = list(Loader(mixture, settings, rank=0, world_size=1, start_step=4))
    assert all(equal(one, other) for one, other in zip(straight[4:], late, strict=True))
    parts = [Loader(mixture, settings, rank=rank, world_size=3) for rank in range(3)]
    for step, whole in enumerate(straight):
        batches = [each.batch(step) for each in parts]
        assert torch.equal(torch.cat([each.query.frames for each in batches]), whole.query.frames)
        assert torch.equal(torch.cat([each.key.draws for each in batches]), whole.key.draws)
        assert torch.equal(torch.cat([each.data_sets for each in batches]), whole.data_sets)
        assert all(torch.equal(each.video_ids, whole.video_ids) for each in batches)


def test_a_mixture_of_local_and_remote_sets(mixture: Mixture, store: Store, tmp_path: Path) -> None:
    """A set in a store gives the bits of the set on disk."""
    first, second, third = mixture.manifests
    there = Mixture.of([first, upload(second, "s3://bucket/long"), third], WEIGHTS)
    settings = settings_of(there, cache=str(tmp_path))
    here, remote = (Loader(each, settings, rank=0, world_size=1) for each in (mixture, there))
    assert all(equal(here.batch(step), remote.batch(step)) for step in range(3))


def test_one_set_is_no_mixture(mixture: Mixture) -> None:
    """Its hash and its seed are its own, so runs from before there were mixtures go on as they were."""
    one = Mixture.of(mixture.manifests[0])
    assert (one.is_one, one.hash, one.counts) == (True, mixture.manifests[0].hash, mixture.manifests[0].counts)
    assert one.stream_seed(0, 7) == 7
    assert len({7, *(mixture.stream_seed(place, 7) for place in range(3))}) == 4  # sets of one size in other orders
    assert len({mixture.hash, *(each.hash for each in mixture.manifests)}) == 4
    assert mixture.hash != Mixture.of(mixture.manifests[::-1]).hash
    assert mixture.counts["clips"] == 2 * (12 + 6 + 5)
    assert DataSettings(uri="a").canonical_json() == DataSettings(uri=("a",)).canonical_json()
    assert '"uri": "a"' in DataSettings(uri="a").canonical_json()


def test_rates_of_all_clips_give_the_median(mixture: Mixture) -> None:
    """As NumPy computes it, for an even and an odd number of clips."""
    tables = [each.table.set_column(3, "fps", [[hash64(at, each.hash) % 7 + 0.5 for at in range(each.table.num_rows)]])
              for each in mixture.manifests]  # fmt: skip
    for chosen in (slice(0, 1), slice(0, 3)):
        sets = [each.with_table(table) for each, table in zip(mixture.manifests, tables, strict=True)][chosen]
        fewer = [each.with_table(each.table.slice(1)) for each in sets[:1]] + sets[1:]
        for some in (sets, fewer):
            rates = np.concatenate([each.table["fps"].to_numpy() for each in some])
            assert Mixture.of(some).fps == np.median(rates)


def test_weights_follow_from_the_sizes_unless_given(mixture: Mixture) -> None:
    """Then each video is drawn equally often, and the settings say so; an epoch is one of each set together."""
    settings = settings_with(
        data={"uri": [each.uri for each in mixture.manifests], "draws_per_video": 2}, train={"steps": 0, "epochs": 3.0}
    )
    fitted, lines = fit_to_data(settings, Mixture.of(mixture.manifests))
    videos = np.array([10, 4, 4])  # the second set holds out the files 4 and 5, which the others have too
    np.testing.assert_allclose(fitted.data.weights, videos / videos.sum(), atol=1e-6)
    assert any(line.startswith("--data.weights 0.555556 0.222222 0.222222: each video") for line in lines)
    assert epoch_clips(fitted, mixture) == 36
    assert fitted.train.steps == 3 * 36 / 12
    assert fit_to_data(fitted, mixture)[0] == fitted
    check_fits(mixture, fitted)
    with pytest.raises(ValueError, match=r"the clips of .*raw have 10: lower one of them"):
        check_fits(mixture, settings_of(mixture, num_frames=12))


def test_what_one_set_holds_out_no_set_trains_on(tmp_path: Path) -> None:
    """Files with the same content are found by their hash, in the index and in the lineage; they are counted."""
    # The videos of `make_data_set` with equal numbers are files with equal hashes.
    first = make_data_set(tmp_path / "first", num_videos=8, num_held_out=3)
    second = make_data_set(tmp_path / "second", num_videos=6, num_frames=12)
    both = Mixture.of([first, second])
    (shared,) = shared_videos(both)
    assert (shared.videos, shared.held_out) == (6, 1)  # 0 to 5 are in both, and 5 is held out in the first
    taken = [each.num_videos for each in both.indexes(DataSettings())]
    assert taken == [5, 5]
    assert [each.num_videos for each in Mixture.of(second).indexes(DataSettings())] == [6]
    assert shared_videos(Mixture.of(first)) == []
    nothing = Mixture.of([make_data_set(tmp_path / "third", num_videos=3, num_frames=11), first.with_table(
        first.table.set_column(first.table.column_names.index("held_out"), "held_out", [[True] * 16]))])  # fmt: skip
    with pytest.raises(ValueError, match=r"no clip of .*third is left to train on: the held-out part of .*first"):
        check_fits(nothing, settings_with())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"uri": ["a", "b"], "weights": [0.5]}, r"--data.weights 0.5 does not fit --data.uri: 2 data sets are named"),
        ({"uri": ["a"], "weights": [1.0]}, r"--data.weights 1 does not fit --data.uri: 1 data sets are named there"),
        ({"uri": ["a", "b"], "weights": [1.0, 0.0]}, r"--data.weights 1 0 is not allowed: each weight must be above 0"),
        ({"uri": ["a", "b"], "weights": [1.0, -2]}, r"--data.weights 1 -2 is not allowed"),
    ],
)
def test_weights_that_do_not_fit_are_refused(data: dict[str, list[str]], message: str) -> None:
    """With the weights as they were typed, and what to do."""
    with pytest.raises(ValueError, match=message):
        DataSettings(**data)  # type: ignore[arg-type]


def test_one_set_under_two_names_is_refused(mixture: Mixture, tmp_path: Path) -> None:
    """By its place, and by its content."""
    uri = mixture.manifests[0].uri
    with pytest.raises(ValueError, match=rf"--data.uri names {re.escape(uri)} twice: .* by --data.weights"):
        absolute(DataSettings(uri=(uri, f"{uri}/")))
    make_data_set(tmp_path / "copy", num_videos=12)
    with pytest.raises(ValueError, match=r"raw and .*copy have the same clips: name one of them"):
        Mixture.load(DataSettings(uri=(uri, str(tmp_path / "copy"))))
    with pytest.raises(ValueError, match=r"--data.uri is missing"):
        absolute(DataSettings())
