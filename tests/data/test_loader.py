"""Batches hold the planned clips as they lie in the shards, whatever the number of ranks and wherever a run begins."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests import dataset
from tests.dataset import make_data_set
from vmoco.config import PretrainSettings
from vmoco.data import augment
from vmoco.data.fit import check_fits
from vmoco.data.loader import BatchMemory, Loader, RankBatch
from vmoco.data.manifest import Manifest
from vmoco.presets import PRESETS

NUM_STEPS = 7


def settings_with(**groups: dict[str, Any]) -> PretrainSettings:
    """The preset `tiny` with some fields of some groups replaced: 12 clips a step in 3 micro-batches, 7 steps."""
    values = PRESETS["tiny"][1].model_dump()
    values["train"] |= {"global_batch": 12, "steps": NUM_STEPS}
    for group, fields in groups.items():
        values[group] |= fields
    return PretrainSettings(**values)


SETTINGS = settings_with()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """12 videos of 2 clips of 10 frames; the last 2 videos are held out."""
    return make_data_set(tmp_path_factory.mktemp("set"), num_held_out=2)


def stored_clips(manifest: Manifest) -> dict[str, npt.NDArray[np.uint8]]:
    """The pixels of every clip by its id, read from the shards one by one."""
    return dict(zip(manifest.table["clip_id"].to_pylist(), dataset.stored_clips(manifest), strict=True))


def window_of(frames: npt.NDArray[np.uint8], stored: npt.NDArray[np.uint8], *, stride: int) -> int:
    """Where in a stored clip a training clip begins; exactly one place fits, because the frames are noisy."""
    span = (len(frames) - 1) * stride + 1
    places = range(len(stored) - span + 1)
    (start,) = [at for at in places if np.array_equal(stored[at : at + span : stride], frames)]
    return start


def equal(one: RankBatch, other: RankBatch) -> bool:
    """Whether two batches hold the same bits."""
    views = [(batch.query.frames, batch.query.draws, batch.key.frames, batch.key.draws) for batch in (one, other)]
    rest = [(batch.random_importance, batch.key_order, batch.video_ids) for batch in (one, other)]
    plain = [(batch.step, batch.clip_ids, batch.share, batch.clips_per_rank) for batch in (one, other)]
    return all(map(torch.equal, *views)) and all(map(torch.equal, *rest)) and plain[0] == plain[1]


@pytest.mark.parametrize(("num_frames", "stride", "num_windows"), [(8, 1, 3), (4, 2, 4), (10, 1, 1), (2, 9, 1)])
def test_frames_are_a_window_of_the_planned_clip(
    manifest: Manifest, num_frames: int, stride: int, num_windows: int
) -> None:
    """Each query holds frames of its clip as the shard has them, stride apart; every window that fits comes up."""
    settings = settings_with(data={"num_frames": num_frames, "stride": stride})
    loader, stored = Loader(manifest, settings, rank=0, world_size=1), stored_clips(manifest)
    trained = [line["clip_id"] for line in manifest.table.to_pylist() if not line["held_out"]]
    starts = set()
    for batch in loader:
        assert batch.query.frames.shape == (12, num_frames, 40, 48, 3)
        assert batch.query.frames.dtype == torch.uint8
        assert batch.clip_ids == [trained[clip] for clip in loader.plan.batch(batch.step).clip]
        for frames, clip_id in zip(batch.query.frames.numpy(), batch.clip_ids, strict=True):
            starts.add(window_of(frames, stored[clip_id], stride=stride))
    assert starts == set(range(num_windows))


@pytest.mark.parametrize("positives", ["same_clip", "two_clips"])
def test_later_start_is_the_rest_of_a_full_pass(manifest: Manifest, positives: str) -> None:
    """From step k a loader yields, bit for bit, what one from step 0 yields from k on: all steps, each once."""
    settings = settings_with(data={"positives": positives})
    whole = list(Loader(manifest, settings, rank=1, world_size=2))
    assert [batch.step for batch in whole] == list(range(NUM_STEPS))
    assert not equal(whole[0], whole[1])
    for start in (3, NUM_STEPS - 1, NUM_STEPS):
        rest = list(Loader(manifest, settings, rank=1, world_size=2, start_step=start))
        assert len(rest) == NUM_STEPS - start
        assert all(map(equal, rest, whole[start:]))


@pytest.mark.parametrize("positives", ["same_clip", "two_clips"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_global_batch(manifest: Manifest, world_size: int, positives: str) -> None:
    """Joined in rank order, queries, keys and their draws are bit for bit the same for any number of ranks."""
    settings = settings_with(data={"positives": positives})
    (alone,) = [Loader(manifest, settings, rank=0, world_size=1).batch(4)]
    parts = [Loader(manifest, settings, rank=rank, world_size=world_size).batch(4) for rank in range(world_size)]
    for get in (
        lambda batch: batch.query.frames,
        lambda batch: batch.query.draws,
        lambda batch: batch.key.frames,
        lambda batch: batch.key.draws,
        lambda batch: batch.random_importance,
    ):
        assert torch.equal(torch.cat([get(part) for part in parts]), get(alone))
    assert [clip_id for part in parts for clip_id in part.clip_ids] == alone.clip_ids
    for part in parts:
        assert torch.equal(part.key_order, alone.key_order)
        assert torch.equal(part.video_ids, alone.video_ids)
        assert part.clips_per_rank == [len(each.clip_ids) for each in parts]
        assert part.clip_ids == alone.clip_ids[part.share]


def test_held_out_videos_never_appear(manifest: Manifest) -> None:
    """Over four epochs every clip of the other videos comes up, and none of the two that are held out."""
    held_out = {line["clip_id"] for line in manifest.table.to_pylist() if line["held_out"]}
    others = set(manifest.table["clip_id"].to_pylist()) - held_out
    assert len(held_out) == 4
    loader = Loader(manifest, settings_with(train={"steps": 20}), rank=0, world_size=1)
    assert {clip_id for batch in loader for clip_id in batch.clip_ids} == others


def test_key_shows_the_frames_of_its_query_in_another_view(manifest: Manifest) -> None:
    """The key of a draw has the same frames as its query; its augmentation differs in crop and in every colour."""
    batch = Loader(manifest, SETTINGS, rank=0, world_size=1).batch(2)
    order = batch.key_order
    assert torch.equal(batch.key.frames, batch.query.frames[order])
    differing = batch.key.draws != batch.query.draws[order]
    for column in (augment.WIDTH, augment.BRIGHTNESS, augment.CONTRAST, augment.SATURATION, augment.HUE):
        assert differing[:, column].float().mean() > 0.8
    assert not torch.equal(order, torch.arange(12))


TWO_CLIPS = settings_with(data={"positives": "two_clips"})


def test_key_of_two_clips_shows_another_clip_of_the_video(manifest: Manifest) -> None:
    """Each key is a window of the video's other clip, at a place of its own; queries and draws are as ever."""
    stored = stored_clips(manifest)
    video_of = dict(zip(manifest.table["clip_id"].to_pylist(), manifest.table["video_id"].to_pylist(), strict=True))
    places = []
    for ours, paper in zip(
        Loader(manifest, TWO_CLIPS, rank=0, world_size=1), Loader(manifest, SETTINGS, rank=0, world_size=1), strict=True
    ):
        assert torch.equal(ours.query.frames, paper.query.frames)
        assert torch.equal(ours.query.draws, paper.query.draws)
        assert torch.equal(ours.key.draws, paper.key.draws)
        assert ours.clip_ids == paper.clip_ids
        for frames, at in zip(ours.key.frames.numpy(), ours.key_order.tolist(), strict=True):
            query = ours.clip_ids[at]
            (other,) = [clip for clip in stored if video_of[clip] == video_of[query] and clip != query]
            key_place = window_of(frames, stored[other], stride=1)
            places.append((window_of(ours.query.frames[at].numpy(), stored[query], stride=1), key_place))
    assert set(places) == {(query, key) for query in range(3) for key in range(3)}, "windows are independent"


