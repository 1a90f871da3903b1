"""What runs in each Ray Train worker: builds the state, resumes it, trains, and keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch

from vmoco import storage, tracking
from vmoco.cluster import ray_internals
from vmoco.config import PretrainSettings
from vmoco.data.manifest import Manifest
from vmoco.encoders.promotion import Score
from vmoco.model.precision import autocast_dtype, require_determinism
from vmoco.train.channel import StopWatch, errors_reported
from vmoco.train.checkpoints import LIST, Checkpoints, Kept, list_text
from vmoco.train.evaluation import SCORE, Evaluator
from vmoco.train.fork import fork
from vmoco.train.lease import Fence
from vmoco.train.loop import train
from vmoco.train.resume import resume
from vmoco.train.run import INIT
from vmoco.train.state import TrainState
from vmoco.train.system_metrics import Gauges, SystemMetrics

SPOOL = "spool.json"
"""What the tracker had not taken when the last checkpoint was kept, in the run's folder."""
_LAST_SCORE_SECONDS = 600.0
"""A finished run waits for the score of its last checkpoint at most so long."""


def run_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """Entry point of a worker.

    Args:
        config: settings (JSON), tracking_uri, run_id, run_folder (URI), lease (token), channel (actor), evaluation
            (placement group or None).

    Returns:
        Of the last checkpoint what `Kept` holds, from the first rank.
    """
    if ray.get(config["channel"].error.remote()):
        return None  # Ray restarts after every error; one that a person has to mend would only come again
    with errors_reported(config["channel"]):
        return _run(config)


def _run(config: dict[str, Any]) -> dict[str, Any] | None:
    settings = PretrainSettings.model_validate_json(config["settings"])
    torch.set_num_threads(settings.scaling.cpus_per_worker)
    device = ray.train.torch.get_device()
    if settings.train.deterministic:
        require_determinism(settings.model.backbone, device)
    manifest = Manifest.load(settings.data.uri)
    dtype, reason = autocast_dtype(settings.train.precision, device)
    state = TrainState(settings, manifest_hash=manifest.hash, device=device, autocast_dtype=dtype)
    host = RayHost(config, settings)
    finished = False
    try:
        found = resume(config["run_folder"], state)
        if found is None and settings.run.fork:
            fork(settings.run.fork, state, autocast_dtype=dtype)
        elif found is None and settings.model.init:
            _start_from(storage.join(config["run_folder"], INIT), state)
        host.begin(state, damaged=found.damaged if found else [])
        if host.is_first:
            host.say(f"{host.num_ranks} workers on {device.type}, {reason}, from step {state.step}")
        finished = train(settings, manifest, state, device=device, host=host)
    finally:
        host.close(finished=finished)
    return vars(host.last) if host.last else None


def _start_from(uri: str, state: TrainState) -> None:
    """Loads the backbone that the run's folder holds into both encoders of a new state."""
    weights = safetensors.torch.load(storage.read_bytes(uri))
    for encoder in (state.moco.query, state.moco.key):
        encoder.backbone.load_state_dict(weights)


