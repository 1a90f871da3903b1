"""What is known of each trial of a sweep, kept in the sweep's folder, so that a sweep goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vmoco import storage
from vmoco.train.run import PreparedRun

RECORD = "sweep.json"
Status = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """One trial; `stopped` is by the scheduler, because others were better."""

    name: str
    values: dict[str, Any]
    content: str
    """Hash of what decides its numbers."""
    steps: int
    status: Status = "waiting"
    step: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    """By name, as in `score/retrieval`: the last that it reported."""
    run_id: str | None = None
    """Its MLflow run, when it has one."""
    reason: str = ""
    """Why it failed."""

    @property
    def ended(self) -> bool:
        """Whether submitting the sweep again leaves it alone; one that failed is tried again."""
        return self.status in ("finished", "stopped")


@dataclass
class Sweep:
    """A sweep as it is kept."""

    name: str
    folder: str
    metric: str
    manifest_hash: str
    trials: list[Trial]
    parent_run: str = ""
    registered: str = ""
    """Version that its best encoder became, as models:/NAME/VERSION."""

    @property
    def score(self) -> str:
        """Name of the number that chooses."""
        return f"score/{self.metric}"

    def best(self) -> Trial | None:
        """The finished trial that scores highest; None where none has finished with a score."""
        scored = [trial for trial in self.trials if trial.status == "finished" and self.score in trial.scores]
        return max(scored, key=lambda trial: trial.scores[self.score], default=None)

    def save(self) -> None:
        """Writes the record."""
        storage.write_atomic(storage.join(self.folder, RECORD), json.dumps(asdict(self), indent=1).encode())


def open_sweep(sweep: Sweep, prepared: list[PreparedRun]) -> Sweep:
    """The sweep as it was left, or the given one where it is new.

    Args:
        sweep: with trials that wait.
        prepared: run of each trial.

    Raises:
        ValueError: the name belongs to another sweep.
    """
    try:
        kept = json.loads(storage.read_bytes(storage.join(sweep.folder, RECORD)))
    except FileNotFoundError:
        return sweep
    found = Sweep(**kept | {"trials": [Trial(**row) for row in kept["trials"]]})
    same = [trial.content for trial in found.trials] == [trial.content for trial in sweep.trials]
    if not same or (found.manifest_hash, found.metric) != (sweep.manifest_hash, sweep.metric):
        raise ValueError(
            f"run.name {sweep.name!r} belongs to a sweep with another space, data set, metric or settings: submit it "
            "as it was to go on, or give another run.name"
        )
    for trial, run in zip(found.trials, prepared, strict=True):
        # Whether a trial has ended well is known best by its own folder: the driver may have died just then.
        if not trial.ended or (trial.status == "finished" and not run.finished):
            trial.status, trial.reason = "waiting", ""
    return found
