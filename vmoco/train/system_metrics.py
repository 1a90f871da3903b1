"""How the machine of a worker is, beside the numbers of its run.

The numbers of a run for Prometheus, by Ray's own metrics port: what MLflow keeps, seen while it happens.

Ray puts its prefix before the name: `loss` is `ray_vmoco_loss`, with the run's name as a label.


How much of a device's arithmetic a step uses (MFU): what its encoders need over what the device can do.

What it can do is measured with a large matrix product in the type that the encoders run in, because a table of data
sheets knows neither CPUs nor throttled GPUs. What a step needs is counted by torch's own formulas for one forward of
the encoder: 4 forwards (query 1, its backward 2, key 1), and 6 once the generator trains (q_real 1, the gradient of the
pixels 1). Augmentation, generator and loss are left out, so the share is a little low and never flattering.


How far the key encoder has moved on since the oldest keys of the queue came in (their staleness).

The clips of their step are loaded once more: plan and augmentation are functions of the step, so the view is the very
one that the key was made of. It is encoded in the micro-batch of then, because a key depends on its batch-mates too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vmoco.config import PretrainSettings
from vmoco.mlflow_internals import machine_monitors
from vmoco.model.cost import step_cost
from vmoco.model.moco import running_statistics_kept
from vmoco.train import distributed

if TYPE_CHECKING:
    from vmoco.data.loader import Loader
    from vmoco.train.state import TrainState
    from vmoco.train.step import TrainStep


class SystemMetrics:
    """Processor, memory, disk, network and GPUs of this machine, under the names by which MLflow shows them apart.

    MLflow's own thread ends for good when the tracker does not answer once, so its monitors are read here and sent
    with the run's points.

    Args:
        node: name of this machine among those of the run; empty where there is one.
    """

    def __init__(self, node: str = "") -> None:
        self._prefix = f"system/{node}/" if node else "system/"
        self._monitors = machine_monitors()

    def numbers(self) -> dict[str, float]:
        """What the monitors see now; rates are since the last call."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= {self._prefix + name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return found


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


_SIZES = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrix product: milliseconds on either
_ROUNDS = 3


class Utilisation:
    """Arithmetic of a run's steps on this rank's device.

    Args:
        settings: of the run.
        device: of this rank; others are taken for equal.
        dtype: type that the encoders run in; None for float32.
    """

    def __init__(self, settings: PretrainSettings, device: torch.device, dtype: torch.dtype | None) -> None:
        self._settings = settings
        self._forward = step_cost(settings, bf16=False).forward_flops
        self._peak = _peak_flops(device, dtype or torch.float32)

    def share(self, step: int, seconds: float) -> float:
        """The share that a step of so many seconds has used.

        Args:
            step: counted from 0; the generator trains or not.
            seconds: that it took.
        """
        settings = self._settings
        forwards = 6 if step >= settings.generator_start else 4
        clips = settings.train.global_batch / distributed.world_size()
        return clips * forwards * self._forward / (seconds * self._peak)


def _peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = _SIZES.get(device.type, _SIZES["cpu"])
    one, other = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first one warms up
        started = time.perf_counter()
        float((one @ other)[0, 0])  # waits for the product
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


@torch.no_grad()  # looks, and changes nothing: not even the running statistics
def oldest_key_similarity(step: TrainStep, state: TrainState, loader: Loader) -> float | None:
    """Mean cosine between the oldest keys and what the key encoder makes of their clips now.

    Over one micro-batch of the oldest step that is still whole in the queue; rank 0 alone, which holds its first.

    Returns:
        None where the queue is empty.
    """
    queue, batch = state.moco.queue, state.settings.train.global_batch
    age = min(state.step, queue.length // batch)
    if age == 0:
        return None
    view, places = loader.first_keys(state.step - age)
    slots = (queue.pointer - age * batch + torch.from_numpy(places)) % queue.length
    stored = queue.keys[slots.to(queue.keys.device)]
    with running_statistics_kept(state.moco.key):
        again = step.encode_keys(view)
    return float((stored * again).sum(dim=1).mean())
