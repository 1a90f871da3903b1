"""Runs a pretraining from the driver: Ray Train does the work, then the encoder is exported and registered.

Ray Train runs in a thread and the main thread waits for signals, so that a stop becomes a checkpoint. An error that a
person has to mend ends the run at once; everything else restarts it from its last checkpoint.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from vmoco import registry, tracking
from vmoco.config import PretrainSettings
from vmoco.export import write_encoder
from vmoco.job import StopRequest
from vmoco.train.channel import Channel, Listener
from vmoco.train.run import PreparedRun, Run, close_run, introduce, open_run
from vmoco.train.worker import run_worker, step_of

# A rank that has lost another waits this long in a collective before it gives up, in seconds.
_COLLECTIVE_TIMEOUT = 120


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


def pretrain(prepared: PreparedRun, *, show: Callable[[str], None] = print) -> Outcome:
    """Pretrains an encoder; `ray.init` has been called.

    Args:
        prepared: what `prepare` returned.
        show: takes each line for a person.

    Raises:
        ValueError: cluster or tracker cannot be used, or a worker met an error that a person has to mend.
        ray.train.TrainingFailedError: a worker failed more often than scaling.max-failures.
    """
    check_resources(prepared.settings)
    run = open_run(prepared)
    for line in introduce(run):
        show(line)
    channel = Channel.remote()  # type: ignore[attr-defined]
    listener = Listener(channel, show)
    with StopRequest(on_stop=lambda: ray.get(channel.request_stop.remote())) as stop:
        status = "FAILED"
        try:
            checkpoint = _fit(run, channel)
            step = step_of(checkpoint)
            finished = step == run.settings.train.steps
            status = "FINISHED" if finished else "KILLED"
            registered = _export(run, checkpoint) if finished else None
            if finished:
                close_run(run, registered.uri if registered else f"runs:/{run.run_id}/{registry.ARTIFACT_FOLDER}")
        finally:
            listener.close()
            if problem := tracking.finish_run(run.run_id, status):
                show(f"warning: {problem}")
    assert run.settings.run.name is not None
    signal_name = None if finished else stop.signal_name
    return Outcome(run.settings.run.name, run.run_id, checkpoint.path, step, signal_name, registered)


def check_resources(settings: PretrainSettings) -> None:
    """Checks that the cluster can hold the workers, because Ray would wait for them for ever.

    Raises:
        ValueError: it cannot.
    """
    scaling = settings.scaling
    wanted = {"CPU": float(scaling.num_workers * scaling.cpus_per_worker)}
    if scaling.use_gpu:
        wanted["GPU"] = float(scaling.num_workers)
    there = ray.cluster_resources()
    for resource, number in wanted.items():
        if there.get(resource, 0) < number and not scaling.wait_for_nodes:
            raise ValueError(
                f"{scaling.num_workers} workers need {number:.0f} {resource}, the cluster has "
                f"{there.get(resource, 0):.0f}: lower scaling.num-workers, add nodes, or set scaling.wait-for-nodes "
                "where an autoscaler adds them"
            )


def _fit(run: Run, channel: Any) -> ray.train.Checkpoint:
    settings, scaling = run.settings, run.settings.scaling
    assert settings.run.storage is not None
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.use_gpu else {})
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={
            "settings": settings.canonical_json(),
            "tracking_uri": tracking.tracking_uri(),
            "run_id": run.run_id,
            "run_folder": run.folder,
            "channel": channel,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers, use_gpu=scaling.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT),
        run_config=ray.train.RunConfig(
            name=settings.run.name,
            storage_path=settings.run.storage,
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.train.keep_checkpoints),
        ),
    )
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
    while thread.is_alive():
        thread.join(timeout=0.2)  # short, so that signals are handled
    if said := ray.get(channel.error.remote()):
        raise ValueError(said)
    if errors:
        raise errors[0]
    last = results[0].checkpoint
    assert last is not None, "a run that ends, or stops, has kept its state"
    return last


def _export(run: Run, checkpoint: ray.train.Checkpoint) -> registry.Registered | None:
    """Logs the encoder with its run, and registers it where the settings name it."""
    settings = run.settings
    with tempfile.TemporaryDirectory() as folder, checkpoint.as_directory() as kept:
        write_encoder(Path(kept), Path(folder), manifest=run.manifest)
        registry.attach(Path(folder), run_id=run.run_id)
    if settings.tracking.register_as is None:
        return None
    return registry.register(
        run.run_id,
        name=settings.tracking.register_as,
        alias=settings.tracking.alias,
        description=f"run {settings.run.name}, step {settings.train.steps}, data {run.manifest.hash}",
    )
