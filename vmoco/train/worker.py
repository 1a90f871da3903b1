"""What runs in each Ray Train worker: it restores the state, trains, and keeps the state.

The first rank alone has a checkpoint writer and an evaluator. It talks to the driver through the channel
(`vmoco/train/channel.py`) and to the tracker through a spool (`vmoco/spool.py`); it waits for neither.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from vmoco import ray_internals, storage, tracking
from vmoco.config import PretrainSettings
from vmoco.data.checked_clips import CheckedClips
from vmoco.data.mixture import Mixture
from vmoco.model.backbone import autocast_dtype, require_determinism
from vmoco.spool import Document
from vmoco.train import distributed, replay_file
from vmoco.train.channel import StopWatch, errors_reported
from vmoco.train.checkpoint_writer import CheckpointWriter
from vmoco.train.evaluation import Evaluator
from vmoco.train.lease import FencedError
from vmoco.train.loop import Requests, train
from vmoco.train.machines import Collector, reported
from vmoco.train.run_folder import SPOOL, RunFolder
from vmoco.train.speed import choose_kernels
from vmoco.train.stacks import SHARE, StackDump, Watched
from vmoco.train.state import TrainState
from vmoco.train.step import NonFiniteError
from vmoco.train.system_metrics import Gauges

_TRACKED_BYTES = 5 * 2**20
"""Largest file that the tracker receives too: it waits in the memory of the first rank until it is sent."""
_LAST_SCORE_SECONDS = 600.0
"""Longest time that a finished run waits for the score of its last checkpoint; then the driver scores it."""


def run_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """Entry point of a worker.

    Args:
        config: settings (JSON), tracking_uri, run_id, run_folder (URI), lease (token), channel (actor), evaluation
            (placement group or None).

    Returns:
        On the first rank the fields of the last `Checkpoint`.
    """
    if ray.get(config["channel"].error.remote()):
        return None  # Ray restarts after every error; an error that the user must fix would only repeat
    with errors_reported(config["channel"]):
        return _run(config)


def _run(config: dict[str, Any]) -> dict[str, Any] | None:
    settings = PretrainSettings.model_validate_json(config["settings"])
    torch.set_num_threads(settings.scaling.cpus_per_worker)
    device = ray.train.torch.get_device()
    distributed.require_own_gpu(device)
    if settings.train.deterministic:
        require_determinism(settings.model.backbone, device)
    choose_kernels(settings.train, device)
    # The driver has looked for the shards; one that is lost since then is named when a clip of it is read.
    mixture = Mixture.load(settings.data, check_shards=False)
    dtype, reason = autocast_dtype(settings.train.precision, device)
    state = TrainState(settings, manifest_hash=mixture.hash, device=device, autocast_dtype=dtype)
    host = RayHost(config, settings)
    finished = False
    try:
        damaged = host.folder.restore(state)
        host.begin(state, damaged=damaged)
        if host.is_first:
            host.show(f"{host.num_ranks} workers on {device.type}, {reason}, from step {state.step}")
        checked = CheckedClips(config["lease"], num_clips=mixture.counts["clips"])
        try:
            reached_end = train(settings, mixture, state, device=device, host=host, checked=checked)
        except NonFiniteError as error:
            raise host.with_replay_file(error, state) from error
        if host.writer is not None:
            host.writer.finish(state.step)
        finished = reached_end
    finally:
        host.close(finished=finished)
    last = host.folder.newest()
    return vars(last) if last else None


class RayHost:
    """Connects the training loop with Ray Train, the driver, the tracker and the run's folder.

    Args:
        config: as for `run_worker`.
        settings: of the run.

    Attributes:
        folder: of the run; the first rank has claimed it.
        writer: of the checkpoints; from `begin` on, on the first rank.

    Raises:
        FencedError: another job holds the run.
    """

    def __init__(self, config: dict[str, Any], settings: PretrainSettings) -> None:
        context = ray.train.get_context()
        self.is_first = context.get_world_rank() == 0
        self.num_ranks = context.get_world_size()
        self.folder = RunFolder(config["run_folder"])
        self.writer: CheckpointWriter | None = None
        self._evaluator: Evaluator | None = None
        self._settings = settings
        self._config = config
        self._stop = StopWatch(config["channel"])
        self._gauges = Gauges(settings.run.name or "")
        self._preempted = False
        self._counts: dict[str, float] = {}
        self._spool: tracking.Spool | None = None
        self._machines: Collector | None = None
        self._exit = contextlib.ExitStack()
        self._stacks = StackDump()
        channel = config["channel"]
        rank, node_id = context.get_world_rank(), ray.get_runtime_context().get_node_id()
        patience = SHARE * distributed.STEP_SECONDS
        watched = Watched(node_id, socket.gethostname(), str(self._stacks.path), patience)
        channel.watch.remote(rank, watched)
        if self.is_first:
            self.folder.claim(lease=config["lease"])
            self._spool = tracking.spool(
                config["tracking_uri"],
                config["run_id"],
                file=self.folder.path(SPOOL),
                may_send=self.folder.check_fence,
                warn=self.show,
            )
            self._machines = Collector(lambda: ray.get(channel.take_samples.remote(), timeout=30), self._spool)
        if context.get_local_rank() == 0:  # one rank of each machine measures it
            self._exit.enter_context(reported(channel, run=settings.run.name or "", by_worker=True))

    def begin(self, state: TrainState, *, damaged: list[str]) -> None:
        """Starts the writer and the evaluator of the first rank, when the state is restored.

        Args:
            state: restored.
            damaged: one message for each checkpoint that is damaged.
        """
        if not self.is_first:
            return
        assert self._spool is not None, "the first rank has made it"
        assert self._machines is not None, "and this too"
        self._machines.step = state.step
        folder, settings = self.folder, self._settings
        folder.open_list(state.step)
        if settings.evaluation.enabled:
            group = self._config["evaluation"]
            channel = self._config["channel"]
            self._evaluator = Evaluator(folder, settings, group, spool=self._spool, channel=channel, show=self.show)
        self.writer = CheckpointWriter(
            folder,
            settings.train,
            run_id=self._config["run_id"],
            spool=self._spool,
            evaluator=self._evaluator,
            show=self.show,
        )
        self._counts["restarts"] = ray.get(self._config["channel"].started.remote())
        self._counts["checkpoints_damaged"] = len(damaged)
        for message in damaged:
            self.show(f"warning: {message}; the run resumes from the checkpoint before it")
        newest = folder.newest()
        if self._evaluator is not None and newest is not None and newest.score is None:
            self._evaluator.submit(newest)

    def requests(self) -> Requests:
        """What this rank has been asked for since the last step."""
        stop, preemption = self._stop.requested(), None
        if not self._preempted:
            preemption = ray_internals.preemption_info()
        if preemption is None:
            return Requests(stop=stop)
        self._preempted = True  # once for each group of workers: Ray starts a new one when the machine has gone
        if self.is_first:
            self.show(f"{preemption}: keeping a checkpoint now")
        return Requests(stop=stop, checkpoint=True)

    def expect_step(self, within_seconds: float) -> None:
        """Writes the stacks of this process if the next step does not come in time."""
        self._stacks.expect(within_seconds)

    def keep_file(self, name: str, content: bytes) -> None:
        """Writes a file into the run's folder, and sends it to the tracker if it is small."""
        try:
            storage.write_atomic(self.folder.path(name), content)
        except ValueError as error:  # training is more important
            self.show(f"warning: {name} was not kept: {error}")
            return
        self.show(f"kept {self.folder.path(name)}")
        if self._spool is not None and len(content) <= _TRACKED_BYTES:
            self._spool.document(name, content)

    def with_replay_file(self, error: NonFiniteError, state: TrainState) -> NonFiniteError:
        """Writes what is needed to redo the step of an error. Every rank calls it; returns the error with the file."""
        distributed.wait_at_most(distributed.SLOW_STEP_SECONDS)  # a checkpoint may be on its way to a slow store
        hint = ""
        if self.is_first:
            assert self.writer is not None, "`begin` makes it"
            try:
                newest = self.writer.newest()
                uri = replay_file.write(error, state, self.folder, newest=newest, ranks=self.num_ranks)
                hint = f"To find its first value that is not finite: python jobs/replay.py {uri}"
            except (OSError, ValueError, FencedError) as problem:
                hint = f"No file for jobs/replay.py was written ({problem})"
        (hint, *_) = distributed.gather_text(hint)  # every rank waits for the first one, and raises the same message
        return NonFiniteError(f"{error}. {hint}", step=error.step, clip_ids=error.clip_ids)

    def show(self, line: str) -> None:
        """Prints a line in the driver."""
        self._config["channel"].say.remote(line)

    def track(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Queues the numbers of a step for the tracker, with those of the run's faults; does nothing on other ranks."""
        if self._spool is None or self._machines is None:
            return
        self._machines.step = step
        counts = self._counts.copy()
        if self.writer is not None:
            counts["checkpoints_failed"] = self.writer.num_failed
            counts["evaluations_failed"] = self._evaluator.num_failed if self._evaluator else 0
        self._config["channel"].progressed.remote()
        tracked = {**numbers, **counts}
        self._spool.points(tracked, step=step)
        self._gauges.show(tracked | {"step": float(step)})

    def checkpoint(self, state: TrainState, documents: Mapping[str, Document]) -> None:
        """Keeps the state and tracks the documents; all ranks report, because Ray counts reports."""
        if self._spool is not None:
            for name, content in documents.items():
                self._spool.document(name, content)
        if self.writer is not None:
            self.writer.keep(state)
        # Ray Tune receives these numbers.
        ray.train.report({"step": state.step, **(self._evaluator.numbers if self._evaluator else {})})

    def close(self, *, finished: bool) -> None:
        """Ends the threads. A finished run waits for its last score, and for the tracker."""
        self._stacks.close()
        if self._evaluator is not None:
            wait = _LAST_SCORE_SECONDS if finished else 0.0
            if not self._evaluator.close(wait_seconds=wait) and finished:
                self.show(f"warning: the last checkpoint was not scored within {wait:.0f} s")
        if self.writer is not None:
            self.writer.close()
        self._exit.close()
        if self._machines is not None:
            self._machines.close()
        # A group that ends early makes way for the next one: what is left is on disk, or is computed again.
        if self._spool is not None and (problem := self._spool.close(timeout=30.0 if finished else 5.0)):
            self.show(f"warning: {problem}")
