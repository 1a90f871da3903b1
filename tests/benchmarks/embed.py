"""How much slower is embedding than the bare network? `python -m tests.benchmarks.embed [--backbone r2plus1d_18]`.

The result is the clips per second of `vmoco.evaluate.embed`, divided by those of the bare forward of the same encoder.
The bare forward repeats one batch of prepared floats, in one pinned process per core, all at the same time. Embedding
reads shards, crops, scales, normalises and writes Parquet, in one Ray actor per core. Its rate is measured in the
steady state, from the time when a quarter of the parts are done to the last round but one (by the time stamps of the
parts). So the start of Ray and the end, when a core has nothing left to do, do not count. The bare forward is measured
before and after embedding; the mean counts. Ends with one JSON line: the ratio, both rates, and the conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from tests.dataset import write_data_set
from tests.made import encoder_of
from vmoco import job
from vmoco.data.manifest import Manifest
from vmoco.data.shard import Clip
from vmoco.evaluate.embed import run_items
from vmoco.evaluate.embed_items import Items, shard_items
from vmoco.evaluate.embed_task import Work
from vmoco.evaluate.features import window
from vmoco.evaluate.table import FeatureTable, part_uri
from vmoco.job_settings import EmbedSettings
from vmoco.seed import hash64

T, H, W = 16, 128, 171


def data_set(folder: Path, num_clips: int) -> Manifest:
    """Clips of noise: their content does not change the cost; reading them does."""
    random = np.random.default_rng(0)
    clips = []
    for number in range(num_clips):
        frames = random.integers(0, 256, (T, H, W, 3), dtype=np.uint8)
        clips.append(Clip(f"{hash64('clip', number):016x}", f"video-{number:05d}", 0.0, 25.0, False, frames))
    return write_data_set(folder, clips)


def bare_rate(backbone: str, batch: int, seconds: float, core: int) -> float:
    """Clips per second of the forward alone, on one core."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    encoder = encoder_of(backbone, num_frames=T, size=112)
    clips = torch.randn(batch, 3, T, 112, 112)
    with torch.inference_mode():
        encoder.backbone(clips)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            encoder.backbone(clips)
            count += batch
        return count / (time.perf_counter() - started)


def bare(backbone: str, batch: int, seconds: float) -> float:
    """The sum of `bare_rate` over all cores, measured at the same time."""
    cores = sorted(os.sched_getaffinity(0))
    with ProcessPoolExecutor(len(cores), mp_context=get_context("spawn")) as pool:
        rates = [pool.submit(bare_rate, backbone, batch, seconds, core) for core in cores]
        return sum(rate.result() for rate in rates)


def embed_rate(folder: Path, manifest: Manifest, backbone: str, batch: int, clips_per_part: int) -> float:
    """Clips per second from the time when a quarter of the parts are done to the start of the last round."""
    encoder = encoder_of(backbone, num_frames=T, size=112)
    items = []
    for item in shard_items(manifest, manifest.table):  # small parts: many are needed to measure the rate
        plan = json.loads(item["plan"])
        for first in range(0, len(plan["rows"]), clips_per_part):
            part = {**plan, "rows": plan["rows"][first : first + clips_per_part]}
            items.append({"part": f"{item['part']}-{first}", "plan": json.dumps(part)})
    work = Work(output=str(folder), window=window(encoder, manifest), batch_size=batch)
    pool = EmbedSettings(videos="-", output="-", batch_size=batch)
    run_items(Items(len(items), [items]), encoder, work, pool, show=lambda _: None)
    assert len(FeatureTable(str(folder))) == manifest.table.num_rows
    stamps = sorted(os.stat(part_uri(str(folder), item["part"])).st_mtime for item in items)
    first, last = len(stamps) // 4, len(stamps) - 1 - len(os.sched_getaffinity(0))
    return (last - first) * clips_per_part / (stamps[last] - stamps[first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="r2plus1d_18")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--clips", type=int, default=192)
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of each measurement of the bare forward")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = data_set(Path(folder, "data"), wanted.clips)
        before = bare(wanted.backbone, wanted.batch, wanted.seconds)
        job.connect(worker_output=False)
        embedded = embed_rate(Path(folder, "table"), manifest, wanted.backbone, wanted.batch, 2 * wanted.batch)
        after = bare(wanted.backbone, wanted.batch, wanted.seconds)
    forward = (before + after) / 2
    report = {
        "ratio": round(embedded / forward, 3),
        "embed_clips_per_second": round(embedded, 2),
        "forward_clips_per_second": [round(before, 2), round(after, 2)],
        "backbone": wanted.backbone,
        "batch": wanted.batch,
        "clips": wanted.clips,
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
