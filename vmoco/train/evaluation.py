"""Scores each new checkpoint while training goes on, in a Ray task with resources of its own.

The task reads the encoder from the checkpoint's files, so it needs nothing of the workers, and training never waits for
it. One checkpoint is scored at a time. Where checkpoints come faster than scores, the newest one that waits replaces an
older one, which then has no score.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.exceptions
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vmoco.clip_settings import DataSettings
from vmoco.cluster.reservation import resources
from vmoco.config import PretrainSettings
from vmoco.data.clip_cache import ClipCache, cache_for
from vmoco.data.manifest import Manifest
from vmoco.data.mixture import Mixture
from vmoco.encoders.encoder import Encoder
from vmoco.encoders.promotion import Score
from vmoco.evaluate.features import clip_features
from vmoco.evaluate.knn import classify
from vmoco.evaluate.mixture_score import joined_numbers, joined_score, score_mixture
from vmoco.evaluate.motion import CLIPS, MIN_VIDEOS
from vmoco.evaluate.motion_probes import probe_encoder
from vmoco.evaluate.score import TooFewVideosError
from vmoco.model.cost import SCORE_SECONDS
from vmoco.spool import Spool
from vmoco.train.machines import reported
from vmoco.train.publish import encoder_in
from vmoco.train.run_folder import CHECKPOINTS, Checkpoint, RunFolder, checkpoints_to_json, local_copy

SCORE = "score/retrieval"
"""The number that chooses among checkpoints: higher is better."""
Scored = tuple[Score, dict[str, float]]


def score_checkpoint(uri: str, data: DataSettings, *, max_videos: int, device: str, motion: bool = False) -> Scored:
    """Scores the encoder of a checkpoint on the held-out videos of its data sets.

    Args:
        uri: of the checkpoint.
        data: of the run: its data sets, and the cache of their clips.
        max_videos: largest number of held-out videos that take part.
        device: "cpu" or "cuda".
        motion: whether the linear probes of `motion` are measured too.

    Returns:
        The label-free score, as it is recorded; all numbers, by name.

    Raises:
        ValueError: there are too few videos for a score, or the checkpoint is damaged.
    """
    mixture = Mixture.load(data)

    def cache_of(manifest: Manifest) -> ClipCache | None:
        return cache_for(manifest.uri, folder=data.cache, gib=data.cache_gib)

    with local_copy(uri) as checkpoint:
        encoder = encoder_in(checkpoint, data=mixture).to(torch.device(device))
    scored = score_mixture(encoder, mixture, max_videos=max_videos, cache_of=cache_of)
    numbers = joined_numbers(scored)
    count = len(mixture.manifests)
    probed = min(CLIPS, 2 * max(max_videos // count, MIN_VIDEOS))  # two clips of each video
    by_set: dict[str, dict[str, float]] = {}
    for name, manifest in zip(mixture.names, mixture.manifests, strict=True):
        cache = cache_of(manifest)
        accuracy = knn_accuracy(encoder, manifest, max_clips=4 * max_videos // count, cache=cache)
        by_set[name] = {} if accuracy is None else {"knn": accuracy}
        if motion:
            with contextlib.suppress(TooFewVideosError):  # of this set; the start of the run has said so
                by_set[name] |= probe_encoder(encoder, manifest, max_clips=probed, cache=cache)
    numbers |= _means(by_set, mixture)
    return joined_score(scored), {f"score/{name}": value for name, value in numbers.items()}


def _means(by_set: Mapping[str, Mapping[str, float]], mixture: Mixture) -> dict[str, float]:
    """The mean of each number by weight, over the sets that have it; of several sets that of each too."""
    weights, means = dict(zip(mixture.names, mixture.weights, strict=True)), {}
    for what in dict.fromkeys(what for numbers in by_set.values() for what in numbers):
        found = {name: numbers[what] for name, numbers in by_set.items() if what in numbers}
        total = sum(weights[name] for name in found)
        means[what] = sum(weights[name] / total * value for name, value in found.items())
        if not mixture.is_one:
            means |= {f"{what}_of_{name}": value for name, value in found.items()}
    return means


def score_and_report(
    uri: str, data: DataSettings, *, max_videos: int, device: str, motion: bool, channel: Any | None, run: str
) -> Scored:
    """`score_checkpoint`, while this machine is reported to the channel of the run, if there is one."""
    with contextlib.ExitStack() as stack:
        if channel is not None:
            stack.enter_context(reported(channel, run=run, by_worker=False))
        return score_checkpoint(uri, data, max_videos=max_videos, device=device, motion=motion)


def task_options(settings: PretrainSettings, group: PlacementGroup | None) -> dict[str, Any]:
    """Options of the Ray task: its resources and where it runs.

    Args:
        settings: of the run.
        group: resources that are reserved for the task; None where it shares those of the workers.
    """
    wanted = resources(settings.evaluation)
    options: dict[str, Any] = {
        "num_cpus": wanted.get("CPU", 0),
        "num_gpus": wanted.get("GPU", 0),
        "max_retries": 2,
        # Without this a task would inherit the placement group of the worker that starts it, and never run.
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group) if group else "DEFAULT",
    }
    if not settings.evaluation.use_gpu:
        # Ray 2.60 hides no GPU from a task that asks for none, and libraries take memory on a GPU that they see.
        options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    return options


def score_now(
    checkpoint: Checkpoint, settings: PretrainSettings, group: PlacementGroup | None, *, timeout: float = SCORE_SECONDS
) -> Score:
    """The label-free score of a checkpoint; raises as `score_in_task` does."""
    return score_in_task(checkpoint, settings, group, timeout=timeout)[0]


def score_in_task(
    checkpoint: Checkpoint,
    settings: PretrainSettings,
    group: PlacementGroup | None,
    *,
    timeout: float = SCORE_SECONDS,
    channel: Any | None = None,
) -> Scored:
    """Scores a checkpoint in a Ray task, and waits for it; after `timeout` seconds the task is cancelled.

    While workers train, `channel` is that of the run, and receives how the machine of the task does.

    Raises:
        TimeoutError: it took longer; the message says what to change.
        ray.exceptions.RayError: the task failed.
    """
    remote: Any = ray.remote  # mypy knows only functions without keyword arguments
    device = "cuda" if settings.evaluation.use_gpu else "cpu"
    reference = (
        remote(score_and_report)
        .options(**task_options(settings, group))
        .remote(
            checkpoint.uri,
            settings.data,
            max_videos=settings.evaluation.max_videos,
            device=device,
            motion=settings.evaluation.motion,
            channel=channel,
            run=settings.run.name or "",
        )
    )
    try:
        scored: Scored = ray.get(reference, timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        raise TimeoutError(
            f"the score took more than {timeout / 60:.0f} min: lower --evaluation.max-videos "
            f"{settings.evaluation.max_videos}, raise --evaluation.num-cpus {settings.evaluation.num_cpus}, or set "
            "--evaluation.device gpu"
        ) from None
    return scored


def knn_accuracy(
    encoder: Encoder, manifest: Manifest, *, max_clips: int, cache: ClipCache | None = None
) -> float | None:
    """Share of labelled held-out clips whose class their nearest training clips predict.

    Args:
        encoder: in evaluation mode.
        manifest: data set.
        max_clips: largest number of clips of each part, evenly spread.
        cache: of the clips of a remote data set; the default one when left out.

    Returns:
        None where one of the parts has no labelled clip.
    """
    labelled = manifest.rows(lambda piece: pc.is_valid(piece["label"]))
    parts = [_spread(labelled.filter(pc.equal(labelled["held_out"], held)), max_clips) for held in (False, True)]
    if not all(part.num_rows for part in parts):
        return None
    names = np.unique(np.concatenate([part["label"].to_numpy(zero_copy_only=False) for part in parts]).astype(str))
    train, test = (np.searchsorted(names, part["label"].to_numpy(zero_copy_only=False).astype(str)) for part in parts)
    gallery, queries = (clip_features(encoder, manifest, part, cache=cache) for part in parts)
    votes = classify(queries, [gallery], train)
    return float((votes.argmax(axis=1) == test).mean())


def _spread(rows: pa.Table, count: int) -> pa.Table:
    if rows.num_rows <= count:
        return rows
    return rows.take(np.linspace(0, rows.num_rows - 1, count).round().astype(np.int64))


class Evaluator:
    """Scores checkpoints in a thread, one at a time.

    Args:
        folder: of the run; its list receives the scores.
        settings: of the run.
        group: resources that are reserved for the task; None where it shares those of the workers.
        spool: receives the numbers.
        channel: of the run; receives how the machine of the task does.
        show: prints a line.

    Attributes:
        num_failed: number of checkpoints that could not be scored.
        numbers: of the last checkpoint that was scored, with its step; for Ray Tune.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: PretrainSettings,
        group: PlacementGroup | None,
        *,
        spool: Spool,
        channel: Any,
        show: Callable[[str], None],
    ) -> None:
        self._channel = channel
        self._folder = folder
        self._settings = settings
        self._group = group
        self._spool = spool
        self._show = show
        self.num_failed = 0
        self.numbers: dict[str, float] = {}
        self._waiting: Checkpoint | None = None
        self._current: Checkpoint | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="evaluator", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Checkpoint) -> None:
        """Scores a checkpoint, after the one that is being scored; replaces another one that waits."""
        with self._wake:
            self._waiting = checkpoint
            self._wake.notify()

    def in_use(self) -> set[int]:
        """Steps of the checkpoints that wait or are being scored: they must not be deleted."""
        with self._wake:
            return {checkpoint.step for checkpoint in (self._waiting, self._current) if checkpoint is not None}

    def close(self, *, wait_seconds: float) -> bool:
        """Ends when the checkpoint that waits is scored, or after `wait_seconds`; returns whether all were scored."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(wait_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._current = None
                while self._waiting is None and not self._closing:
                    self._wake.wait()
                if self._waiting is None:
                    return
                checkpoint = self._current = self._waiting
                self._waiting = None
            try:
                self._score(checkpoint)
            except Exception as error:  # whatever goes wrong here, training goes on
                self.num_failed += 1
                self._show(
                    f"warning: checkpoint of step {checkpoint.step} was not scored: {str(error).splitlines()[-1]}"
                )

    def _score(self, checkpoint: Checkpoint) -> None:
        score, numbers = score_in_task(checkpoint, self._settings, self._group, channel=self._channel)
        self.numbers = numbers | {"scored_step": float(checkpoint.step)}
        self._spool.points(numbers, step=checkpoint.step)
        self._folder.add_score(checkpoint.step, score)
        self._spool.document(CHECKPOINTS, checkpoints_to_json(self._folder.checkpoints()))
        self._show(
            f"checkpoint of step {checkpoint.step} scores {score.value:.3f}; mean colour alone "
            f"{numbers[f'{SCORE}_by_colour']:.3f}"
        )
