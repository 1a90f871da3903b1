"""What does a full VideoMoCo step cost beside a supervised one? `python -m tests.benchmarks.step [--rounds N]`.

Both train the same encoder in the same type and layout, at 16x112x112, batch 2, 2 threads. `--backbones swin3d_t` takes
that row alone.
The VideoMoCo step is `TrainStep` itself with generator, both losses, a full queue of 65,536 keys and both
optimizers; augmentation is in neither. The two alternate and the median ratio of neighbours counts. bf16 is for the
time alone: its weight gradients are wrong on CPUs (vmoco/model/backbone.py). Peak memory is that of a process of
its own which takes two fp32 steps, above what it held before. Units are FLOPs of the step over those of one forward.
Those of mvit_v2_s are about 1 too high: torch counts the weight gradient of a convolution as if it had no groups.
The generator's share is its forward and backward alone over the whole fp32 step. With `--generator.every 4` four steps,
of which G trains in one, are compared with four supervised ones.
Ends with one JSON line: the fp32 ratios of time, those of every 4, the worse memory ratio, and everything else by name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vmoco.clip_settings import DataSettings
from vmoco.config import GeneratorSettings, ModelSettings, PretrainSettings, TrainSettings
from vmoco.data.loader import RankBatch, View
from vmoco.model.generator import Generator
from vmoco.model.moco import MocoEncoder
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep

CPU = torch.device("cpu")
SHAPE = (2, 3, 16, 112, 112)
BACKBONES = ("r3d_18", "r2plus1d_18", "swin3d_t", "swin3d_s", "mvit_v2_s")
CYCLE = 4


class PlainStep(TrainStep):
    """Takes clips that are augmented already."""

    def _augmented(self, view: View, micro: slice) -> torch.Tensor:
        return view.frames[micro]

    def _raise_non_finite(self, step: int, clip_ids: list[str], bad_here: bool) -> None:
        """Goes on: bf16 gradients on CPUs are often not finite, and the time is what counts here."""


def encoder_of(backbone: str) -> MocoEncoder:
    """As in the full step."""
    return MocoEncoder(backbone, embedding_dim=128, head="linear", num_frames=SHAPE[2], size=SHAPE[3])


def random_clips() -> torch.Tensor:
    return torch.randn(SHAPE).contiguous(memory_format=torch.channels_last_3d)


def moco_step(backbone: str, dtype: torch.dtype | None) -> Callable[[], object]:
    """A full step, adversarial from the first one, with a full queue."""
    return state_and_step(backbone, dtype)[1]


def moco_step_of_four(backbone: str, dtype: torch.dtype | None) -> Callable[[], object]:
    """The same with a G that trains in the first, the fifth, and so on."""
    return state_and_step(backbone, dtype, every=CYCLE)[1]


def state_and_step(
    backbone: str, dtype: torch.dtype | None = None, *, every: int = 1
) -> tuple[TrainState, Callable[[], object]]:
    """A training state with a full queue, and a step on it, adversarial from the first one."""
    settings = PretrainSettings(
        data=DataSettings(num_frames=SHAPE[2]),
        model=ModelSettings.model_validate({"backbone": backbone}),
        generator=GeneratorSettings(start_percent=0.0, every=every),
        train=TrainSettings(steps=10**6, global_batch=SHAPE[0], micro_batch=SHAPE[0]),
    )
    state = TrainState(settings, manifest_hash="", device=CPU, autocast_dtype=dtype)
    queue = state.moco.queue
    queue.enqueue(F.normalize(torch.randn(queue.length, 128), dim=1), torch.arange(queue.length), step=0)
    step = PlainStep(settings, state, CPU)
    batch = RankBatch(
        step=0,
        query=View(random_clips(), torch.zeros(2, 1)),
        key=View(random_clips(), torch.zeros(2, 1)),
        random_importance=torch.rand(2, SHAPE[2]),
        clip_ids=["a", "b"],
        data_sets=torch.zeros(2, dtype=torch.int64),
        share=slice(0, 2),
        clips_per_rank=[2],
        key_order=torch.arange(2),
        video_ids=torch.tensor([-2, -3]),
        reversed_keys=torch.zeros(2, dtype=torch.bool),
    )
    return state, lambda: step(replace(batch, step=state.step))


def supervised_step(backbone: str, dtype: torch.dtype | None) -> Callable[[], object]:
    """Forward, cross-entropy over 400 classes, backward, SGD: the same encoder and layout."""
    encoder = encoder_of(backbone).backbone
    model = nn.Sequential(encoder, nn.Linear(encoder.feature_dim, 400))
    model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    clips, labels = random_clips(), torch.tensor([1, 2])

    def step() -> None:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(clips)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def generator_step() -> Callable[[], object]:
    """Forward and backward of G, as in a full step."""
    generator, clips = Generator(GeneratorSettings()), random_clips()
    gradient = torch.randn(SHAPE[0], SHAPE[2])
    return lambda: generator(clips).backward(gradient)


STEPS = {"videomoco": moco_step, "supervised": supervised_step}


def seconds_of(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def time_ratio(backbone: str, dtype: torch.dtype | None, rounds: int) -> tuple[float, dict[str, float]]:
    """Median of the ratios of neighbours, and the median seconds of each."""
    steps = {name: build(backbone, dtype) for name, build in STEPS.items()} | {"generator": generator_step()}
    for step in steps.values():
        step()  # the first one allocates
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step))
    ratios = [full / plain for full, plain in zip(seconds["videomoco"], seconds["supervised"], strict=True)]
    return statistics.median(ratios), {name: statistics.median(times) for name, times in seconds.items()}


def cycle_ratio(backbone: str, rounds: int) -> tuple[float, dict[str, float]]:
    """Median of the ratios of four fp32 steps with a G that trains in one of them, and the median seconds of each."""
    full, plain = moco_step_of_four(backbone, None), supervised_step(backbone, None)
    for _ in range(CYCLE):  # the first ones allocate
        full()
    plain()
    pairs = []
    for _ in range(rounds):
        taken = [(seconds_of(full), seconds_of(plain)) for _ in range(CYCLE)]
        pairs.append(tuple(map(sum, zip(*taken, strict=True))))
    seconds = {
        "videomoco": statistics.median(a for a, _ in pairs),
        "supervised": statistics.median(b for _, b in pairs),
    }
    return statistics.median(a / b for a, b in pairs), seconds


class FlopCount(TorchDispatchMode):
    """Adds up FLOPs by torch's own formulas; torch's FlopCounterMode cannot look into `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def units(backbone: str) -> dict[str, float]:
    """FLOPs of each step, in forwards of the encoder."""
    counts = {}
    encoder, clips = encoder_of(backbone), random_clips()

    def forward() -> None:
        with torch.no_grad():
            encoder(clips)

    for name, step in {"forward": forward, **{name: build(backbone, None) for name, build in STEPS.items()}}.items():
        with FlopCount() as counter:
            step()
        counts[name] = counter.total
    return {name: counts[name] / counts["forward"] for name in STEPS}


def peak_megabytes(name: str, backbone: str) -> float:
    """Memory that two steps add at most, in this process."""
    torch.set_num_threads(2)
    before = _peak_kibibytes()
    step = STEPS[name](backbone, None)
    step()
    step()
    return (_peak_kibibytes() - before) / 1024


def _peak_kibibytes() -> int:
    # Not ru_maxrss: a new process begins with that of the one that started it.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=BACKBONES)
    given = parser.parse_args()
    rounds = given.rounds
    torch.set_num_threads(2)
    report: dict[str, dict[str, object]] = {}
    for backbone in given.backbones:
        row: dict[str, object] = {"units": {name: round(value, 2) for name, value in units(backbone).items()}}
        for label, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
            ratio, seconds = time_ratio(backbone, dtype, rounds)
            row[label] = round(ratio, 3)
            row[f"{label}_seconds"] = {name: round(value, 3) for name, value in seconds.items()}
            if dtype is None:
                row["generator_share"] = round(seconds["generator"] / seconds["videomoco"], 4)
        ratio, seconds = cycle_ratio(backbone, rounds)
        row["every_4"] = round(ratio, 3)
        row["every_4_seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        megabytes = {}
        for name in STEPS:  # each in a fresh process: the peak of a process never falls
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                megabytes[name] = pool.submit(peak_megabytes, name, backbone).result()
        row["megabytes"] = {name: round(value) for name, value in megabytes.items()}
        row["memory_ratio"] = round(megabytes["videomoco"] / megabytes["supervised"], 3)
        report[backbone] = row
        print(backbone, row, flush=True)
    headline = {backbone: row["fp32"] for backbone, row in report.items()}
    every = {"every_4": {backbone: row["every_4"] for backbone, row in report.items()}}
    memory = max(float(str(row["memory_ratio"])) for row in report.values())
    print(json.dumps(headline | every | {"memory_ratio": memory, "details": report}))


if __name__ == "__main__":
    main()
