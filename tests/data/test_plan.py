"""The order of training: fair to every video, the same at any world size, and a pure function of manifest and seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dataset import make_data_set
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.data.manifest_writer import write_manifest
from vmoco.data.plan import Draws, Plan, Stream
from vmoco.data.shard import ShardFile
from vmoco.presets import PRESETS
from vmoco.seed import UInt64Array, hash64

COUNTS = st.lists(st.integers(1, 6), min_size=1, max_size=9)
WINDOWS = st.integers(0, 12)


@dataclass(frozen=True)
class Clips:
    """What a plan knows of its clips, in memory."""

    first_clip: npt.NDArray[np.int64]
    clip_ids: UInt64Array
    place_in_shot: npt.NDArray[np.int64]
    num_of_shot: npt.NDArray[np.int64]


def clips_of(counts: list[int], *, longest_shot: int | None = None) -> Clips:
    """Videos with so many clips each, in shots of at most so many clips."""
    ids = [hash64("clip", video, clip) for video, count in enumerate(counts) for clip in range(count)]
    places, sizes = [], []
    for count in counts:
        longest = longest_shot or count
        places += [clip % longest for clip in range(count)]
        sizes += [min(longest, count - clip // longest * longest) for clip in range(count)]
    return Clips(np.cumsum([0, *counts]), np.array(ids, np.uint64), np.array(places), np.array(sizes))


def make_plan(
    counts: list[int],
    *,
    seed: int = 3,
    draws_per_video: int = 2,
    micro_batch: int = 2,
    num_micro: int = 3,
    window: int = 0,
) -> Plan:
    """A plan over videos with so many clips each."""
    return Plan(
        [Stream(clips_of(counts), seed=seed, draws_per_video=draws_per_video, window=window)],
        seed=seed,
        global_batch=micro_batch * num_micro,
        micro_batch=micro_batch,
    )


def stream(plan: Plan, length: int) -> list[tuple[int, int, int, int]]:
    """The first draws, one after the other: (clip, video, epoch, seed)."""
    draws = [plan.batch(step) for step in range(-(-length // plan.global_batch))]
    return [row for part in draws for row in rows(part)][:length]


def rows(draws: Draws) -> list[tuple[int, int, int, int]]:
    """The draws, one after the other."""
    columns = [column.tolist() for column in (draws.clip, draws.video, draws.epoch, draws.seed)]
    return list(zip(*columns, strict=True))


@given(
    counts=COUNTS,
    draws_per_video=st.integers(1, 8),
    micro=st.integers(1, 5),
    seed=st.integers(0, 2**63),
    window=WINDOWS,
)
def test_epoch_is_fair_to_every_video(
    counts: list[int], draws_per_video: int, micro: int, seed: int, window: int
) -> None:
    """In each of three epochs every video comes up draws_per_video times, with distinct clips as far as it has them.

    Batches run on over the ends of epochs: the stream is cut nowhere.
    """
    plan = make_plan(counts, draws_per_video=draws_per_video, micro_batch=micro, seed=seed, window=window)
    length = len(counts) * draws_per_video
    assert plan.epoch_length == length
    drawn = stream(plan, 3 * length)
    starts = np.cumsum([0, *counts])
    for epoch in range(3):
        part = drawn[epoch * length : (epoch + 1) * length]
        assert {row[2] for row in part} == {epoch}
        assert Counter(row[1] for row in part) == dict.fromkeys(range(len(counts)), draws_per_video)
        for video, count in enumerate(counts):
            clips = [row[0] for row in part if row[1] == video]
            assert all(starts[video] <= clip < starts[video + 1] for clip in clips)
            assert len(set(clips)) == min(count, draws_per_video)
    assert len({row[3] for row in drawn}) == len(drawn), "two draws share a seed"


def are_windows(videos: list[int], sizes: list[int], *, draws_per_video: int, num_videos: int) -> bool:
    """Whether draws are those of windows of these sizes, in any order: whole passes over neighbouring videos."""
    if not videos:
        return not sizes
    for size in set(sizes):
        part, rest = videos[: size * draws_per_video], sizes.copy()
        rest.remove(size)
        near = any({(begin + step) % num_videos for step in range(size)} == set(part) for begin in range(num_videos))
        passes = all(len(set(part[at : at + size])) == size for at in range(0, len(part), size))
        left = {"draws_per_video": draws_per_video, "num_videos": num_videos}
        if near and passes and are_windows(videos[len(part) :], rest, **left):
            return True
    return False


@given(counts=COUNTS, draws_per_video=st.integers(1, 4), window=st.integers(1, 12))
def test_draws_of_a_window_come_together(counts: list[int], draws_per_video: int, window: int) -> None:
    """An epoch is cut into windows of neighbouring videos, of which each comes up draws_per_video times. Their sizes
    differ by one at most: a small rest would end an epoch with batches of few videos. One window is the order without.
    """
    drawn = stream(make_plan(counts, draws_per_video=draws_per_video, window=window), 2 * len(counts) * draws_per_video)
    number = max(1, round(len(counts) / window))
    if number == 1:
        assert drawn == stream(make_plan(counts, draws_per_video=draws_per_video), len(drawn))
        return
    size, more = divmod(len(counts), number)
    sizes = [size + 1] * more + [size] * (number - more)
    for epoch in range(2):
        videos = [row[1] for row in drawn if row[2] == epoch]
        assert are_windows(videos, sizes, draws_per_video=draws_per_video, num_videos=len(counts))


def test_there_are_not_too_many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the windows is an array: of many videos, a window is as large as its greatest length demands."""
    monkeypatch.setattr("vmoco.data.plan.MAX_WINDOWS", 3)
    videos = [row[1] for row in stream(make_plan([1] * 10, draws_per_video=1, window=1), 10)]
    assert are_windows(videos, [3, 3, 4], draws_per_video=1, num_videos=10)


