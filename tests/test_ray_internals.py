"""Every private name of Ray that vmoco uses is in the installed Ray and does what vmoco needs.

Where a test fails after an upgrade of Ray, the message says which name broke and which function of
`vmoco/ray_internals.py` uses it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmoco import ray_internals
from vmoco.cluster.local import LocalCluster

HOME = "vmoco/ray_internals.py"

NAMES = [
    ("ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator", "get_or_create_autoscaling_coordinator"),
    ("ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator", "ResourceRequestPriority.HIGH"),
    ("ray.experimental.internal_kv", "_internal_kv_put"),
    ("ray.experimental.internal_kv", "_internal_kv_get"),
    ("ray.experimental.internal_kv", "_internal_kv_list"),
    ("ray.experimental.internal_kv", "_internal_kv_del"),
    ("ray.train.v2._internal.execution.context", "get_train_context"),
    ("ray.train.v2._internal.execution.worker_group.poll", "_is_preempted_actor"),
]
VARIABLES = [
    (ray_internals.JOB_CONFIG, "ray/_private/runtime_env/constants.py"),
    (ray_internals.WORKER_START_SECONDS, "ray/train/v2/_internal/constants.py"),
    (ray_internals.HEALTH_CHECK_SECONDS, "ray/train/v2/_internal/constants.py"),
    (ray_internals.DRAIN_SECONDS, "ray/_private/ray_constants.py"),
    (ray_internals.JOB_STOP_SECONDS, "ray/dashboard/modules/job/job_supervisor.py"),
    (ray_internals.CHANGE_DIRECTORY, "ray/train/constants.py"),
    *((name, "ray/tune/constants.py") for name in ray_internals.TUNE_SWITCHES),
    (ray_internals.SUBMISSION_ID, "ray/dashboard/modules/job/common.py"),
    (ray_internals.HEAD_IS_UP, "ray/_common/utils.py"),
]


def ray_source(path: str) -> str:
    """A source file of the installed Ray, which is not imported."""
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    file = Path(found.origin).parents[1] / path
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])
def test_the_name_is_there(module: str, name: str) -> None:
    """The module can be imported and has the name."""
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"Ray has no {module}.{name} any more ({error}): {HOME} uses it")


@pytest.mark.parametrize(("name", "path"), VARIABLES, ids=[name for name, _ in VARIABLES])
def test_ray_reads_the_name(name: str, path: str) -> None:
    """Ray's source has the environment variable, key or file name, so setting it has an effect."""
    assert name in ray_source(path), f"{path} of Ray does not have {name!r} any more: {HOME} and its callers use it"


def test_the_coordinator_takes_what_we_ask() -> None:
    """The coordinator's actor has the methods, with the parameters that we pass."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor

    wanted = {
        "request_resources": {"requester_id", "resources", "expire_after_s", "priority"},
        "cancel_request": {"requester_id"},
        "get_reserved_resources": {"requester_id"},
    }
    for method, parameters in wanted.items():
        found = getattr(_AutoscalingCoordinatorActor, method, None)
        assert found is not None, f"Ray's coordinator has no {method} any more: {HOME} calls it"
        missing = parameters - set(inspect.signature(found).parameters)
        assert not missing, f"Ray's coordinator has no {missing} in {method} any more: {HOME} passes it"


def test_train_asks_under_the_name_that_we_cancel() -> None:
    """A trainer knows its run's id before it starts, and its scaling policy asks by `train-<id>`."""
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(lambda: None)
    source = ray_source("ray/train/v2/_internal/execution/scaling_policy/scaling_policy.py")
    assert ray_internals.requester_of(trainer).startswith("train-"), f"requester_of in {HOME} broke"
    assert 'f"train-{' in source, f"Ray Train asks by another name than requester_of in {HOME} says"


