"""Ray Tune's callback for the trials of a sweep: it keeps the record, and prints a table to the job's log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray import tune

from vmoco import tracking
from vmoco.sweep.record import Sweep, Trial
from vmoco.sweep.space import as_text
from vmoco.train.run import PreparedRun, run_id_of


class TrialCallback(tune.Callback):
    """Follows the trials of a sweep.

    Args:
        sweep: whose trials it updates. The configuration of each of Tune's trials has an `index` into them.
        prepared: the run of each trial.
        show: prints a line.
        seconds: shortest time between two tables.
    """

    def __init__(
        self, sweep: Sweep, prepared: list[PreparedRun], *, show: Callable[[str], None], seconds: float
    ) -> None:
        self._sweep = sweep
        self._prepared = prepared
        self._show = show
        self._seconds = seconds
        self._shown = float("-inf")
        self._began: dict[str, tuple[float, int]] = {}
        """Time and step of each running trial's first report: the time before that is start-up."""
        self._started: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self._of(trial)
        own.status = "running"
        self._started[own.name] = time.monotonic()
        self._sweep.save()
        self._table(now=True)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        own = self._of(trial)
        own.step = int(result.get("step", own.step))
        own.scores |= {name: float(value) for name, value in result.items() if name.startswith("score/")}
        self._began.setdefault(own.name, (time.monotonic(), own.step))
        self._table(now=False)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own, result = self._of(trial), trial.last_result or {}
        if reason := result.get("failed"):
            self._failed(own, trial, reason)
        elif "run_id" in result:
            self._ended(own, trial, "finished")
        else:
            self._ended(own, trial, "stopped")
            if own.run_id:  # its process has been ended, so it cannot do this itself
                self._note(own, {"vmoco.stopped": f"by ASHA at step {own.step}"}, status="KILLED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reasons = str(trial.get_pickled_error() or "").strip().splitlines() or ["its process was lost"]
        own = self._of(trial)
        self._failed(own, trial, reasons[-1])
        if own.run_id:
            self._note(own, {}, status="FAILED")

    def _failed(self, own: Trial, trial: Any, reason: str) -> None:
        own.reason = reason
        self._show(f"trial {own.name} failed: {reason}")
        self._ended(own, trial, "failed")
        if own.run_id:
            self._note(own, {"vmoco.failed": reason[:5000]})

    def _note(self, own: Trial, tags: dict[str, str], *, status: str | None = None) -> None:
        """Writes to the tracker. A tracker that does not answer does not end the sweep."""
        assert own.run_id is not None, "the callers check it"
        problems = [tracking.note_run(own.run_id, tags=tags)]
        if status is not None:
            problems.append(tracking.finish_run(own.run_id, status))
        for problem in filter(None, problems):
            self._show(f"warning: {problem}")

    def _ended(self, own: Trial, trial: Any, status: Any) -> None:
        own.status = status
        if (started := self._started.pop(own.name, None)) is not None:  # none where its process never started
            own.seconds += time.monotonic() - started
        own.run_id = run_id_of(self._prepared[trial.config["index"]])
        self._sweep.save()
        self._table(now=True)

    def _of(self, trial: Any) -> Trial:
        return self._sweep.trials[trial.config["index"]]

    def _table(self, *, now: bool) -> None:
        if not now and time.monotonic() - self._shown < self._seconds:
            return
        self._shown = time.monotonic()
        for line in table(self._sweep, {name: self._seconds_left(name) for name in self._began}):
            self._show(line)

    def _seconds_left(self, name: str) -> float | None:
        trial = next(trial for trial in self._sweep.trials if trial.name == name)
        began, first = self._began[name]
        if trial.status != "running" or trial.step <= first:
            return None
        return (time.monotonic() - began) / (trial.step - first) * (trial.steps - trial.step)


def table(sweep: Sweep, seconds_left: dict[str, float | None]) -> list[str]:
    """Lines with name, state, step, score, effective rank, time left and values of each trial."""
    width = max(len(trial.name) for trial in sweep.trials)
    lines = [f"{'trial':{width}}  {'state':8}  {'step':>13}  {sweep.metric:>14}  {'rank':>6}  {'left':>8}  values"]
    for trial in sweep.trials:
        score, rank = trial.scores.get(sweep.score), trial.scores.get("score/effective_rank")
        left = seconds_left.get(trial.name)
        lines.append(
            f"{trial.name:{width}}  {trial.status:8}  {f'{trial.step}/{trial.steps}':>13}  "
            f"{'-' if score is None else f'{score:.3f}':>14}  {'-' if rank is None else f'{rank:.1f}':>6}  "
            f"{'-' if left is None else f'{left // 60:.0f}:{left % 60:02.0f}':>8}  " + as_text(trial.values)
        )
    return lines
