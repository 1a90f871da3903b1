"""Does training ever wait for data? `python -m tests.benchmarks.loader [--rounds N]`.

Three figures:

- Bytes per second of the loader, from the page cache and in its own thread, divided by those of one plain copy of the
  same clips from memory into an existing batch of the same layout. The two alternate; the median ratio counts.
- How much the memory of this process, without mapped files, grows from the end of the first epoch to the end of the
  tenth.
- Share of the time for which training waits for data, from the tenth step on, with the demo's settings on the demo's
  videos and one worker.

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

import torch

from tests.dataset import make_data_set, real_data_set, stored_clips
from tests.train.test_step import changed
from vmoco.config import PretrainSettings
from vmoco.data import footage
from vmoco.data.frames import Frames
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.presets import PRESETS
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep

CPU = torch.device("cpu")
FRAMES, HEIGHT, WIDTH, CLIPS = 16, 128, 171, 32  # a GPU's share of the paper's batch
BATCHES = 10


def settings_for(steps: int) -> PretrainSettings:
    return changed(
        PRESETS["tiny"][1],
        data={"num_frames": FRAMES},
        augment={"size": 112},
        train={"steps": steps, "global_batch": CLIPS, "micro_batch": CLIPS // 2},
    )


def loader_seconds(loader: Loader) -> float:
    """Seconds for BATCHES batches."""
    batches = iter(loader)
    for _ in range(5):  # use up what was read ahead before the clock starts
        next(batches)
    started = time.perf_counter()
    for _ in itertools.islice(batches, BATCHES):
        pass
    return time.perf_counter() - started


def copy_seconds(loader: Loader, clips: dict[str, Frames]) -> float:
    """Seconds to copy the same clips from memory, both views of BATCHES batches, into one existing batch."""
    batches = [loader.batch(step) for step in range(5, 5 + BATCHES)]
    sources = []
    for batch in batches:
        names = [loader.clip_ids[clip] for clip in loader.plan.batch(batch.step).clip]
        sources.append([[clips[name] for name in names], [clips[names[at]] for at in batch.key_order.tolist()]])
    targets = [view.frames.numpy() for view in (batches[0].query, batches[0].key)]
    started = time.perf_counter()
    for views in sources:
        for target, source in zip(targets, views, strict=True):
            for place, clip in enumerate(source):
                target[place] = clip
    return time.perf_counter() - started


def own_mib() -> float:
    """Memory of this process in MiB, without mapped files."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def growth_mib(manifest: Manifest) -> float:
    """Growth of memory from the end of epoch 1 to the end of epoch 10, in MiB."""
    loader = Loader(manifest, settings_for(10**6), rank=0, world_size=1)
    steps = loader.plan.epoch_length // CLIPS + 5  # and the batches that are read ahead
    batches = iter(loader)
    for _ in itertools.islice(batches, steps):
        pass
    before = own_mib()
    for _ in itertools.islice(batches, 9 * steps):
        pass
    return own_mib() - before


def data_wait(folder: Path, steps: int) -> float:
    """Share of a step's time for which the demo, one worker with two threads, waits for the batch."""
    manifest = real_data_set(folder, footage.fetch(), num_frames=16, height=80, width=107, max_clips=8)
    settings = PRESETS["demo"][1]
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step = TrainStep(settings, state, CPU)
    loader = Loader(manifest, settings, rank=0, world_size=1)
    started = waited = 0.0
    for batch in itertools.islice(loader, 10 + steps):
        if batch.step == 10:
            started, waited = time.perf_counter(), loader.seconds_waited
        step(batch)
    return (loader.seconds_waited - waited) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        manifest = make_data_set(
            Path(place, "drawn"), num_videos=64, clips_per_video=2, num_frames=FRAMES, height=HEIGHT, width=WIDTH
        )
        settings = settings_for(10**6)
        ratios, speeds = [], []
        clips = dict(zip(manifest.table["clip_id"].to_pylist(), stored_clips(manifest), strict=True))
        whole = Loader(manifest, settings, rank=0, world_size=1)
        for step in range(3 * 64 // CLIPS):
            whole.batch(step)  # each clip is checked once, on its first read
        for _ in range(arguments.rounds):
            ours, plain = loader_seconds(whole), copy_seconds(whole, clips)
            ratios.append(plain / ours)
            speeds.append(BATCHES * 2 * CLIPS * FRAMES * HEIGHT * WIDTH * 3 / ours / 1e9)
        print(
            f"loader {statistics.median(speeds):.2f} GB/s, ratios {[round(ratio, 2) for ratio in ratios]}", flush=True
        )
        growth = growth_mib(manifest)
        wait = data_wait(Path(place, "real"), arguments.steps)
    result = {"ratio": round(statistics.median(ratios), 3), "data_wait": round(wait, 4)}
    print(json.dumps(result | {"growth_mib": round(growth, 2), "gigabytes_per_second": statistics.median(speeds)}))


if __name__ == "__main__":
    main()
