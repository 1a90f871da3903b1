"""Checkpoints are scored while training goes on, one at a time, within a time, and a failure there stops nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tests.dataset import make_data_set, upload
from tests.train.test_checkpoint_writer import Tracker
from tests.train.test_step import CPU, changed
from tests.waiting import wait_until
from vmoco.cluster.local import LocalCluster
from vmoco.data.mixture import Mixture
from vmoco.evaluate.score import scored_clips
from vmoco.job_settings import Metric
from vmoco.presets import PRESETS
from vmoco.spool import Spool
from vmoco.train.run_folder import CHECKPOINTS, Checkpoint, RunFolder, checkpoints_from_json
from vmoco.train.state import TrainState

SETTINGS = PRESETS["tiny"][1]


def checkpoint(folder: RunFolder, step: int, manifest_hash: str) -> Checkpoint:
    """Writes and lists a checkpoint of an untrained state."""
    state = TrainState(SETTINGS, manifest_hash=manifest_hash, device=CPU)
    state.step = step
    place = Path(folder.checkpoint_uri(step))
    place.mkdir(parents=True)
    made = Checkpoint(step, str(place), state.save(place).sha256)
    folder.add(made)
    return made


@pytest.mark.cluster
def test_checkpoints_are_scored_and_a_damaged_one_is_reported(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    """Retrieval beside mean colour, rank, and kNN because there are labels; of three that wait the newest is scored.

    A checkpoint that waits or is being scored is in use; in the end none is. The score is in the list and the tracker.
    """
    import ray

    from vmoco.cluster.reservation import reserve
    from vmoco.train.channel import Channel
    from vmoco.train.evaluation import SCORE, Evaluator

    manifest = make_data_set(tmp_path / "data", num_videos=16, clips_per_video=3, num_held_out=6, labels=("a", "b"))
    settings = changed(SETTINGS, data={"uri": str(tmp_path / "data")}, evaluation={"num_cpus": 1})
    group = reserve(settings.evaluation, timeout=60)
    folder, tracker, lines = RunFolder(str(tmp_path / "run")), Tracker(), list[str]()
    folder.claim(lease="this job")
    made = {step: checkpoint(folder, step, manifest.hash) for step in (1, 2, 3, 4)}
    spool = Spool(tracker, name="the tracker")
    channel = Channel.remote()  # type: ignore[attr-defined]
    evaluator = Evaluator(folder, settings, group, spool=spool, channel=channel, show=lines.append)
    Path(made[1].uri, "state.json").write_text("{")
    evaluator.submit(made[1])
    wait_until(lambda: evaluator.num_failed == 1, "the damaged checkpoint has failed", seconds=60)
    assert "warning: checkpoint of step 1 was not scored" in lines[0]
    for step in (2, 3, 4):
        evaluator.submit(made[step])
    assert evaluator.in_use() >= {4}
    assert evaluator.close(wait_seconds=120)
    assert evaluator.in_use() == set()
    measured = ray.get(channel.take_samples.remote())
    assert all(sample.numbers["system_memory_usage_megabytes"] > 0 for sample in measured)
    assert measured, "no worker is there, so the task says how its machine does"
    assert spool.close() == ""
    scores = {row.step: row.score for row in folder.checkpoints()}
    assert scores[3] is None
    assert scores[4] is not None
    numbers = evaluator.numbers
    assert numbers["scored_step"] == 4
    assert scores[4].value == numbers[SCORE]
    assert scores[4].evaluation_set == scored_clips(manifest, max_videos=settings.evaluation.max_videos)[1]
    assert checkpoints_from_json(tracker.documents[CHECKPOINTS]) == folder.checkpoints()
    assert {SCORE, f"{SCORE}_by_colour", "score/effective_rank", "score/knn"} <= set(numbers)
    assert all(np.isfinite(value) for value in numbers.values())
    assert 0 <= numbers["score/knn"] <= 1
    ray.util.remove_placement_group(group)
    with pytest.raises(ValueError, match=r"no node has 99 CPU free .*: lower --evaluation\.num-cpus"):
        reserve(changed(SETTINGS, evaluation={"num_cpus": 99}).evaluation, timeout=1)
    assert reserve(changed(SETTINGS, evaluation={"num_cpus": 0}).evaluation, timeout=1) is None


@pytest.mark.cluster
def test_a_score_that_takes_too_long_is_cancelled(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    """After the limit the message names the flags to change; the driver waits no longer."""
    from vmoco.train.evaluation import score_now

    manifest = make_data_set(tmp_path / "data", num_videos=16, clips_per_video=3, num_held_out=6)
    settings = changed(SETTINGS, data={"uri": str(tmp_path / "data")})
    made = checkpoint(RunFolder(str(tmp_path / "run")), 1, manifest.hash)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"lower --evaluation\.max-videos 20, raise --evaluation\.num-cpus 0"):
        score_now(made, settings, None, timeout=0.01)
    assert time.monotonic() - started < 30


def test_a_score_computes_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --evaluation.device cpu it stays on the CPU of a machine with a GPU, and its task sees none."""
    from vmoco.train.evaluation import score_checkpoint, task_options

    manifest = make_data_set(tmp_path / "data", num_videos=16, clips_per_video=3, num_held_out=6)
    made = checkpoint(RunFolder(str(tmp_path / "run")), 1, manifest.hash)
    data = changed(SETTINGS, data={"uri": manifest.uri}).data
    # This PyTorch has no GPU: whatever moves there, because there seems to be one, fails.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    score, numbers = score_checkpoint(made.uri, data, max_videos=6, device="cpu")
    assert 0 <= score.value <= 1
    without = {f"score/{metric}" for metric in get_args(Metric)} - set(numbers)
    assert without == {"score/knn", "score/speed", "score/order"}, "a sweep can choose by all"
    hidden = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    assert task_options(changed(SETTINGS, evaluation={"num_cpus": 2}), None)["runtime_env"] == hidden
    for device, share in (("gpu", 1), ("shared-gpu", 0.02)):
        with_gpu = task_options(changed(SETTINGS, evaluation={"device": device}), None)
        assert with_gpu["num_gpus"] == share
        assert "runtime_env" not in with_gpu


