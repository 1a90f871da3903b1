"""Where does the time of a training step on a CPU go? `python -m tests.benchmarks.step_profile [--rounds N]`.

`TrainStep` itself with the settings of the ablation (r3d_nano, 16x32x32, batch 48 in micro-batches of 24, queue of
2,048 keys, AdamW) on drawn clips, with one thread. Arms: MoCo on grey clips, MoCo with 20 % grey ones, random dropping,
and adversarial dropping in every step; the last two on grey clips. Half of the clips are blurred. The arms alternate,
and the median of each part over the rounds counts.

The time is that of this thread on a CPU, so other programs disturb it little. Each part is timed around the call that
does it. A backward pass belongs to the network that it runs through: G's is `generator`; D's, and the pixels' gradient
of G's loss, are `query_encoder`. The loader reads its batch in this thread here; in a run another thread reads ahead.
`rest` is the loss, the fill and choice of dropped frames, the momentum update, the queue and the metrics.

Shares in percent, 5 rounds on a loaded 2-core machine, torch 2.14; another run differed by 2 points at most:

| arm             | loader | augmentation | generator | query encoder | key encoder | optimizer | rest |
|-----------------|--------|--------------|-----------|---------------|-------------|-----------|------|
| moco_grey       | 2.1    | 14.1         | 0         | 58.4          | 19.4        | 0.8       | 5.2  |
| moco_colour     | 1.8    | 26.4         | 0         | 49.6          | 17.0        | 0.7       | 4.5  |
| random_dropping | 2.1    | 13.9         | 0         | 58.4          | 19.4        | 0.8       | 5.4  |
| adversarial     | 1.1    | 7.1          | 11.1      | 66.0          | 10.1        | 0.5       | 4.1  |

For grey clips the aim was a share of augmentation of 8 %, and it is missed: what is left is converting bytes, the crop
(two products of matrices) and the blur. A step of MoCo took 0.6 s in the first ablation, and takes 0.31 s in the last.

Ends with one JSON line: the shares, and the CPU milliseconds of a step.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.benchmarks.ablation import ADVERSARIAL, BASE, RANDOM
from tests.dataset import make_data_set
from tests.train.test_step import CPU, changed
from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.train import step as step_module
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep

LONG = changed(BASE, train={"steps": 10**6})
ARMS: dict[str, PretrainSettings] = {
    "moco_grey": LONG,
    "moco_colour": changed(LONG, augment={"grey_probability": 0.2}),
    "random_dropping": changed(LONG, generator=RANDOM),
    "adversarial": changed(LONG, generator=ADVERSARIAL | {"start_percent": 0.0}),
}
PARTS = ("loader", "augmentation", "generator", "query_encoder", "key_encoder", "optimizer", "rest")


class Stopwatch:
    """Adds up this thread's CPU time by part; time inside an inner part does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside: list[str] = []
        self._since = 0.0

    def _charge(self) -> None:
        now = time.thread_time()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, time belongs to this part."""
        self._charge()
        self._inside.append(name)
        try:
            yield
        finally:
            self._charge()
            self._inside.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as this part."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


class ProfiledStep:
    """The training of an arm; each call takes one step.

    Args:
        settings: of the arm.
        manifest: clips to train on.
    """

    def __init__(self, settings: PretrainSettings, manifest: Manifest) -> None:
        self.state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
        self.loader = Loader(manifest, settings, rank=0, world_size=1)
        self.step = TrainStep(settings, self.state, CPU)
        self.watch = Stopwatch()
        moco = self.state.moco
        for part, network in (
            ("query_encoder", moco.query),
            ("key_encoder", moco.key),
            ("generator", moco.generator),
        ):
            network.forward = self.watch.timed(part, network.forward)  # type: ignore[method-assign]

    def __call__(self) -> dict[str, float]:
        """Seconds of each part of one step."""
        watch = self.watch
        watch.seconds = dict.fromkeys(PARTS, 0.0)
        backward = torch.Tensor.backward

        def timed_backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            # G's backward starts from the importance (B, T), D's from the loss.
            with watch.part("generator" if tensor.ndim == 2 else "query_encoder"):
                backward(tensor, *args, **kwargs)  # type: ignore[no-untyped-call]

        with (
            watch.part("rest"),
            mock.patch.object(step_module, "augment", watch.timed("augmentation", step_module.augment)),
            mock.patch.object(step_module, "take_step", watch.timed("optimizer", step_module.take_step)),
            mock.patch.object(torch.autograd, "grad", watch.timed("query_encoder", torch.autograd.grad)),
            mock.patch.object(torch.Tensor, "backward", timed_backward),
        ):
            with watch.part("loader"):
                batch = self.loader.batch(self.state.step)
            self.step(batch)
        return watch.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each arm that count")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)  # then a backward pass runs in this thread, whose time is measured
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_data_set(Path(folder), num_videos=120, num_frames=16, height=48, width=64)
        steps = {arm: ProfiledStep(settings, manifest) for arm, settings in ARMS.items()}
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for number in range(rounds + 2):
            for arm, step in steps.items():
                seconds = step()
                if number >= 2:  # the first ones allocate
                    found[arm].append(seconds)
    report: dict[str, dict[str, float]] = {}
    for arm, each in found.items():
        medians = {part: statistics.median(seconds[part] for seconds in each) for part in PARTS}
        total = sum(medians.values())
        report[arm] = {part: round(medians[part] / total, 3) for part in PARTS}
        report[arm]["cpu_milliseconds"] = round(1000 * total)
        print(arm, report[arm], flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
