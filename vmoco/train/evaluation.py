"""The look at each new checkpoint while training goes on: a Ray task with resources of its own, on a frozen copy.

The task takes the encoder out of the checkpoint's files, so it needs nothing of the workers, and training never waits
for it. One is looked at at a time; where checkpoints come faster, the newest that waits takes the place of an older
one, which then stays without a score.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vmoco.cluster.reservation import resources
from vmoco.config import PretrainSettings
from vmoco.data.manifest import Manifest
from vmoco.encoders.encoder import Encoder
from vmoco.encoders.promotion import Score
from vmoco.evaluate.features import clip_features
from vmoco.evaluate.knn import classify
from vmoco.evaluate.score import label_free_score, score_encoder
from vmoco.train.checkpoints import Kept
from vmoco.train.publish import encoder_in
from vmoco.train.resume import local_copy

SCORE = "score/retrieval"
"""The number that chooses among checkpoints: higher is better."""


@ray.remote(max_retries=2)
def evaluate(uri: str, data_uri: str, max_videos: int) -> tuple[Score, dict[str, float]]:
    """Scores the encoder of a checkpoint on the held-out videos of its data set.

    Returns:
        The label-free score, as it is recorded; all numbers, by name.

    Raises:
        ValueError: there are too few videos for a score, or the checkpoint is damaged.
    """
    manifest = Manifest.load(data_uri)
    with local_copy(uri) as checkpoint:
        encoder = encoder_in(checkpoint, manifest=manifest).to("cuda" if torch.cuda.is_available() else "cpu")
    found = score_encoder(encoder, manifest, max_videos=max_videos)
    numbers = found.numbers()
    if (accuracy := knn_accuracy(encoder, manifest, max_clips=4 * max_videos)) is not None:
        numbers["knn"] = accuracy
    return label_free_score(found), {f"score/{name}": value for name, value in numbers.items()}


def score_now(kept: Kept, settings: PretrainSettings, group: PlacementGroup | None) -> Score:
    """The score of a checkpoint, waited for.

    Raises:
        ray.exceptions.RayError: the task failed.
    """
    found: tuple[Score, dict[str, float]] = ray.get(_start(kept, settings, group))
    return found[0]


def _start(kept: Kept, settings: PretrainSettings, group: PlacementGroup | None) -> Any:
    wanted = resources(settings.evaluation)
    task = evaluate.options(
        num_cpus=wanted.get("CPU", 0),
        num_gpus=wanted.get("GPU", 0),
        # Without this a task would inherit the placement group of the worker that starts it, and never run.
        scheduling_strategy=PlacementGroupSchedulingStrategy(group) if group else "DEFAULT",
    )
    return task.remote(kept.uri, settings.data.uri, settings.evaluation.max_videos)


def knn_accuracy(encoder: Encoder, manifest: Manifest, *, max_clips: int) -> float | None:
    """Share of labelled held-out clips that their nearest training clips class right.

    Args:
        encoder: in evaluation mode.
        manifest: data set.
        max_clips: at most so many clips of either part take part, evenly spread.

    Returns:
        None where either part has no labelled clip.
    """
    labelled = manifest.table.filter(pc.is_valid(manifest.table["label"]))
    parts = [_spread(labelled.filter(pc.equal(labelled["held_out"], held)), max_clips) for held in (False, True)]
    if not all(part.num_rows for part in parts):
        return None
    names = np.unique(np.concatenate([part["label"].to_numpy(zero_copy_only=False) for part in parts]).astype(str))
    train, test = (np.searchsorted(names, part["label"].to_numpy(zero_copy_only=False).astype(str)) for part in parts)
    gallery, queries = (clip_features(encoder, manifest, part) for part in parts)
    votes = classify(queries, [gallery], train)
    return float((votes.argmax(axis=1) == test).mean())


def _spread(rows: pa.Table, count: int) -> pa.Table:
    if rows.num_rows <= count:
        return rows
    return rows.take(np.linspace(0, rows.num_rows - 1, count).round().astype(np.int64))


@dataclass
class _Waiting:
    kept: Kept
    release: Callable[[], Any]


class Evaluator:
    """Has new checkpoints scored, one at a time, in a thread.

    Args:
        settings: of the run.
        group: from `reserve`.
        hold: keeps the checkpoint of a step from being removed.
        done: takes the score of a checkpoint, and all numbers.
        failed: takes a sentence about one that could not be scored; training goes on.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        group: PlacementGroup | None,
        *,
        hold: Callable[[int], contextlib.AbstractContextManager[None]],
        done: Callable[[Kept, Score, dict[str, float]], None],
        failed: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._group = group
        self._hold = hold
        self._done = done
        self._failed = failed
        self._waiting: _Waiting | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="evaluator", daemon=True)
        self._thread.start()

    def submit(self, kept: Kept) -> None:
        """Has a checkpoint scored; takes the place of one that still waits."""
        held = self._hold(kept.step)
        held.__enter__()
        with self._wake:
            before, self._waiting = self._waiting, _Waiting(kept, lambda: held.__exit__(None, None, None))
            self._wake.notify()
        if before is not None:
            before.release()

    def close(self, *, wait_seconds: float) -> bool:
        """Ends, when what waits is scored or the time is over; returns whether all was scored."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(wait_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._waiting is None and not self._closing:
                    self._wake.wait()
                if self._waiting is None:
                    return
                now, self._waiting = self._waiting, None
            try:
                score, numbers = ray.get(_start(now.kept, self._settings, self._group))
                self._done(now.kept, score, numbers)
            except Exception as error:  # whatever goes wrong with a look, training goes on
                self._failed(f"checkpoint of step {now.kept.step} was not scored: {str(error).splitlines()[-1]}")
            finally:
                now.release()