def test_errors_hold_what_they_wrap() -> None:
    """Each of Ray's errors keeps the inner error where `wrapped_errors` looks for it."""
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    cause = ValueError("the cause")
    for error in (
        RayTaskError("task", "trace", cause, pid=1, ip="::1"),
        RayTaskError("task", "trace", cause, pid=1, ip="::1").as_instanceof_cause(),
        ControllerError(cause),
        UserExceptionWithTraceback(cause, "trace"),
    ):
        found = ray_internals.wrapped_errors(error)
        assert found == ({}, cause), f"{type(error).__name__} hides its cause: WRAPPED in {HOME} is out of date"
    failures = ray_internals.wrapped_errors(WorkerGroupError("text", {3: cause}))
    assert failures == ({3: cause}, None), f"WorkerGroupError hides its failures: FAILURES in {HOME} is out of date"


def test_a_machine_that_was_taken_away_is_told_from_a_crash() -> None:
    """Only an actor that Ray marks as preempted counts as such, also within the error of a health check."""
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    taken, crashed = ActorDiedError(), ActorDiedError()
    taken._preempted = True
    assert ray_internals.is_preempted({0: RuntimeError("lost"), 1: WorkerHealthCheckFailedError("gone", taken)})
    assert not ray_internals.is_preempted({0: RuntimeError("lost"), 1: WorkerHealthCheckFailedError("gone", crashed)})


def test_the_notice_of_a_preemption_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own objects, with one machine that will be taken away, give the message with its ranks."""
    from ray.train import PreemptionInfo
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.preemption import PreemptionContext

    assert "preemption_context" in {field.name for field in dataclasses.fields(context.TrainContext)}, (
        f"Ray's TrainContext has no preemption_context any more: preemption_info in {HOME} reads it"
    )
    own = PreemptionContext()
    stand_in = type("Context", (), {"preemption_context": own})()
    monkeypatch.setattr(context, "get_train_context", lambda: stand_in)
    assert ray_internals.preemption_info() is None
    own.preemption_info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [2, 1]})
    assert ray_internals.preemption_info() == "the machine of rank 1, 2 will be taken away"


def test_a_submitted_job_knows_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The id comes from what Ray's job server puts into the environment; elsewhere there is none."""
    monkeypatch.delenv(ray_internals.JOB_CONFIG, raising=False)
    assert ray_internals.submission_id() is None
    monkeypatch.setenv(ray_internals.JOB_CONFIG, json.dumps({"metadata": {ray_internals.SUBMISSION_ID: "raysubmit_1"}}))
    assert ray_internals.submission_id() == "raysubmit_1"


def test_reading_an_error_imports_no_ray() -> None:
    """A job without Ray can describe its errors without loading Ray."""
    code = (
        "import sys; from vmoco import ray_internals; ray_internals.wrapped_errors(ValueError('x')); "
        "ray_internals.submission_id(); print('ray' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False\n"


@pytest.mark.cluster
def test_records_stay_in_the_head(ray_cluster: LocalCluster) -> None:
    """A record is read back, in its own namespace alone, and goes away when it is deleted."""
    ray_internals.put_record("key", "value", namespace="tested")
    assert ray_internals.records(namespace="tested") == {"key": "value"}
    assert ray_internals.records(namespace="other") == {}
    ray_internals.delete_record("key", namespace="tested")
    assert ray_internals.records(namespace="tested") == {}


@pytest.mark.cluster
def test_a_request_is_reserved_until_it_is_cancelled(ray_cluster: LocalCluster) -> None:
    """The coordinator reserves what was asked for, and nothing after the request was cancelled."""

    def reserved() -> float:
        nodes: dict[str, Any] = ray_internals.reserved_resources("tested", timeout=20)
        return sum(node.get("CPU", 0.0) for node in nodes.values())

    ray_internals.request_resources("tested", {"CPU": 1}, seconds=60)
    assert reserved() == 1
    ray_internals.cancel_request("tested", timeout=20)
    assert reserved() == 0
