"""How the machine of a worker is, beside the numbers of its run."""

from __future__ import annotations

import contextlib
from typing import Any


class SystemMetrics:
    """Processor, memory, disk, network and GPUs of this machine, under the names by which MLflow shows them apart.

    MLflow's own thread ends for good when the tracker does not answer once, so its monitors are read here and sent
    with the run's points.

    Args:
        node: name of this machine among those of the run; empty where there is one.
    """

    def __init__(self, node: str = "") -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._prefix = f"system/{node}/" if node else "system/"
        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # whatever it raises, it means that there is no NVIDIA GPU to watch
            self._monitors.append(GPUMonitor())

    def numbers(self) -> dict[str, float]:
        """What the monitors see now; rates are since the last call."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= {self._prefix + name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return found
