"""Every private name of MLflow that vmoco uses, so that an upgrade of MLflow is checked and fixed in one file.

`tests/test_mlflow_internals.py` checks each of them against the installed MLflow and names what broke. MLflow is
imported inside the functions, because that takes seconds. `encoders/encoder_program.py` has one more such name: it is
logged with each encoder and must work without vmoco, so it can import nothing from here.
"""

from __future__ import annotations

import contextlib
from typing import Any

JOB_EXECUTION = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"
"""Environment variable of `mlflow server`: with "false" it is 2 processes instead of 10."""


def machine_monitors() -> list[Any]:
    """MLflow's monitors of this machine: processor, disk, network, and NVIDIA GPUs where there are any.

    Each has `collect_metrics()`, `aggregate_metrics()` and `clear_metrics()`. MLflow's own thread that reads them ends
    for good when the tracker does not answer once, hence the private classes.
    """
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # whatever it raises, it means that there is no NVIDIA GPU to watch
        found.append(GPUMonitor())
    return found
