"""Runs a pretraining from the driver: Ray Train trains, then the encoder is exported and registered.

Ray Train runs in a thread, and the main thread waits for signals, so that a request to stop becomes a checkpoint. An
error that the user has to fix ends the run at once. Everything else restarts it from its last checkpoint. A trial of
Ray Tune calls `pretrain` too: in a thread, where no signal arrives, with the callback that reports to Tune.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vmoco import ray_internals, storage, tracking
from vmoco.cluster.check import check_nodes
from vmoco.cluster.reservation import (
    NAMESPACE,
    Reservation,
    alive_nodes,
    check_capacity,
    fit_to_cluster,
    worker_resources,
)
from vmoco.config import PretrainSettings
from vmoco.encoders import registry
from vmoco.encoders.promotion import Score
from vmoco.job import StopRequest, is_user_error
from vmoco.train import distributed
from vmoco.train.channel import Channel, Listener, RestartLimit
from vmoco.train.evaluation import score_now
from vmoco.train.lease import Lease
from vmoco.train.publish import publish, write_encoder
from vmoco.train.run import PreparedRun, Run, close_run, introduce, open_run
from vmoco.train.run_folder import SPOOL, Checkpoint, local_copy
from vmoco.train.system_metrics import Gauges
from vmoco.train.worker import run_worker

_TRACKER_SECONDS = 300.0  # how long a run that has trained waits for a tracker that does not answer
_SILENT_SECONDS = 60.0  # after this time without a worker a line says what the run waits for


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
    """Pretrains an encoder. `ray.init` has been called.

    Args:
        prepared: what `prepare` returned.
        show: prints a progress line.
        callbacks: of Ray Train, such as the one that reports to Ray Tune.
        parent_run: MLflow run of the sweep that this run is a trial of. Its encoder stays in its last checkpoint, and
            the sweep publishes the best one: to export each would take longer than many a short trial trains.

    Raises:
        ValueError: cluster, storage, data or tracker cannot be used; another job trains this run; a worker met an
            error that the user has to fix.
        ray.train.TrainingFailedError: the workers failed more often than --scaling.max-failures allows.
    """
    fitted, chosen = fit_to_cluster(prepared.settings, alive_nodes())
    prepared = replace(prepared, settings=fitted, fitted=(*prepared.fitted, *chosen))
    check_capacity(prepared.settings)
    if parent_run is None:  # a sweep has checked them once for all its trials
        check_places(prepared.settings, show=show)
    reservation = Reservation(prepared.settings)
    # Beside the driver: on another node it would be lost with that node, and the run with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = Channel
    channel = actor.options(name=reservation.holder, namespace=NAMESPACE, scheduling_strategy=here).remote()
    lost = channel.fail.remote
    with Lease(prepared.folder, on_lost=lambda reason: ray.get(lost(reason)), show=show) as lease, reservation:
        run = open_run(prepared, parent_run=parent_run)
        return _pretrain(run, channel, lease, reservation, show=show, callbacks=callbacks, export=parent_run is None)


def check_places(settings: PretrainSettings, *, show: Callable[[str], None]) -> None:
    """Checks on every machine of the cluster that it reaches what a run reads and writes, before the run begins.

    Raises:
        ValueError: one does not.
    """
    places = {
        "--run.storage": settings.run.storage or storage.join(storage.home(), "runs"),
    }
    places |= settings.data.places
    check_nodes(places, writes="--run.storage", tracker=tracking.tracking_uri(), show=show)


def _pretrain(
    run: Run,
    channel: Any,
    lease: Lease,
    reservation: Reservation,
    *,
    show: Callable[[str], None],
    callbacks: Sequence[Any],
    export: bool,
) -> Outcome:
    for line in introduce(run):
        show(line)
    assert run.settings.run.name is not None, "resolved"
    listener, gauges = Listener(channel, show), Gauges(run.settings.run.name)
    gauges.running(True)  # with it an alert knows that steps are missing, and that the run has not just ended
    with _stop_requests(channel) as stop:
        status = "FAILED"
        try:
            last = _fit(run, channel, lease, reservation, show=show, callbacks=callbacks)
            finished = last.step == run.settings.last_step
            status = "KILLED"  # unless it has finished and its encoder is exported
            if finished:
                _send_rest(run, show)
            registered = _export(run, last, reservation.evaluation, show) if finished and export else None
            status = "FINISHED" if finished else status
            if finished:
                logged = f"runs:/{run.run_id}/{registry.ARTIFACT_FOLDER}" if export else last.uri
                close_run(run, registered.uri if registered else logged)
        finally:
            listener.close()
            gauges.running(False)
            if problem := tracking.finish_run(run.run_id, status):
                show(f"warning: {problem}")
    signal_name = stop.signal_name if stop and not finished else None
    return Outcome(run.settings.run.name, run.run_id, last.uri, last.step, signal_name, registered)


@contextlib.contextmanager
def _stop_requests(channel: Any) -> Iterator[StopRequest | None]:
    """Turns signals into a request to stop that the workers receive; None in a thread, which gets no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    with StopRequest(on_stop=lambda: ray.get(channel.request_stop.remote())) as stop:
        yield stop


