"""How a run does: gauges for Prometheus, MFU, staleness of the oldest keys. `machines.py` measures its machines.

The speed of a device is measured with a large matrix product, because a table of data sheets knows neither CPUs nor
throttled GPUs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vmoco.config import PretrainSettings
from vmoco.model.cost import step_cost
from vmoco.model.moco import running_statistics_kept
from vmoco.train import distributed
from vmoco.train.speed import uncompiled

if TYPE_CHECKING:
    from vmoco.data.loader import Loader
    from vmoco.train.state import TrainState
    from vmoco.train.step import TrainStep


PREFIX = "vmoco_"


class Gauges:
    """One gauge for each number that a run tracks, at Ray's metrics port, for Prometheus.

    Ray puts its prefix before the name: `loss` is `ray_vmoco_loss`, with the name of the run as a label.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def show(self, numbers: Mapping[str, float]) -> None:
        """Sets the gauges; Ray exports them every few seconds."""
        for name, value in numbers.items():
            self._gauge(name).set(value, tags={"run": self._run})

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge  # not at the top: Ray reads its token when it is imported

        if name not in self._gauges:
            about = f"{name} of the last step that was reported; see the run in MLflow"
            self._gauges[name] = Gauge(metric_name(name), description=about, tag_keys=("run",))
        return self._gauges[name]


def metric_name(name: str) -> str:
    """Name of a tracked number in Prometheus, without Ray's prefix: letters, digits and _ only."""
    return PREFIX + re.sub(r"\W", "_", name)


_SIZES = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrix product: milliseconds on either
_ROUNDS = 3


class Utilisation:
    """MFU: the arithmetic that the encoders of a step need, over what the device can do.

    `vmoco/model/cost.py` counts it. Augmentation, generator and loss are left out, so the share is a little too low.

    Args:
        settings: of the run.
        device: of this rank; the others are assumed to be equal.
        dtype: type in which the encoders run; None for float32.
    """

    def __init__(self, settings: PretrainSettings, device: torch.device, dtype: torch.dtype | None) -> None:
        self._settings = settings
        self._cost = step_cost(settings, bf16=False)
        self._peak = _peak_flops(device, dtype or torch.float32)

    def share(self, step: int, seconds: float) -> float:
        """Share of the device's arithmetic that a step used.

        Args:
            step: counted from 0; tells whether the generator has started.
            seconds: duration of the step.
        """
        settings = self._settings
        flops = self._cost.flops_after if step >= settings.generator_start else self._cost.flops_before
        return flops / distributed.world_size() / (seconds * self._peak)


def _peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = _SIZES.get(device.type, _SIZES["cpu"])
    one, other = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first one warms up
        started = time.perf_counter()
        float((one @ other)[0, 0])  # waits for the product
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


@torch.no_grad()  # changes nothing, not even the running statistics
def oldest_key_similarity(step: TrainStep, state: TrainState, loader: Loader) -> float | None:
    """Staleness: mean cosine between the oldest keys of the queue and the keys of the same clips now.

    It covers one micro-batch of the oldest step that is still complete in the queue, on rank 0, which loaded the first
    one. Plan and augmentation are functions of the step, so the view is the one from which the key was made. It is
    encoded in the same micro-batch, because a key depends on the other clips of its batch.

    Returns:
        None where the queue is empty.
    """
    queue, batch = state.moco.queue, state.settings.train.global_batch
    age = min(state.step, queue.length // batch)
    if age == 0:
        return None
    view, places = loader.first_keys(state.step - age)
    backwards = loader.reversed_keys(state.step - age)[: len(places)]
    slots = (queue.pointer - age * batch + torch.from_numpy(places)) % queue.length
    stored = queue.keys[slots.to(queue.keys.device)]
    # Rank 0 alone is here: it must not compile for minutes while the others wait, and kept statistics are a new kind of
    # forward for a compiled encoder.
    with running_statistics_kept(state.moco.key), uncompiled(state.settings.train):
        again, _ = step.encode_keys(view, backwards=backwards)
    return float((stored * again).sum(dim=1).mean())
