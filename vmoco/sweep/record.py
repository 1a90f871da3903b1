"""What is known of each trial of a sweep, kept in the sweep's folder, so that a sweep goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vmoco import storage

RECORD = "sweep.json"
Status = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """One trial; `stopped` is by the scheduler, because others were better."""

    name: str
    values: dict[str, Any]
    steps: int
    status: Status = "waiting"
    step: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    """By name, as in `score/retrieval`: the last that it reported."""
    run_id: str | None = None
    """Its MLflow run, when it has one."""
    reason: str = ""
    """Why it failed."""
    seconds: float = 0.0
    """From its start to its end, those of each start."""
    generation: int = 0
    """Of a population: how often it has been selected from before this trial."""
    fork: str = ""
    """Checkpoint of its donor in the generation before, which it begins from."""

    @property
    def ended(self) -> bool:
        """Whether submitting the sweep again leaves it alone; one that failed is tried again."""
        return self.status in ("finished", "stopped")


@dataclass
class Sweep:
    """A sweep as it is kept."""

    name: str
    folder: str
    content: str
    """Hash of what the sweep is: data, space, search, metric, and what all trials share."""
    metric: str
    manifest_hash: str
    trials: list[Trial] = field(default_factory=list)
    parent_run: str = ""
    registered: str = ""
    """Version that its best encoder became, as models:/NAME/VERSION."""
    registered_trial: str = ""
    """The trial that it is of."""

    @property
    def score(self) -> str:
        """Name of the number that chooses."""
        return f"score/{self.metric}"

    def best(self) -> Trial | None:
        """The finished trial that scores highest, of a population's newest generation; None where none has a score."""
        scored = [trial for trial in self.trials if trial.status == "finished" and self.score in trial.scores]
        newest = max((trial.generation for trial in scored), default=0)
        scored = [trial for trial in scored if trial.generation == newest]
        return max(scored, key=lambda trial: trial.scores[self.score], default=None)

    def lineage(self, trial: Trial) -> list[Trial]:
        """The trial and those that it descends from, oldest first."""
        found = [trial]
        while found[0].fork:
            found.insert(0, next(each for each in self.trials if found[0].fork.split("/")[-2] == each.name))
        return found

    def save(self) -> None:
        """Writes the record."""
        storage.write_atomic(storage.join(self.folder, RECORD), json.dumps(asdict(self), indent=1).encode())


def read_sweep(folder: str) -> Sweep | None:
    """The sweep that a folder holds; None where it holds none."""
    try:
        kept = json.loads(storage.read_bytes(storage.join(folder, RECORD)))
    except FileNotFoundError:
        return None
    return Sweep(**kept | {"trials": [Trial(**row) for row in kept["trials"]]})