def test_windows_begin_and_come_in_another_order_in_each_epoch() -> None:
    """Over many epochs every pair of neighbours is torn apart, and each video is among the first as often."""
    first, torn = Counter[int](), Counter[int]()
    plan = make_plan([1] * 12, draws_per_video=1, window=4, micro_batch=4, num_micro=3)
    for epoch in range(600):
        videos = plan.batch(epoch).video.tolist()
        first.update(videos[:4])
        window_of = {video: place // 4 for place, video in enumerate(videos)}
        torn.update(video for video in range(12) if window_of[video] != window_of[(video + 1) % 12])
    assert all(200 - 4 * 12 < first[video] < 200 + 4 * 12 for video in range(12))  # 4 of 12; four standard deviations
    assert all(150 - 4 * 11 < torn[video] < 150 + 4 * 11 for video in range(12))  # 3 of 12 borders


def test_every_clip_gets_its_turn() -> None:
    """One draw per epoch from a video of 5 clips: over 400 epochs each comes up about 80 times."""
    times = Counter(row[0] for row in stream(make_plan([5], draws_per_video=1), 400))
    assert sorted(times) == list(range(5))
    assert all(80 - 4 * 8 < count < 80 + 4 * 8 for count in times.values())  # four standard deviations


def test_epochs_and_runs_have_their_own_order() -> None:
    """The order of 50 videos is another one in the next epoch, in the next pass of an epoch, and for another seed."""
    plan = make_plan([1] * 50)
    passes = np.array([row[1] for row in stream(plan, 200)]).reshape(4, 50).tolist()
    passes.append([row[1] for row in stream(make_plan([1] * 50, seed=4), 50)])
    assert len({tuple(order) for order in passes}) == 5


@given(world_size=st.integers(1, 12), num_micro=st.integers(1, 12), micro=st.integers(1, 5))
def test_shares_partition_the_batch(world_size: int, num_micro: int, micro: int) -> None:
    """In rank order the shares are the whole batch, each of whole micro-batches, as even as they divide.

    More ranks than micro-batches are refused with both numbers.
    """
    plan = make_plan([1], micro_batch=micro, num_micro=num_micro)
    if world_size > num_micro:
        with pytest.raises(ValueError, match=f"^{world_size} workers cannot share {num_micro} micro-batches: lower"):
            plan.share(0, world_size)
        return
    shares = [plan.share(rank, world_size) for rank in range(world_size)]
    places = list(range(plan.global_batch))
    assert [place for share in shares for place in places[share]] == places
    sizes = [share.stop - share.start for share in shares]
    assert all(share.start % micro == 0 for share in shares)
    assert max(sizes) - min(sizes) <= micro


@given(
    counts=COUNTS, micro=st.integers(1, 4), steps=st.lists(st.integers(0, 30), min_size=1, max_size=8), window=WINDOWS
)
def test_batch_does_not_depend_on_what_was_asked_before(
    counts: list[int], micro: int, steps: list[int], window: int
) -> None:
    """Asked in any order, or alone, a step gives the same draws and key order; its ranks' shares join to them."""
    plan = make_plan(counts, micro_batch=micro, window=window)
    for step in steps:
        alone = make_plan(counts, micro_batch=micro, window=window)
        expected = rows(alone.batch(step))
        found = plan.batch(step)
        assert rows(found) == expected
        assert plan.key_order(step).tolist() == alone.key_order(step).tolist()
        for world_size in (1, 2, 3):
            parts = [rows(found[plan.share(rank, world_size)]) for rank in range(world_size)]
            assert [row for part in parts for row in part] == expected


@given(counts=COUNTS, step=st.integers(0, 50), micro=st.integers(1, 6))
def test_batch_spans_the_ends_of_epochs(counts: list[int], step: int, micro: int) -> None:
    """Draw i of the stream belongs to epoch i // epoch length, wherever batches begin and however long they are."""
    plan = make_plan(counts, draws_per_video=1, micro_batch=micro)
    first = step * plan.global_batch
    expected = [place // len(counts) for place in range(first, first + plan.global_batch)]
    assert plan.batch(step).epoch.tolist() == expected


@given(step=st.integers(0, 10**6), num_micro=st.integers(1, 20))
def test_key_order_is_a_permutation(step: int, num_micro: int) -> None:
    """Every draw of the global batch is loaded once as a key."""
    plan = make_plan([1], num_micro=num_micro)
    assert sorted(plan.key_order(step).tolist()) == list(range(plan.global_batch))


def test_key_is_normalised_beside_other_clips_than_its_query() -> None:
    """With 8 micro-batches of 4, on average a key shares 3 * 3 / 31 = 0.29 of its 3 batch-mates with its query.

    That is what shuffle-BN is for; unshuffled they would share all 3.
    """
    plan = make_plan([1] * 40, micro_batch=4, num_micro=8)
    shared = []
    for step in range(50):
        mates_of_key: dict[int, set[int]] = {}
        for micro in plan.key_order(step).reshape(8, 4).tolist():
            mates_of_key |= {draw: set(micro) - {draw} for draw in micro}
        for draw in range(32):
            mates_of_query = set(range(draw // 4 * 4, draw // 4 * 4 + 4)) - {draw}
            shared.append(len(mates_of_query & mates_of_key[draw]))
    assert np.mean(shared) == pytest.approx(9 / 31, abs=0.08)
    assert len({tuple(plan.key_order(step)) for step in range(50)}) == 50


@given(counts=COUNTS, micro=st.integers(1, 6), step=st.integers(0, 30), data=st.data())
def test_as_many_keys_of_each_micro_batch_are_reversed(
    counts: list[int], micro: int, step: int, data: st.DataObject
) -> None:
    """In each micro-batch of the shuffled copy exactly so many; those of fewer are among those of more."""
    number = data.draw(st.integers(0, micro))
    plan = make_plan(counts, micro_batch=micro)
    chosen = plan.reversed_keys(step, num_clips=number)
    assert chosen.reshape(3, micro).sum(axis=1).tolist() == [number] * 3
    assert not (plan.reversed_keys(step, num_clips=max(number - 1, 0)) & ~chosen).any()


def test_every_key_is_reversed_as_often() -> None:
    """One of each 4 keys: over 400 steps each of 24 videos about 100 times, whatever place the shuffle gives it."""
    plan = make_plan([1] * 24, draws_per_video=1, micro_batch=4, num_micro=6)
    counts: Counter[int] = Counter()
    places: Counter[int] = Counter()
    for step in range(400):
        chosen = plan.reversed_keys(step, num_clips=1)
        counts.update(plan.batch(step).video[plan.key_order(step)][chosen].tolist())
        places.update((np.flatnonzero(chosen) % 4).tolist())
    deviation = (400 * 0.25 * 0.75) ** 0.5
    assert len(counts) == 24
    assert all(abs(count - 100) < 5 * deviation for count in counts.values())
    assert all(abs(count - 600) < 5 * (2400 * 0.25 * 0.75) ** 0.5 for count in places.values())


@given(counts=COUNTS, micro=st.integers(1, 4), step=st.integers(0, 30))
def test_second_clip_is_another_of_the_video(counts: list[int], micro: int, step: int) -> None:
    """Of the same video and not the same clip, where it has more than one; of any part of a batch, the same."""
    plan = make_plan(counts, micro_batch=micro)
    starts = np.cumsum([0, *counts])
    draws = plan.batch(step)
    second = plan.second_clips(draws)
    for clip, video, other in zip(draws.clip.tolist(), draws.video.tolist(), second.tolist(), strict=True):
        assert starts[video] <= other < starts[video + 1]
        assert (other != clip) == (counts[video] > 1)
    order = plan.key_order(step)
    assert plan.second_clips(draws[order]).tolist() == second[order].tolist()


@given(counts=COUNTS, length=st.integers(1, 4), step=st.integers(0, 30))
def test_second_clip_is_of_the_same_shot(counts: list[int], length: int, step: int) -> None:
    """Where shots are known: another clip of the shot, and the same clip where it is alone in it."""
    videos = np.repeat(np.arange(len(counts)), counts)
    shots = np.concatenate([np.arange(count) for count in counts]) // length
    stream = Stream(clips_of(counts, longest_shot=length), seed=3, draws_per_video=2)
    plan = Plan([stream], seed=3, global_batch=6, micro_batch=2)
    draws = plan.batch(step)
    for clip, other in zip(draws.clip.tolist(), plan.second_clips(draws).tolist(), strict=True):
        assert (videos[other], shots[other]) == (videos[clip], shots[clip])
        alone = np.sum((videos == videos[clip]) & (shots == shots[clip])) == 1
        assert (other == clip) == alone


def test_each_other_clip_is_as_likely() -> None:
    """From a video of 5 clips, over 2000 draws, each of the 20 ordered pairs comes up about 100 times."""
    plan = make_plan([5], draws_per_video=1, micro_batch=2, num_micro=1000)
    draws = plan.batch(0)
    pairs = Counter(zip(draws.clip.tolist(), plan.second_clips(draws).tolist(), strict=True))
    assert len(pairs) == 20
    assert all(100 - 4 * 10 < count < 100 + 4 * 10 for count in pairs.values())  # four standard deviations


def plan_of(manifest: Manifest) -> Plan:
    """The plan that the loader makes of a data set."""
    return Loader(manifest, PRESETS["tiny"][1], rank=0, world_size=1).plan


def test_another_layout_changes_no_draw(tmp_path) -> None:
    """The same clips spread over other shards: the same clips are drawn, in the same order, with the same seeds."""
    manifest = make_data_set(tmp_path / "before")
    table = manifest.table.set_column(
        manifest.table.column_names.index("shard"), "shard", [["9", "8", "7"][row % 3] for row in range(24)]
    )
    table = table.take(np.random.default_rng(1).permutation(24))
    again = write_manifest(
        str(tmp_path / "after"),
        table,
        settings=manifest.settings,
        frame_shape=manifest.frame_shape,
        encoding=manifest.encoding,
        shards=dict.fromkeys("789", ShardFile(0, "")),
        num_rejected=0,
    )
    assert again.table["shard"].to_pylist() != manifest.table["shard"].to_pylist()
    assert stream(plan_of(again), 100) == stream(plan_of(manifest), 100)


def test_seed_of_a_draw_follows_its_clip() -> None:
    """When a video is added, the clips that are drawn in the same epoch and pass as before keep their seeds."""
    small, large = make_plan([1] * 6, draws_per_video=1), make_plan([1] * 7, draws_per_video=1)
    before = {(row[0], row[2]): row[3] for row in stream(small, 30)}
    after = {(row[0], row[2]): row[3] for row in stream(large, 35)}
    assert before.items() <= after.items()
    assert before.keys() != after.keys()
