"""The record of a sweep: the state of each trial, kept in the sweep's folder so that a killed sweep can continue."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vmoco import storage

FILE = "sweep.json"
Status = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """One trial. The scheduler may stop it if others are better."""

    name: str
    values: dict[str, Any]
    steps: int
    status: Status = "waiting"
    step: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    """The last scores that it reported, by name, such as `score/retrieval`."""
    run_id: str | None = None
    """Its MLflow run, once it has one."""
    reason: str = ""
    """Why it failed."""
    seconds: float = 0.0
    """Time that it ran, summed over all its starts."""
    generation: int = 0
    """In a population: number of generations before this one."""
    fork: str = ""
    """Checkpoint that it begins from: that of its donor in the previous generation, or the one of --run.fork."""

    @property
    def ended(self) -> bool:
        """Whether a resumed sweep skips it. A trial that failed is tried again."""
        return self.status in ("finished", "stopped")


@dataclass
class Sweep:
    """A sweep and its trials."""

    name: str
    folder: str
    content: str
    """Hash of data, space, search, metric, and the settings that all trials share."""
    metric: str
    manifest_hash: str
    trials: list[Trial] = field(default_factory=list)
    parent_run: str = ""
    registered: str = ""
    """Registered version of its best encoder, as models:/NAME/VERSION."""
    registered_trial: str = ""
    """The trial that trained this encoder."""

    @property
    def score(self) -> str:
        """Name of the score that chooses the best trial."""
        return f"score/{self.metric}"

    def best(self) -> Trial | None:
        """The finished trial with the highest score; in a population, of its newest generation."""
        scored = [trial for trial in self.trials if trial.status == "finished" and self.score in trial.scores]
        newest = max((trial.generation for trial in scored), default=0)
        scored = [trial for trial in scored if trial.generation == newest]
        return max(scored, key=lambda trial: trial.scores[self.score], default=None)

    def lineage(self, trial: Trial) -> list[Trial]:
        """The trial and the trials that it descends from, oldest first."""
        by_name = {each.name: each for each in self.trials}
        found = [trial]
        while found[0].generation:  # the first generation may begin from run.fork, which is no trial
            found.insert(0, by_name[found[0].fork.split("/")[-2]])
        return found

    def save(self) -> None:
        """Writes the record."""
        storage.write_atomic(storage.join(self.folder, FILE), json.dumps(asdict(self), indent=1).encode())


def read_sweep(folder: str) -> Sweep | None:
    """The sweep in a folder; None if there is none."""
    try:
        kept = json.loads(storage.read_bytes(storage.join(folder, FILE)))
    except FileNotFoundError:
        return None
    return Sweep(**kept | {"trials": [Trial(**row) for row in kept["trials"]]})
