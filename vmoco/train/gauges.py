"""The numbers of a run for Prometheus, by Ray's own metrics port: what MLflow keeps, seen while it happens.

Ray puts its prefix before the name: `loss` is `ray_vmoco_loss`, with the run's name as a label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PREFIX = "vmoco_"


class Gauges:
    """One gauge for each number that a run tracks.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def show(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Sets the gauges; Ray hands them on every few seconds."""
        for name, value in {**numbers, "step": float(step)}.items():
            self._gauge(name).set(value, tags={"run": self._run})

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge  # here, because Ray reads how to authenticate when it is imported

        if name not in self._gauges:
            about = f"{name} of the last step that was reported; see the run in MLflow"
            self._gauges[name] = Gauge(metric_name(name), description=about, tag_keys=("run",))
        return self._gauges[name]


def metric_name(name: str) -> str:
    """What a tracked number is called in Prometheus, without Ray's own prefix: letters, digits and _ alone."""
    return PREFIX + re.sub(r"\W", "_", name)
