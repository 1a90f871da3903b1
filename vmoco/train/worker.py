"""What runs in each Ray Train worker: builds the state, resumes it, trains, and hands checkpoints to Ray."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from vmoco import storage
from vmoco.config import PretrainSettings
from vmoco.data.manifest import Manifest
from vmoco.job import is_user_error, root_cause
from vmoco.tracking import Tracker
from vmoco.train.channel import StopWatch
from vmoco.train.determinism import require_determinism
from vmoco.train.gauges import Gauges
from vmoco.train.loop import train
from vmoco.train.precision import autocast_dtype
from vmoco.train.state import Record, TrainState

CHECKPOINTS = "checkpoints.json"
"""List of the kept checkpoints, in the run's folder and, the same, in MLflow."""


def run_worker(config: dict[str, Any]) -> None:
    """Entry point of a worker.

    Args:
        config: settings (JSON), tracking_uri, run_id, run_folder (URI), channel (actor).
    """
    if ray.get(config["channel"].error.remote()):
        return  # Ray restarts after every error; one that a person has to mend would only come again
    try:
        _run(config)
    except Exception as error:
        cause, _ = root_cause(error)
        if is_user_error(cause):
            ray.get(config["channel"].fail.remote(str(cause)))
        raise


def _run(config: dict[str, Any]) -> None:
    settings = PretrainSettings.model_validate_json(config["settings"])
    torch.set_num_threads(settings.scaling.cpus_per_worker)
    device = ray.train.torch.get_device()
    if settings.train.deterministic:
        require_determinism(settings.model.backbone, device)
    manifest = Manifest.load(settings.data.uri)
    dtype, reason = autocast_dtype(settings.train.precision, device)
    state = TrainState(settings, manifest_hash=manifest.hash, device=device, autocast_dtype=dtype)
    host = RayHost(config, settings)
    try:
        found = ray.train.get_checkpoint()
        if found is not None:
            with found.as_directory() as folder:
                host.resumed(state.load(Path(folder)))
        if host.is_first:
            host.say(f"{host.num_ranks} workers on {device.type}, {reason}, from step {state.step}")
        train(settings, manifest, state, device=device, host=host)
    finally:
        host.close()


class RayHost:
    """Connects the training loop with Ray Train, MLflow and the driver.

    Args:
        config: as for `run_worker`.
        settings: of the run.
    """

    def __init__(self, config: dict[str, Any], settings: PretrainSettings) -> None:
        context = ray.train.get_context()
        self.is_first = context.get_world_rank() == 0
        self.num_ranks = context.get_world_size()
        self._settings = settings
        self._config = config
        self._stop = StopWatch(config["channel"])
        self._tracker = Tracker(config["tracking_uri"], config["run_id"]) if self.is_first else None
        self._gauges = Gauges(settings.run.name or "")
        self._kept: list[dict[str, Any]] = []

    def stop_requested(self) -> bool:
        return self._stop.requested()

    def say(self, line: str) -> None:
        self._config["channel"].say.remote(line)

    def track(self, numbers: dict[str, float], *, step: int) -> None:
        assert self._tracker is not None, "rank 0 tracks"
        self._tracker.metrics(numbers, step=step)
        self._gauges.show(numbers, step=step)

    def document(self, name: str, content: str | bytes) -> None:
        assert self._tracker is not None, "rank 0 tracks"
        self._tracker.document(name, content)

    def resumed(self, record: Record) -> None:
        """Takes the list of kept checkpoints up again, up to the one that was resumed."""
        try:
            listed = json.loads(storage.read_bytes(self._list_uri()))
        except FileNotFoundError:  # killed between its first checkpoint and the list
            listed = []
        self._kept = [row for row in listed if row["step"] < record.step] + [self._row(record)]

    def checkpoint(self, state: TrainState) -> None:
        """Rank 0 writes; all ranks report, because Ray counts reports and waits for all of them here."""
        name = checkpoint_name(state.step)
        if not self.is_first:
            ray.train.report({"step": state.step}, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory() as folder:
            record = state.save(Path(folder), run_id=self._config["run_id"])
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": state.step}, checkpoint=checkpoint, checkpoint_dir_name=name)
        self._kept = [*self._kept, self._row(record)][-self._settings.train.keep_checkpoints :]
        text = json.dumps(self._kept, indent=1)
        storage.write_atomic(self._list_uri(), text.encode())
        assert self._tracker is not None, "rank 0 tracks"
        self._tracker.document(CHECKPOINTS, text)
        self.say(f"checkpoint of step {state.step} kept in {self._kept[-1]['uri']}")

    def close(self) -> None:
        """Sends what the tracker has not taken yet."""
        if self._tracker is not None and (problem := self._tracker.close()):
            self.say(f"warning: {problem}")

    def _row(self, record: Record) -> dict[str, Any]:
        uri = storage.join(self._config["run_folder"], checkpoint_name(record.step))
        return {"step": record.step, "uri": uri, "sha256": record.sha256}

    def _list_uri(self) -> str:
        return storage.join(self._config["run_folder"], CHECKPOINTS)


def checkpoint_name(step: int) -> str:
    """Folder of a checkpoint in its run's folder; written again under the same name after a restart."""
    return f"step-{step:08d}"


def step_of(checkpoint: ray.train.Checkpoint) -> int:
    """Steps that a checkpoint has behind it, by its name."""
    return int(checkpoint.path.rstrip("/").rpartition("-")[2])
