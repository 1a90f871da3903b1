"""Runs a pretraining from the driver: Ray Train does the work, then the encoder is exported and registered.

Ray Train runs in a thread and the main thread waits for signals, so that a stop becomes a checkpoint. An error that a
person has to mend ends the run at once; everything else restarts it from its last checkpoint. A trial of Ray Tune
calls `pretrain` too: in a thread, where no signal arrives, with the callback that hands its reports to Tune.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vmoco import storage, tracking
from vmoco.cluster.check import check_nodes
from vmoco.cluster.reservation import NAMESPACE, Room, check_room
from vmoco.config import PretrainSettings
from vmoco.encoders import registry
from vmoco.encoders.promotion import Score
from vmoco.job import StopRequest, is_user_error
from vmoco.train.channel import Channel, Listener
from vmoco.train.evaluation import score_now
from vmoco.train.lease import Lease
from vmoco.train.publish import publish, write_encoder
from vmoco.train.run import PreparedRun, Run, close_run, introduce, open_run
from vmoco.train.run_folder import SPOOL, Checkpoint, local_copy
from vmoco.train.worker import run_worker

# A rank that has lost another waits this long in a collective before it gives up, in seconds.
_COLLECTIVE_TIMEOUT = 120
_TRACKER_SECONDS = 300.0  # a run that has trained waits so long for a tracker that does not answer
_SILENT_SECONDS = 60.0  # workers that have not begun by then wait for something: a person wants to know for what


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    name: str
    run_id: str
    checkpoint: str
    """URI of the last checkpoint."""
    step: int
    stopped_by: str | None
    """Signal that ended it before its last step, such as SIGTERM."""
    registered: registry.Registered | None


def pretrain(
    prepared: PreparedRun,
    *,
    show: Callable[[str], None] = print,
    callbacks: Sequence[Any] = (),
    parent_run: str | None = None,
) -> Outcome:
    """Pretrains an encoder; `ray.init` has been called.

    Args:
        prepared: what `prepare` returned.
        show: takes each line for a person.
        callbacks: of Ray Train, such as the one that reports to Ray Tune.
        parent_run: MLflow run of the sweep that this run is a trial of. Its encoder stays in its last checkpoint, from
            where the sweep publishes the best: to export each would take longer than many a short trial trains.

    Raises:
        ValueError: cluster, places or tracker cannot be used, another job trains this run, or a worker met an error
            that a person has to mend.
        ray.train.TrainingFailedError: a worker failed more often than scaling.max-failures.
    """
    check_room(prepared.settings)
    if parent_run is None:  # a sweep has asked already, once for all its trials
        check_places(prepared.settings, show=show)
    room = Room(prepared.settings)
    # Beside the driver: on another node it would be lost with that node, and the run with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    channel = Channel.options(name=room.holder, namespace=NAMESPACE, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    lost = channel.fail.remote
    with Lease(prepared.folder, on_lost=lambda said: ray.get(lost(said)), show=show) as lease, room:
        run = open_run(prepared, parent_run=parent_run)
        return _pretrain(run, channel, lease, room, show=show, callbacks=callbacks, export=parent_run is None)


def check_places(settings: PretrainSettings, *, show: Callable[[str], None]) -> None:
    """Has every machine of the cluster look whether it reaches what a run reads and writes, before the run begins.

    Raises:
        ValueError: one does not.
    """
    places = {
        "run.storage": settings.run.storage or storage.join(storage.home(), "runs"),
        "data.uri": settings.data.uri,
    }
    check_nodes(places, writes="run.storage", tracker=tracking.tracking_uri(), show=show)


def _pretrain(
    run: Run,
    channel: Any,
    lease: Lease,
    room: Room,
    *,
    show: Callable[[str], None],
    callbacks: Sequence[Any],
    export: bool,
) -> Outcome:
    for line in introduce(run):
        show(line)
    listener = Listener(channel, show)
    with _stop_requests(channel) as stop:
        status = "FAILED"
        try:
            last = _fit(run, channel, lease, room, show=show, callbacks=callbacks)
            finished = last.step == run.settings.last_step
            status = "KILLED"  # unless it has ended and its encoder is safe
            if finished:
                _settle(run, show)
            registered = _export(run, last, room.evaluation, show) if finished and export else None
            status = "FINISHED" if finished else status
            if finished:
                logged = f"runs:/{run.run_id}/{registry.ARTIFACT_FOLDER}" if export else last.uri
                close_run(run, registered.uri if registered else logged)
        finally:
            listener.close()
            if problem := tracking.finish_run(run.run_id, status):
                show(f"warning: {problem}")
    assert run.settings.run.name is not None
    signal_name = stop.signal_name if stop and not finished else None
    return Outcome(run.settings.run.name, run.run_id, last.uri, last.step, signal_name, registered)


@contextlib.contextmanager
def _stop_requests(channel: Any) -> Iterator[StopRequest | None]:
    """Turns signals into a wish that the workers hear; None in a thread, which gets no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    with StopRequest(on_stop=lambda: ray.get(channel.request_stop.remote())) as stop:
        yield stop


