"""Every private name of Ray that vmoco uses, so that an upgrade of Ray is checked and fixed in one file.

`tests/test_ray_internals.py` checks each of them against the installed Ray and names what broke. Ray is
imported inside the functions: it reads how to authenticate when it is imported, and some callers never need it. For
the same reason this file imports nothing of vmoco, and every layer may use it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable by which Ray's job server tells a driver that it is a submitted job."""
SUBMISSION_ID = "job_submission_id"
HEAD_IS_UP = "ray_current_cluster"
"""File in the temporary folder of a head. `ray start` writes it last."""
PROGRESS_LOGGER = "ray.data._internal.progress"
WORKER_START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
HEALTH_CHECK_SECONDS = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
DRAIN_SECONDS = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
JOB_STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S"
TUNE_SWITCHES = (
    "TUNE_DISABLE_STRICT_METRIC_CHECKING",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
    "TUNE_DISABLE_SIGINT_HANDLER",
)
CHANGE_DIRECTORY = "RAY_CHDIR_TO_TRIAL_DIR"
WRAPPED = ("cause", "controller_failure", "_base_exc")
"""Attributes in which Ray's errors hold the error that they wrap: RayTaskError, ControllerError, and Train's own."""
FAILURES = "worker_failures"
"""Attribute of Train's WorkerGroupError: the error of each rank that failed."""


def submission_id() -> str | None:
    """The id by which `ray job submit` started this process; None where it is no submitted job."""
    metadata = json.loads(os.environ.get(JOB_CONFIG) or "{}").get("metadata") or {}
    found: str | None = metadata.get(SUBMISSION_ID)
    return found


def start_local(folder: str, **options: Any) -> Any:
    """Starts a Ray of this process's own by `ray.init`, with its sockets and logs in a folder."""
    import ray

    return ray.init(address="local", _temp_dir=folder, **options)


def wrapped_errors(error: BaseException) -> tuple[dict[int, BaseException], BaseException | None]:
    """What one of Ray's errors wraps, read without importing Ray.

    Returns:
        The errors of ranks, by rank; and the error that caused this one, or None.
    """
    # Not getattr: Ray's RayTaskError(ValueError) hands unknown names on to its cause.
    own = vars(error)
    inner = [own[name] for name in WRAPPED if isinstance(own.get(name), BaseException)]
    return own.get(FAILURES) or {}, inner[0] if inner else None


def is_preempted(failures: Mapping[int, Exception]) -> bool:
    """Whether a machine that was taken away made one of these ranks fail, as Ray Train itself decides it."""
    from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor

    return any(_is_preempted_actor(error) for error in failures.values())


def preemption_info() -> str | None:
    """The machines of this run that will be taken away, as a message; None where there are none.

    The public `ray.train.get_preemption_info` is a barrier: all ranks wait at each call for an answer from an actor,
    which costs each step a round trip. This reads what this rank has received from Ray. The ranks agree by the sum
    that they exchange in each step anyway.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    ranks = ", ".join(str(rank) for rank in info.preempted_ranks)
    return f"the machine of rank {ranks} will be taken away"


def requester_of(trainer: TorchTrainer) -> str:
    """The name by which a trainer will ask Ray's coordinator for its workers."""
    context: Any = trainer.train_run_context  # type: ignore[attr-defined]  # mypy sees Ray Train's first version
    return f"train-{context.run_id}"


def request_resources(requester: str, bundle: Mapping[str, float], *, seconds: float) -> None:
    """Asks Ray's autoscaling coordinator for resources under a name, for some seconds; returns at once.

    The priority is that of Ray Train: of two such requests the earlier one counts.
    """
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority

    _coordinator().request_resources.remote(
        requester_id=requester,
        resources=[dict(bundle)],
        expire_after_s=seconds,
        priority=ResourceRequestPriority.HIGH,
    )


def cancel_request(requester: str, *, timeout: float) -> None:
    """Cancels a request to Ray's autoscaling coordinator.

    Raises:
        ray.exceptions.RayError: the coordinator does not answer within `timeout` seconds.
    """
    import ray

    ray.get(_coordinator().cancel_request.remote(requester), timeout=timeout)


def reserved_resources(requester: str, *, timeout: float) -> dict[str, dict[str, float]]:
    """What Ray's autoscaling coordinator has reserved for a request, by node."""
    import ray

    found: dict[str, dict[str, float]] = ray.get(
        _coordinator().get_reserved_resources.remote(requester), timeout=timeout
    )
    return found


def _coordinator() -> Any:
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    return get_or_create_autoscaling_coordinator()


def put_record(key: str, value: str, *, namespace: str) -> None:
    """Writes a record to the store of Ray's head, which outlives this process."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key, value, namespace=namespace)


def records(*, namespace: str) -> dict[str, str]:
    """All records of a namespace in the store of Ray's head, by key."""
    from ray.experimental import internal_kv

    keys = internal_kv._internal_kv_list("", namespace=namespace)
    found = {key.decode(): internal_kv._internal_kv_get(key, namespace=namespace) for key in keys}
    return {key: value.decode() for key, value in found.items() if value is not None}


def delete_record(key: str, *, namespace: str) -> None:
    """Removes a record from the store of Ray's head, if it is there."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(key, namespace=namespace)