def test_a_score_tells_of_motion_where_it_is_asked_to(tmp_path: Path) -> None:
    """Speed and order of each set that has enough videos, and their mean by weight; of too few videos none."""
    from vmoco.train.evaluation import score_checkpoint

    sizes = {"few": 16, "films": 20, "sports": 24}
    for name, count in sizes.items():
        make_data_set(tmp_path / name, num_videos=count, clips_per_video=3, num_held_out=count // 2, num_frames=16)
    data = changed(SETTINGS, data={"uri": [str(tmp_path / name) for name in sizes], "weights": [0.5, 0.4, 0.1]}).data
    made = checkpoint(RunFolder(str(tmp_path / "run")), 1, Mixture.load(data).hash)
    _, numbers = score_checkpoint(made.uri, data, max_videos=60, device="cpu", motion=True)
    for probe, classes in (("speed", 3), ("order", 2)):
        films, sports = (numbers[f"score/{probe}_of_{name}"] for name in ("films", "sports"))
        assert f"score/{probe}_of_few" not in numbers
        assert (films * 30 * classes) % 1 == pytest.approx(0, abs=1e-6), "a share of 10 videos with 3 clips each"
        assert numbers[f"score/{probe}"] == pytest.approx(0.8 * films + 0.2 * sports)
    _, least = score_checkpoint(made.uri, data, max_videos=2, device="cpu", motion=True)
    for probe in ("speed", "order"):
        films = least[f"score/{probe}_of_films"]
        assert (films * 20 * (3 if probe == "speed" else 2)) % 1 == pytest.approx(0, abs=1e-6), "two clips of each"


def test_a_score_reads_through_the_cache_of_the_run(tmp_path: Path, store: Any, vmoco_home: Path) -> None:
    """--data.cache and --data.cache-gib hold for the clips that are scored; the default cache is not made."""
    from vmoco.train.evaluation import score_checkpoint

    manifest = make_data_set(
        tmp_path / "data", num_videos=16, clips_per_video=3, num_held_out=6, labels=("a", "b"), encoding="jpeg"
    )
    far = upload(manifest, "s3://bucket/set")
    made = checkpoint(RunFolder(str(tmp_path / "run")), 1, manifest.hash)
    cache = tmp_path / "cache"
    data = changed(SETTINGS, data={"uri": far.uri, "cache": str(cache)}).data
    score, _ = score_checkpoint(made.uri, data, max_videos=6, device="cpu")
    assert (
        score
        == score_checkpoint(made.uri, changed(SETTINGS, data={"uri": manifest.uri}).data, max_videos=6, device="cpu")[0]
    )
    scored = scored_clips(manifest, max_videos=6)[0]["sha256"].to_pylist()
    assert {path.name for path in cache.glob("clips/??/*")} >= set(scored)
    assert not (vmoco_home / "cache").exists()
    small = data.model_copy(update={"cache": str(tmp_path / "small"), "cache_gib": 1e-6})
    with pytest.raises(ValueError, match=r"--data\.cache .*small/clips may hold 0\.000 GiB, .*: raise its bound"):
        score_checkpoint(made.uri, small, max_videos=6, device="cpu")