def test_two_clips_begin_at_their_step(manifest: Manifest) -> None:
    """Before the step a batch is that of same_clip, from it on that of two_clips, bit for bit; also read alone.

    The keys that measure staleness (`first_keys`) are those of the batch, on both sides of the step.
    """
    settings = settings_with(data={"positives": "two_clips", "two_clips_from_percent": 40})
    start = settings.two_clips_start
    assert 0 < start < NUM_STEPS
    loaders = {kind: Loader(manifest, kind, rank=1, world_size=2) for kind in (settings, SETTINGS, TWO_CLIPS)}
    for step in range(NUM_STEPS):
        batch = loaders[settings].batch(step)
        assert equal(batch, loaders[SETTINGS if step < start else TWO_CLIPS].batch(step))
        assert not equal(batch, loaders[TWO_CLIPS if step < start else SETTINGS].batch(step))
        first, _ = loaders[settings].first_keys(step)
        assert torch.equal(first.frames, batch.key.frames[: len(first.frames)])


def test_video_of_one_clip_gives_a_second_window(tmp_path: Path) -> None:
    """The key shows the same stored clip, often elsewhere."""
    manifest = make_data_set(tmp_path, clips_per_video=1)
    stored = stored_clips(manifest)
    differing = []
    for batch in Loader(manifest, TWO_CLIPS, rank=0, world_size=1):
        for frames, at in zip(batch.key.frames.numpy(), batch.key_order.tolist(), strict=True):
            clip = stored[batch.clip_ids[at]]
            query_frames = batch.query.frames[at].numpy()
            differing.append(window_of(frames, clip, stride=1) != window_of(query_frames, clip, stride=1))
    assert np.mean(differing) == pytest.approx(2 / 3, abs=0.2)  # 3 windows, 84 clips


