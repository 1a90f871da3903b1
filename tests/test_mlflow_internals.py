"""Every private name of MLflow that vmoco uses is in the installed MLflow and does what vmoco needs.

Where a test fails after an upgrade of MLflow, the message says which name broke and which file uses it.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

from vmoco import mlflow_internals
from vmoco.encoders import encoder_program

HOME = "vmoco/mlflow_internals.py"


@pytest.mark.parametrize("kind", ["CPU", "Disk", "GPU", "Network"])
def test_the_monitor_is_there(kind: str) -> None:
    """The class can be imported, and has the methods that are called."""
    module = f"mlflow.system_metrics.metrics.{kind.lower()}_monitor"
    try:
        monitor = getattr(importlib.import_module(module), f"{kind}Monitor")
    except (ImportError, AttributeError) as error:
        pytest.fail(f"MLflow has no {module}.{kind}Monitor any more ({error}): machine_monitors in {HOME} uses it")
    missing = {"collect_metrics", "aggregate_metrics", "clear_metrics"} - set(dir(monitor))
    assert not missing, f"MLflow's {kind}Monitor has no {missing} any more: vmoco/train/machines.py calls them"


def test_the_monitors_see_this_machine() -> None:
    """They measure processor, memory and disk in numbers, by the names under which MLflow shows them."""
    found: dict[str, float] = {}
    for monitor in mlflow_internals.machine_monitors():
        monitor.collect_metrics()
        found |= monitor.aggregate_metrics()
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= set(found)
    assert all(isinstance(value, int | float) for value in found.values())


def test_mlflow_marks_what_it_fetches_by_name() -> None:
    """The file in which MLflow says of which registered version a fetched folder is has the name that we look for."""
    from mlflow.store.artifact import models_artifact_repo

    assert models_artifact_repo.REGISTERED_MODEL_META_FILE_NAME == encoder_program._REGISTERED, (
        "MLflow has renamed its file registered_model_meta: vmoco/encoders/encoder_program.py reads it"
    )


def test_the_server_can_run_without_jobs() -> None:
    """MLflow knows the environment variable by which the demo's command keeps its server small."""
    found = importlib.util.find_spec("mlflow")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).with_name("environment_variables.py").read_text()
    assert mlflow_internals.JOB_EXECUTION in source, f"MLflow has renamed {mlflow_internals.JOB_EXECUTION} of {HOME}"