def _fit(
    run: Run, channel: Any, lease: Lease, room: Room, *, show: Callable[[str], None], callbacks: Sequence[Any]
) -> Checkpoint:
    """Trains to the end, or to a stop; returns the last checkpoint."""
    settings, scaling = run.settings, run.settings.scaling
    assert settings.run.storage is not None
    per_worker = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.use_gpu else {})
    elastic = scaling.min_workers is not None and scaling.min_workers < scaling.num_workers
    if elastic:
        # Ray waits so long for workers that have no node any more, 30 s by default, before it goes on with fewer.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    trainer = TorchTrainer(
        run_worker,  # type: ignore[arg-type]  # mypy sees Ray Train's first version here, and below
        train_loop_config={
            "settings": settings.canonical_json(),
            "tracking_uri": tracking.tracking_uri(),
            "run_id": run.run_id,
            "run_folder": run.folder,
            "lease": lease.token,
            "channel": channel,
            "evaluation": room.evaluation,
        },
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=(scaling.min_workers, scaling.num_workers) if elastic else scaling.num_workers,  # type: ignore[arg-type]
            use_gpu=scaling.use_gpu,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=scaling.resize_seconds,
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT),
        run_config=ray.train.RunConfig(
            name=settings.run.name,
            storage_path=settings.run.storage,
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
            callbacks=list(callbacks),
        ),
    )
    room.note(f"train-{trainer.train_run_context.run_id}")  # type: ignore[attr-defined]  # so Ray Train names it
    # In a thread of its own: in the main thread Ray would take Ctrl-C for itself and abort without a checkpoint.
    results: list[ray.train.Result] = []
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            results.append(trainer.fit())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    patient_until = time.monotonic() + _SILENT_SECONDS
    while thread.is_alive():
        thread.join(timeout=0.2)  # short, so that signals are handled
        if time.monotonic() > patient_until:
            patient_until = math.inf
            if not ray.get(channel.num_started.remote()):
                show(
                    f"no worker has begun for {_SILENT_SECONDS:.0f} s: the nodes are in use (`ray status`), or Ray "
                    "keeps them for a job that was killed, up to 200 s long"
                )
    if said := ray.get(channel.error.remote()):
        raise ValueError(said)
    if errors:
        raise errors[0]
    last = results[0].return_value  # type: ignore[attr-defined]
    assert last is not None, "a run that ends, or stops, has kept its state"
    return Checkpoint(**last)


def _settle(run: Run, show: Callable[[str], None]) -> None:
    """Sends what the tracker did not take from the workers, which have ended: a finished run is whole there.

    Raises:
        ValueError: the tracker does not take it; the run is not lost.
    """
    file = storage.join(run.folder, SPOOL)
    if not storage.exists(file):
        return
    show(f"waiting for the tracker, up to {_TRACKER_SECONDS:.0f} s")
    spool = tracking.spool(tracking.tracking_uri(), run.run_id, file=file)
    if problem := spool.close(timeout=_TRACKER_SECONDS):
        raise ValueError(f"run {run.settings.run.name} has trained to its end, and {problem}: {_rest(run)}")


def _rest(run: Run) -> str:
    return f"when it answers, the same command with --run.name {run.settings.run.name} does the rest"


def _export(run: Run, last: Checkpoint, evaluation: Any, show: Callable[[str], None]) -> registry.Registered | None:
    """Logs the encoder with its run, and registers it where the settings name it.

    Raises:
        ValueError: the tracker does not take it; the run is not lost.
    """
    try:
        return _register(run, last, evaluation, show)
    except Exception as error:
        if is_user_error(error):
            raise
        raise ValueError(
            f"run {run.settings.run.name} has trained to its end, and the tracker {tracking.tracking_uri()} does not "
            f"take its encoder ({error}): {_rest(run)}"
        ) from error


def _register(run: Run, last: Checkpoint, evaluation: Any, show: Callable[[str], None]) -> registry.Registered | None:
    settings = run.settings
    score = last.score or _score(run, last, evaluation, show)
    with tempfile.TemporaryDirectory() as folder, local_copy(last.uri) as checkpoint:
        write_encoder(checkpoint, Path(folder), manifest=run.manifest)
        return publish(
            Path(folder),
            run_id=run.run_id,
            name=settings.tracking.register_as,
            alias=settings.tracking.alias,
            description=f"run {settings.run.name}, step {last.step}, data {run.manifest.hash}",
            score=score,
        )


def _score(run: Run, last: Checkpoint, evaluation: Any, show: Callable[[str], None]) -> Score | None:
    """The score of an encoder that the workers could not wait for; one that cannot be had takes no encoder away."""
    if run.settings.tracking.register_as is None or not run.settings.evaluation.enabled:
        return None
    try:
        return score_now(last, run.settings, evaluation)
    except (ray.exceptions.RayError, TimeoutError) as error:
        said = str(error).splitlines()[-1]
        show(f"warning: the encoder is registered without a score, and `jobs/evaluate.py` gives it one: {said}")
        return None