def test_second_clips_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    """One clip per video and no room for another window: both views would be the same frames, unsaid."""
    manifest = make_data_set(tmp_path, clips_per_video=1)
    with pytest.raises(ValueError, match=r"--data\.positives two_clips: each video of .* has a single clip of .*= 10"):
        check_fits(manifest, settings_with(data={"positives": "two_clips", "num_frames": 10}))
    check_fits(manifest, settings_with(data={"positives": "same_clip", "num_frames": 10}))
    check_fits(manifest, TWO_CLIPS)


def test_videos_are_named_alike_in_every_data_set(manifest: Manifest, tmp_path: Path) -> None:
    """Clips of one video, and no others, share a video id; a data set with more videos gives it the same id."""
    names = dict(zip(manifest.table["clip_id"].to_pylist(), manifest.table["video_id"].to_pylist(), strict=True))
    larger = make_data_set(tmp_path, num_videos=14)
    ids: dict[str, set[int]] = {}
    for each in (manifest, larger):
        for batch in Loader(each, SETTINGS, rank=0, world_size=1):
            for clip_id, video_id in zip(batch.clip_ids, batch.video_ids.tolist(), strict=True):
                if clip_id in names:
                    ids.setdefault(names[clip_id], set()).add(video_id)
    assert len(ids) == 12
    assert all(len(found) == 1 for found in ids.values())
    assert len(set.union(*ids.values())) == 12


def test_random_importance_is_drawn_for_each_clip_and_frame(manifest: Manifest) -> None:
    """Uniform in [0, 1): no two numbers of a batch are equal, and their mean is near a half."""
    importance = Loader(manifest, SETTINGS, rank=0, world_size=1).batch(0).random_importance
    assert importance.shape == (12, 8)
    assert importance.unique().numel() == 12 * 8
    assert importance.min() >= 0
    assert importance.max() < 1
    assert importance.mean().item() == pytest.approx(0.5, abs=4 * 0.289 / 96**0.5)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.timeout(30)
def test_removed_shard_is_an_error_in_the_consumer(tmp_path: Path) -> None:
    """Steps before the first that needs the shard are yielded; then comes the reader's sentence, and no hang."""
    manifest = make_data_set(tmp_path)
    settings = settings_with(train={"global_batch": 2, "micro_batch": 2, "steps": 50})
    loader = Loader(manifest, settings, rank=0, world_size=1)
    shard_of = dict(zip(manifest.table["clip_id"].to_pylist(), manifest.table["shard"].to_pylist(), strict=True))
    needed = [{shard_of[clip_id] for clip_id in loader.batch(step).clip_ids} for step in range(50)]
    last = max("0000", "0001", key=lambda shard: next(at for at, shards in enumerate(needed) if shard in shards))
    first_step = next(at for at, shards in enumerate(needed) if last in shards)
    assert first_step > 0, "choose another seed: both shards are needed at once"

    loader = Loader(manifest, settings, rank=0, world_size=1)
    (tmp_path / "shards" / f"{last}.arrow").unlink()
    batches = iter(loader)
    assert [batch.step for batch in itertools.islice(batches, first_step)] == list(range(first_step))
    with pytest.raises(ValueError, match=rf"{last}\.arrow is missing: restore the shard"):
        next(batches)
    assert loader_threads() == []


@pytest.mark.timeout(30)
def test_leaving_early_ends_the_thread(manifest: Manifest) -> None:
    """Whoever stops taking batches leaves no thread behind, also where it waits to hand over the next one."""
    batches: Iterator[RankBatch] = iter(Loader(manifest, SETTINGS, rank=0, world_size=1))
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()  # type: ignore[attr-defined]
    assert loader_threads() == []
    for _ in Loader(manifest, SETTINGS, rank=0, world_size=1):
        break
    assert loader_threads() == []