def _fit(
    run: Run,
    channel: Any,
    lease: Lease,
    reservation: Reservation,
    *,
    show: Callable[[str], None],
    callbacks: Sequence[Any],
) -> Checkpoint:
    """Trains to the end, or until a stop; returns the last checkpoint."""
    settings, scaling = run.settings, run.settings.scaling
    elastic = scaling.min_workers is not None and scaling.min_workers < scaling.num_workers
    if elastic:
        # How long Ray waits for workers whose node is gone, 60 s by default, before it goes on with fewer.
        os.environ.setdefault(ray_internals.WORKER_START_SECONDS, "10")
    trainer = TorchTrainer(
        run_worker,  # type: ignore[arg-type]  # mypy sees Ray Train's first version here, and below
        train_loop_config={
            "settings": settings.canonical_json(),
            "tracking_uri": tracking.tracking_uri(),
            "run_id": run.run_id,
            "run_folder": run.folder,
            "lease": lease.token,
            "channel": channel,
            "evaluation": reservation.evaluation,
        },
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=(scaling.min_workers, scaling.num_workers) if elastic else scaling.num_workers,  # type: ignore[arg-type]
            use_gpu=scaling.use_gpu,
            resources_per_worker=worker_resources(settings),
            elastic_resize_monitor_interval_s=scaling.resize_seconds,
        ),
        torch_config=torch_config(use_gpu=scaling.use_gpu),
        run_config=run_config(run, channel, callbacks),
    )
    reservation.record(ray_internals.requester_of(trainer))
    # In a thread of its own: in the main thread Ray would handle Ctrl-C itself and abort without a checkpoint.
    results: list[ray.train.Result] = []
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            results.append(trainer.fit())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    silent_until = time.monotonic() + _SILENT_SECONDS
    while thread.is_alive():
        thread.join(timeout=0.2)  # short, so that signals are handled
        if time.monotonic() > silent_until:
            silent_until = math.inf
            if not ray.get(channel.num_started.remote()):
                show(
                    f"no worker has started for {_SILENT_SECONDS:.0f} s: the nodes are in use (see `ray status`), or "
                    "Ray keeps them for a job that was killed, for up to 200 s"
                )
    if reason := ray.get(channel.error.remote()):
        raise ValueError(reason)
    if errors:
        raise errors[0]
    last = results[0].return_value  # type: ignore[attr-defined]
    assert last is not None, "a run that ends, or stops, has kept its state"
    return Checkpoint(**last)


def run_config(run: Run, channel: Any, callbacks: Sequence[Any]) -> ray.train.RunConfig:
    """The run for Ray Train, which restarts it without limit: `RestartLimit` ends it."""
    settings = run.settings
    assert settings.run.name is not None, "resolved"
    limit = RestartLimit(
        name=settings.run.name, folder=run.folder, max_failures=settings.scaling.max_failures, channel=channel
    )
    return ray.train.RunConfig(
        name=settings.run.name,
        storage_path=settings.run.storage,
        failure_config=ray.train.FailureConfig(max_failures=-1),
        callbacks=[limit, *callbacks],  # type: ignore[list-item]  # mypy sees Ray Train's first version
    )


def torch_config(*, use_gpu: bool) -> TorchConfig:
    """How ranks reach each other. The training loop shortens the time limit after the first step."""
    # Texts of ranks (`distributed.gather_text`) are on the host: with nccl alone each would pass through a GPU.
    backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
    return TorchConfig(backend=backend, timeout_s=int(distributed.SLOW_STEP_SECONDS))


def _send_rest(run: Run, show: Callable[[str], None]) -> None:
    """Sends what the tracker did not take from the workers, which have ended.

    Raises:
        ValueError: the tracker still does not take it; the run is not lost.
    """
    file = storage.join(run.folder, SPOOL)
    if not storage.exists(file):
        return
    show(f"waiting for the tracker, up to {_TRACKER_SECONDS:.0f} s")
    spool = tracking.spool(tracking.tracking_uri(), run.run_id, file=file, warn=show)
    if problem := spool.close(timeout=_TRACKER_SECONDS):
        raise ValueError(f"run {run.settings.run.name} has trained to its end, and {problem}: {_how_to_resume(run)}")


def _how_to_resume(run: Run) -> str:
    return f"when it answers, submit the same command with --run.name {run.settings.run.name} to do the rest"


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
            f"take its encoder ({error}): {_how_to_resume(run)}"
        ) from error


def _register(run: Run, last: Checkpoint, evaluation: Any, show: Callable[[str], None]) -> registry.Registered | None:
    settings = run.settings
    score = last.score or _score(run, last, evaluation, show)
    with tempfile.TemporaryDirectory() as folder, local_copy(last.uri) as checkpoint:
        write_encoder(checkpoint, Path(folder), data=run.mixture)
        return publish(
            Path(folder),
            run_id=run.run_id,
            name=settings.tracking.register_as,
            alias=settings.tracking.alias,
            description=f"run {settings.run.name}, step {last.step}, data {run.mixture.hash}",
            score=score,
        )


def _score(run: Run, last: Checkpoint, evaluation: Any, show: Callable[[str], None]) -> Score | None:
    """The score of an encoder that the workers could not wait for. An encoder without a score is registered too."""
    if run.settings.tracking.register_as is None or not run.settings.evaluation.enabled:
        return None
    try:
        return score_now(last, run.settings, evaluation)
    except (ray.exceptions.RayError, TimeoutError) as error:
        reason = str(error).splitlines()[-1]
        show(f"warning: the encoder is registered without a score ({reason}): jobs/evaluate.py can score it later")
        return None
