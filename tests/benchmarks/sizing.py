"""Calculates the size of a service: prints the tables of cluster/README.md, from rates of one core and from shapes.

    python -m tests.benchmarks.sizing

Measured: decoding and scaling 640x360 h264 to the stored size, 475 frames/s per core; a JPEG of quality 92 of a 128x171
frame, 6,000 bytes; a loader's thread that decodes such JPEGs, 6,300 frames/s (`tests.benchmarks.feed`).
`vmoco.model.cost` counts the operations of a step.
Not measured: the share of its peak that a GPU reaches (MFU). The tables give the hours for several values of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmoco.config import PretrainSettings
from vmoco.model.cost import step_cost
from vmoco.places import ScalingSettings
from vmoco.presets import PRESETS

FRAMES_PER_CORE = 475
JPEG_BYTES = 6_000
RAW_BYTES = 128 * 171 * 3
JPEG_FRAMES_PER_CORE = 6_300
PEAK = 989e12
"""Nominal bf16 operations per second of an H100 SXM."""
DOLLARS_PER_GPU_HOUR = 2.5
EPOCHS = 200
LINK = 25e9 / 8
"""Bytes per second of one 25 Gbit/s network card."""


@dataclass(frozen=True)
class DataSet:
    """A set of videos."""

    name: str
    videos: int
    frames_per_video: int


SETS = (
    DataSet("K400", 240_000, 300),
    DataSet("K700", 545_000, 300),
    DataSet("100 M clips of 32 frames", 100_000_000, 32),
)


def sets() -> Iterator[str]:
    """A row for each set: ingest and training with the preset `recommended`, one clip of each video an epoch."""
    yield "| | K400 | K700 | 100 M clips of 32 frames |"
    yield "|---|---|---|---|"
    settings = PRESETS["recommended"][1]
    cost = step_cost(settings, bf16=True)
    frames = [each.videos * each.frames_per_video for each in SETS]
    clip_flops = cost.flops_before / settings.train.global_batch  # no generator ever starts
    gpu_hours = [[each.videos * clip_flops / (mfu * PEAK) / 3600 for each in SETS] for mfu in (0.1, 0.2, 0.4)]
    yield _row("videos, frames each", [f"{each.videos:,} x {each.frames_per_video}" for each in SETS])
    yield _row("ingest, core hours", [f"{each / FRAMES_PER_CORE / 3600:,.0f}" for each in frames])
    yield _row("stored as JPEG", [f"{each * JPEG_BYTES / 1e12:,.2f} TB" for each in frames])
    yield _row("stored raw", [f"{each * RAW_BYTES / 1e12:,.1f} TB" for each in frames])
    for mfu, hours in zip((10, 20, 40), gpu_hours, strict=True):
        yield _row(f"GPU hours an epoch, {mfu} % MFU", [f"{each:,.1f}" for each in hours])
    yield _row("cost of an epoch, 20 % MFU", [f"${each * DOLLARS_PER_GPU_HOUR:,.2f}" for each in gpu_hours[1]])
    yield _row(f"days of {EPOCHS} epochs, 8 GPUs, 20 %", [f"{each * EPOCHS / 8 / 24:,.1f}" for each in gpu_hours[1]])


def scales() -> Iterator[str]:
    """A row for each limit at 8, 64 and 1,024 GPUs: `recommended` with 32 clips per GPU, at 20 % MFU."""
    sizes = (8, 64, 1024)
    yield "| | " + " | ".join(f"{size:,} GPUs" for size in sizes) + " |"
    yield "|---|---|---|---|"
    costs = [step_cost(_scaled(size), bf16=True) for size in sizes]
    batches = [_scaled(size).train.global_batch for size in sizes]
    seconds = [cost.flops_before / size / (0.2 * PEAK) for cost, size in zip(costs, sizes, strict=True)]
    clips = [batch / each for batch, each in zip(batches, seconds, strict=True)]
    read = [each * 2 * 16 * JPEG_BYTES for each in clips]  # query and key, 16 frames each
    yield _row("global batch", [f"{each:,}" for each in batches])
    yield _row("seconds a step", [f"{each:.2f}" for each in seconds])
    yield _row("clips a second", [f"{each:,.0f}" for each in clips])
    yield _row("read from the store", [f"{each / 1e9:.2f} GB/s" for each in read])
    yield _row("cores that decode JPEG, each GPU", [f"{clips[0] / 8 * 32 / JPEG_FRAMES_PER_CORE:.1f}"] * 3)
    yield _row("gradients that a GPU sends a step", [f"{each.gradient_bytes / 1e6:.0f} MB" for each in costs])
    spent = [each.gradient_bytes / LINK / second for each, second in zip(costs, seconds, strict=True)]
    yield _row("of a step, on 25 Gbit/s a GPU", [f"{each:.0%}" for each in spent])
    yield _row("keys that a GPU receives a step", [f"{each.key_bytes / 1e6:.1f} MB" for each in costs])
    yield _row(
        "queue, in steps", [f"{_scaled(s).moco.queue_size / b:.0f}" for s, b in zip(sizes, batches, strict=True)]
    )
    yield _row("steps an epoch of K700", [f"{SETS[1].videos // each:,}" for each in batches])


def _scaled(gpus: int) -> PretrainSettings:
    settings = PRESETS["recommended"][1]
    scaling = ScalingSettings(num_workers=gpus, device="gpu")
    return settings.model_copy(
        update={"scaling": scaling, "train": settings.train.model_copy(update={"global_batch": 32 * gpus})}
    )


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def tables() -> dict[str, str]:
    """The tables, by their names in the README."""
    return {"sets": "\n".join(sets()), "scales": "\n".join(scales())}


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"<!-- {name} -->\n{table}\n")