class RayHost:
    """Connects the training loop with the run's folder, MLflow, the evaluation and the driver.

    Args:
        config: as for `run_worker`.
        settings: of the run.

    Attributes:
        last: newest checkpoint that is kept; on the first rank.
    """

    def __init__(self, config: dict[str, Any], settings: PretrainSettings) -> None:
        context = ray.train.get_context()
        self.is_first = context.get_world_rank() == 0
        self.num_ranks = context.get_world_size()
        self.last: Kept | None = None
        self._settings = settings
        self._config = config
        self._stop = StopWatch(config["channel"])
        self._gauges = Gauges(settings.run.name or "")
        self._preempted = False
        self._score: dict[str, float] = {}
        self._counts = {"checkpoints_damaged": 0, "checkpoints_failed": 0, "evaluations_failed": 0}
        self._spool: tracking.Spool | None = None
        self._system: SystemMetrics | None = None
        self._checkpoints: Checkpoints | None = None
        self._evaluator: Evaluator | None = None
        may_send: Callable[[], None] = lambda: None  # noqa: E731
        file = None
        if self.is_first:
            fence = Fence(config["run_folder"], lease=config["lease"])
            may_send, file = fence.check, storage.join(config["run_folder"], SPOOL)
            self._checkpoints = Checkpoints(
                config["run_folder"],
                run_id=config["run_id"],
                keep=settings.train.keep_checkpoints,
                keep_best=settings.train.keep_best,
                may_write=fence.check,
                before=self._save_spool,
                changed=self._listed,
                failed=self._not_kept,
            )
            if settings.evaluation.enabled:
                self._evaluator = Evaluator(
                    settings,
                    config["evaluation"],
                    hold=self._checkpoints.hold,
                    done=self._scored,
                    failed=self._not_scored,
                )
        if context.get_local_rank() == 0:  # one of each machine says how the machine is
            self._spool = tracking.spool(
                config["tracking_uri"], config["run_id"], file=file, may_send=may_send, warn=self.say
            )
            node = "" if context.get_node_rank() == 0 else f"node-{context.get_node_rank()}"
            self._system = SystemMetrics(node)

    def begin(self, state: TrainState, *, damaged: list[str]) -> None:
        """Takes the run up at the state's step."""
        if self._checkpoints is None:
            return
        kept = self._checkpoints.resumed(state.step)
        self.last = kept[-1] if kept else None
        self._counts["restarts"] = ray.get(self._config["channel"].started.remote())
        self._counts["checkpoints_damaged"] = len(damaged)
        for sentence in damaged:
            self.say(f"warning: {sentence}; going on from the checkpoint before")
        if self._evaluator and self.last and self.last.score is None:
            self._evaluator.submit(self.last)

    def stop_requested(self) -> bool:
        return self._stop.requested()

    def checkpoint_requested(self) -> bool:
        if self._preempted or (notice := ray_internals.preemption_info()) is None:
            return False
        self._preempted = True  # once for each group of workers: Ray starts a new one when the machine has gone
        if self.is_first:
            self.say(f"{notice}: keeping a checkpoint now")
        return True

    def say(self, line: str) -> None:
        self._config["channel"].say.remote(line)

    def track(self, numbers: dict[str, float], *, step: int) -> None:
        if self._spool is None or self._system is None:
            return
        counts = self._counts if self.is_first else {}
        numbers = numbers | counts | self._system.numbers()
        self._spool.points(numbers, step=step)
        self._gauges.show(numbers, step=step)

    def document(self, name: str, content: str | bytes) -> None:
        assert self._spool is not None, "rank 0 tracks"
        self._spool.document(name, content)

    def checkpoint(self, state: TrainState) -> None:
        """Rank 0 copies; all ranks report, because Ray counts reports, and hands the numbers on to Ray Tune."""
        if self._checkpoints is not None:
            self._checkpoints.keep(state)
        ray.train.report({"step": state.step, **self._score})

    def finish(self, state: TrainState) -> None:
        if self._checkpoints is not None:
            self._checkpoints.finish(state.step)

    def close(self, *, finished: bool) -> None:
        """Sends what the tracker has not taken yet, and lets a finished run have its last score."""
        if self._evaluator is not None:
            wait = _LAST_SCORE_SECONDS if finished else 0.0
            if not self._evaluator.close(wait_seconds=wait) and finished:
                self.say(f"warning: the last checkpoint was not scored within {wait:.0f} s")
        if self._checkpoints is not None:
            self._checkpoints.close()
        # A group that ends early makes room for the next one: what is left is on disk, or will be computed again.
        if self._spool is not None and (problem := self._spool.close(timeout=30.0 if finished else 5.0)):
            self.say(f"warning: {problem}")

    def _save_spool(self, step: int) -> None:
        assert self._spool is not None, "the first rank is the first of its machine"
        self._spool.save()

    def _listed(self, kept: list[Kept]) -> None:
        newest = kept[-1]
        self.document(LIST, list_text(kept))
        if self.last is None or newest.step != self.last.step:
            self.say(f"checkpoint of step {newest.step} kept in {newest.uri}")
            if self._evaluator is not None:
                self._evaluator.submit(newest)
        self.last = newest

    def _not_kept(self, sentence: str) -> None:
        self._counts["checkpoints_failed"] += 1
        self.say(f"warning: a checkpoint was {sentence}")

    def _scored(self, kept: Kept, score: Score, numbers: dict[str, float]) -> None:
        assert self._spool is not None, "the first rank is the first of its machine"
        assert self._checkpoints is not None, "rank 0 keeps"
        self._score = numbers | {"scored_step": float(kept.step)}
        self._spool.points(numbers, step=kept.step)
        self._checkpoints.score(kept.step, score)
        self.say(
            f"checkpoint of step {kept.step} scores {score.value:.3f}; mean colour alone "
            f"{numbers[f'{SCORE}_by_colour']:.3f}"
        )

    def _not_scored(self, sentence: str) -> None:
        self._counts["evaluations_failed"] += 1
        self.say(f"warning: {sentence}")