@pytest.mark.timeout(30)
def test_loader_reads_only_so_far_ahead(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2 batches ahead, after the first is taken at most 4 are read: 1 taken, 2 waiting, 1 to be handed over."""
    read: list[int] = []
    fourth = threading.Event()
    original = Loader.batch

    def counted(self: Loader, step: int) -> RankBatch:
        read.append(step)
        if step == 3:
            fourth.set()
        return original(self, step)

    monkeypatch.setattr(Loader, "batch", counted)
    batches = iter(Loader(manifest, settings_with(data={"batches_ahead": 2}), rank=0, world_size=1))
    next(batches)
    assert fourth.wait(10), "it reads ahead of the consumer"
    threading.Event().wait(0.3)
    assert read == [0, 1, 2, 3]
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("group", "fields", "said"),
    [
        (
            "data",
            {"num_frames": 11},
            r"--data\.num-frames 11 at --data\.stride 1 spans 11 frames, .* have 10: lower one",
        ),
        (
            "data",
            {"num_frames": 4, "stride": 4},
            r"--data\.num-frames 4 at --data\.stride 4 spans 13 frames, .* have 10: lower",
        ),
        ("augment", {"size": 41}, r"--augment\.size 41 is larger than the stored frames of .*\(40x48\): lower it"),
    ],
)
def test_data_that_do_not_fit_are_refused(manifest: Manifest, group: str, fields: dict[str, Any], said: str) -> None:
    """The sentence has the setting, the data set's value and what to do; one less is taken."""
    with pytest.raises(ValueError, match=said):
        Loader(manifest, settings_with(**{group: fields}), rank=0, world_size=1)
    less = {"num_frames": 10} if group == "data" and "stride" not in fields else {"num_frames": 4, "stride": 3}
    check_fits(manifest, settings_with(data=less, augment={"size": 40}))


def test_data_set_without_training_videos_is_refused(tmp_path: Path) -> None:
    """Where every video is held out there is nothing to train on."""
    manifest = make_data_set(tmp_path, num_videos=2, num_held_out=2)
    with pytest.raises(ValueError, match=r"every video of .* is held out: ingest more videos, or lower"):
        check_fits(manifest, SETTINGS)


def test_memory_comes_back_when_the_last_view_has_gone() -> None:
    """A batch that is held, or of which a slice is held, keeps its memory; then the next batch of its size gets it."""
    memory = BatchMemory(pin_memory=False)
    first = memory.take((4, 1000))
    first.fill_(1)
    place, view = first.data_ptr(), first[2:3]
    second = memory.take((4, 1000))
    assert second.data_ptr() != place
    del first
    third = memory.take((4, 1000))
    third.fill_(3)
    assert view.eq(1).all(), "a slice is still held"
    del view
    assert memory.take((2, 2000)).data_ptr() == place
    assert memory.take((3, 1000)).data_ptr() not in (place, second.data_ptr(), third.data_ptr())


def test_two_threads_may_take_memory_at_once() -> None:
    """The last free piece may go to another thread after this one has seen it: then there is new memory."""

    class TakenByAnother(list[npt.NDArray[np.uint8]]):
        """Looks as if it held a piece, and is empty."""

        def __bool__(self) -> bool:
            return True

    memory = BatchMemory(pin_memory=False)
    memory._free[4000] = TakenByAnother()
    assert memory.take((4, 1000)).shape == (4, 1000)


def test_windows_save_requests(manifest: Manifest, tmp_path: Path, store: Any) -> None:
    """From a store, a run in windows asks for pieces of shards, not for clips; it trains on the clips of its plan."""
    far = dataset.upload(manifest, "s3://bucket/windows")
    stored, asked = stored_clips(manifest), {}
    for window in (0, 4):
        data = {"cache": str(tmp_path / str(window)), "shuffle_window": window, "draws_per_video": 2}
        settings = settings_with(data=data)
        loader = Loader(far, settings, rank=0, world_size=1)
        store.requests.clear()
        batches = list(loader)
        asked[window] = sum(method == "GET" and "/shards/" in path for method, path in store.requests)
        for batch in batches:
            for clip_id, frames in zip(batch.clip_ids, batch.query.frames.numpy(), strict=True):
                window_of(frames, stored[clip_id], stride=settings.data.stride)
        # The 10 videos that are not held out are two windows of 5, drawn twice.
        first = [name for batch in batches for name in batch.video_ids.tolist()][:10]
        assert len(set(first)) == (5 if window else 10)
    assert asked[0] >= 20, "each clip; two threads may ask for one at the same time"
    assert asked[4] == 2, "each shard, which is one piece"
