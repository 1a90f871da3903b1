"""Does one loader feed a GPU? `python -m tests.benchmarks.feed [--rounds N]`.

Clips per second of a loader that does nothing else, with 1 and 2 threads: raw clips that were read before, raw clips on
their first read (which hashes them), and JPEG. A clip is one of the global batch: two views of 16 of the 32 stored
frames of 128x171. All files are in the page cache. The settings alternate, and medians count. `jpeg_over_cores` is the
rate of JPEG clips divided by that of one thread times the number of threads, or of cores where these are fewer: 1 says
that threads add up. Beside them: what a rank consumes with `recommended` at 15, 25 and 40 % of an H100's peak, computed
from shapes.

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from tests.benchmarks.sizing import PEAK
from tests.dataset import make_data_set
from tests.train.test_step import changed
from vmoco.config import PretrainSettings
from vmoco.data.cores import own_cores
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.model.cost import step_cost
from vmoco.presets import PRESETS

STORED, FRAMES, HEIGHT, WIDTH, CLIPS = 32, 16, 128, 171, 32
THREADS = (1, 2)


def settings_for(threads: int) -> PretrainSettings:
    return changed(
        PRESETS["tiny"][1],
        data={"num_frames": FRAMES, "loader_threads": threads},
        augment={"size": 112},
        train={"steps": 10**6, "global_batch": CLIPS, "micro_batch": CLIPS // 2},
    )


def clips_per_second(loader: Loader, steps: range) -> float:
    started = time.perf_counter()
    for step in steps:
        loader.batch(step)
    return len(steps) * CLIPS / (time.perf_counter() - started)


def measure(raw: Manifest, jpeg: Manifest, rounds: int) -> dict[str, dict[int, float]]:
    """Median clips per second, by kind and number of threads."""
    epoch = range(raw.table.num_rows // CLIPS)
    found: dict[str, dict[int, list[float]]] = {
        kind: {threads: [] for threads in THREADS} for kind in ("raw_warm", "raw_first", "jpeg")
    }
    for _, threads in itertools.product(range(rounds), THREADS):
        loader = Loader(raw, settings_for(threads), rank=0, world_size=1)
        found["raw_first"][threads].append(clips_per_second(loader, epoch))
        for step in range(len(epoch), 4 * len(epoch)):
            loader.batch(step)  # each clip is checked once
        found["raw_warm"][threads].append(clips_per_second(loader, epoch))
        loader = Loader(jpeg, settings_for(threads), rank=0, world_size=1)
        clips_per_second(loader, epoch)
        found["jpeg"][threads].append(clips_per_second(loader, epoch))
    return {
        kind: {threads: round(statistics.median(values), 1) for threads, values in each.items()}
        for kind, each in found.items()
    }


def over_cores(rates: dict[int, float]) -> dict[int, float]:
    """What each number of threads reaches of that many times one thread, on the cores of this process."""
    return {threads: round(rate / (rates[1] * min(threads, own_cores())), 3) for threads, rate in rates.items()}


def consumed() -> dict[int, float]:
    """Clips per second that a rank needs, at a percentage of an H100's peak."""
    settings = changed(PRESETS["recommended"][1], scaling={"num_workers": 8, "device": "gpu"})
    cost = step_cost(settings, bf16=True)
    return {mfu: round(mfu / 100 * PEAK * settings.train.global_batch / cost.flops_after, 1) for mfu in (15, 25, 40)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as place:
        sizes = {"num_videos": 64, "clips_per_video": 2, "num_frames": STORED, "height": HEIGHT, "width": WIDTH}
        raw = make_data_set(Path(place, "raw"), **sizes)
        jpeg = make_data_set(Path(place, "jpeg"), encoding="jpeg", **sizes)
        found = measure(raw, jpeg, rounds)
    print(json.dumps(found | {"jpeg_over_cores": over_cores(found["jpeg"]), "consumed_at_mfu": consumed()}))


if __name__ == "__main__":
    main()
