"""Checkpoints are scored beside training, one at a time, and what goes wrong there stops nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.dataset import make_data_set
from tests.train.test_step import CPU, changed
from vmoco.cluster.local import LocalCluster
from vmoco.encoders.promotion import Score
from vmoco.evaluate.score import scored_clips
from vmoco.presets import PRESETS
from vmoco.train.checkpoints import Kept
from vmoco.train.resume import uri_of
from vmoco.train.state import TrainState

pytestmark = pytest.mark.cluster

SETTINGS = PRESETS["tiny"][1]


class Looks:
    """What an evaluator was asked for and said, and which checkpoints it held."""

    def __init__(self) -> None:
        self.scored: dict[int, tuple[Score, dict[str, float]]] = {}
        self.failed: list[str] = []
        self.held: set[int] = set()

    @contextlib.contextmanager
    def hold(self, step: int) -> Iterator[None]:
        self.held.add(step)
        yield
        self.held.discard(step)

    def done(self, kept: Kept, score: Score, numbers: dict[str, float]) -> None:
        self.scored[kept.step] = score, numbers


def checkpoint(folder: Path, step: int, manifest_hash: str) -> Kept:
    state = TrainState(SETTINGS, manifest_hash=manifest_hash, device=CPU)
    state.step = step
    place = Path(uri_of(str(folder), step))
    place.mkdir(parents=True)
    return Kept(step, str(place), state.save(place).sha256)


def test_checkpoints_are_scored_and_a_damaged_one_is_said(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    """Retrieval beside mean colour, rank, and kNN as there are labels; of three that wait, the newest is looked at.

    While one is looked at or waits it is held; in the end none is.
    """
    import ray

    from vmoco.cluster.reservation import reserve
    from vmoco.train.evaluation import SCORE, Evaluator

    manifest = make_data_set(tmp_path / "data", num_videos=16, clips_per_video=3, num_held_out=6, labels=("a", "b"))
    settings = changed(SETTINGS, data={"uri": str(tmp_path / "data")}, evaluation={"num_cpus": 1})
    group = reserve(settings.evaluation, timeout=60)
    looks = Looks()
    evaluator = Evaluator(settings, group, hold=looks.hold, done=looks.done, failed=looks.failed.append)
    kept = {step: checkpoint(tmp_path / "run", step, manifest.hash) for step in (1, 2, 3, 4)}
    Path(kept[1].uri, "state.json").write_text("{")
    evaluator.submit(kept[1])
    end = time.monotonic() + 60
    while not looks.failed and time.monotonic() < end:
        time.sleep(0.1)
    assert "checkpoint of step 1 was not scored" in looks.failed[0]
    for step in (2, 3, 4):
        evaluator.submit(kept[step])
    assert looks.held >= {4}
    assert evaluator.close(wait_seconds=120)
    assert 4 in looks.scored
    assert 3 not in looks.scored
    assert looks.held == set()
    score, numbers = looks.scored[4]
    assert score.value == numbers[SCORE]
    assert score.evaluation_set == scored_clips(manifest, max_videos=settings.evaluation.max_videos)[1]
    assert {SCORE, f"{SCORE}_by_colour", "score/effective_rank", "score/knn"} <= set(numbers)
    assert all(np.isfinite(value) for value in numbers.values())
    assert 0 <= numbers["score/knn"] <= 1
    ray.util.remove_placement_group(group)
    with pytest.raises(ValueError, match=r"no node has \{'CPU': 99.0\} free .*: lower evaluation\.num-cpus"):
        reserve(changed(SETTINGS, evaluation={"num_cpus": 99}).evaluation, timeout=1)
    assert reserve(changed(SETTINGS, evaluation={"num_cpus": 0}).evaluation, timeout=1) is None
