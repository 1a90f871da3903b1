"""The numbers of a worker's machine."""

from __future__ import annotations

import time

from vmoco.train.system_metrics import SystemMetrics


def test_the_machine_is_watched() -> None:
    """Processor, memory, disk and network have numbers, under the names that MLflow shows as system metrics."""
    system = SystemMetrics()
    time.sleep(0.2)
    numbers = system.numbers()
    names = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"}
    assert {f"system/{name}" for name in names} <= set(numbers)
    assert numbers["system/system_memory_usage_megabytes"] > 0
    assert all(name.startswith("system/node-3/") for name in SystemMetrics("node-3").numbers())
