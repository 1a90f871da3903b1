"""What does a data set of 100 million clips cost a rank? `python -m tests.benchmarks.scale [--clips 1e6 1e7 1e8]`.

Four measurements, of synthetic videos and clips without pixels, ten clips of each video:

- `index`, of each size: an index is written as `ClipIndex` keeps it; then ranks open it at the same time, each in a
  process of its own, and draw global batches of 4,096 clips. Seconds to start (open, plan, first batch; the page cache
  is warm), milliseconds for a batch, and how much the memory of a rank grows: its private part, and the part that
  ranks share. `random_read_ms` reads of each clip of a batch where its bytes lie and their hash.
- `manifest`, of `--manifest-clips`: a manifest is written, a node makes its index from it, and a process reads all its
  rows, as each rank did before there was an index. Seconds, and peak memory.
- `driver`, of `--videos`: what the driver of ingest does with each video before the first shard is cut: it keeps the
  listing, compares it, takes what probing found, looks for duplicates and plans the shards. Seconds, and peak memory.
- `open`, of `--shards`: a rank opens a manifest that lists so many shards. 400,000 of the default size hold the raw
  clips of 100 million. Seconds, peak memory, and what the rank keeps.

Ends with one JSON line: the largest size at the top, all sizes below `index`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vmoco.clip_settings import DataSettings
from vmoco.data import clip_index
from vmoco.data.catalog import Catalog
from vmoco.data.clip_index import CLIP, SHARD, VIDEO, ClipIndex
from vmoco.data.clip_rows import ClipRows
from vmoco.data.found import Found
from vmoco.data.gathered import gather
from vmoco.data.ingest_plan import Probed, plan_shards
from vmoco.data.manifest import FIELDS, Manifest
from vmoco.data.manifest_writer import write_manifest
from vmoco.data.plan import Plan, Stream
from vmoco.data.shard import ShardFile
from vmoco.job_settings import IngestSettings
from vmoco.seed import hash64

RANKS, BATCH, CLIPS_PER_VIDEO, CLIPS_PER_SHARD = 8, 4096, 10, 256
_BLOCK = 10**6
_ROWS = 10**4


def write_index(place: Path, num_clips: int) -> None:
    """Writes an index of clips that do not exist."""
    place.mkdir()
    random = np.random.default_rng(0)
    with open(place / "clips", "wb") as file:
        for first in range(0, num_clips, _BLOCK):
            number = np.arange(first, min(first + _BLOCK, num_clips))
            rows = np.empty(len(number), CLIP)
            rows["clip_id"] = random.integers(2**64, size=len(number), dtype=np.uint64)
            rows["sha256"] = np.frombuffer(random.bytes(32 * len(number)), "V32")
            rows["offset"], rows["num_bytes"] = number % CLIPS_PER_SHARD * 2**20, 2**20
            rows["shard"] = number // CLIPS_PER_SHARD
            rows["place_in_shot"], rows["num_of_shot"] = number % CLIPS_PER_VIDEO, CLIPS_PER_VIDEO
            file.write(rows.tobytes())
    videos = np.empty(num_clips // CLIPS_PER_VIDEO + 1, VIDEO)
    videos["first_clip"] = np.arange(len(videos)) * CLIPS_PER_VIDEO
    videos["name"] = random.integers(2**63, size=len(videos))
    videos.tofile(place / "videos")
    np.array([f"{number:016x}".encode() for number in range(num_clips // CLIPS_PER_SHARD + 1)], SHARD).tofile(
        place / "shards"
    )
    sizes = {name: (place / name).stat().st_size for name in ("clips", "videos", "shards")}
    (place / "about.json").write_text(json.dumps(sizes | {"without_shots": 0}))


def memory() -> dict[str, float]:
    """MiB of this process: its own, and pages of files, which all processes share."""
    fields: dict[str, float] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) / 1024
    return {"private": fields["Anonymous"], "shared": fields["Rss"] - fields["Anonymous"]}


def rank(place: str, start: Any, answers: Any, steps: int) -> None:
    """One rank: opens the index and draws batches."""
    start.wait()
    before, began = memory(), time.perf_counter()
    index = clip_index._open(Path(place))
    assert index is not None
    plan = Plan([Stream(index, seed=1, draws_per_video=1)], seed=1, global_batch=BATCH, micro_batch=32)
    plan.batch(0)
    started = time.perf_counter() - began
    drawn, read = [], []
    for step in range(1, steps):
        began = time.perf_counter()
        draws = plan.batch(step)
        plan.key_order(step)
        drawn.append(time.perf_counter() - began)
        own = draws[plan.share(step % RANKS, RANKS)].clip.tolist()
        began = time.perf_counter()
        for clip in own:
            index.extent(clip), index.sha256(clip), index.shard_name(index.shard(clip))
        read.append(time.perf_counter() - began)
    grown = {name: value - before[name] for name, value in memory().items()}
    answers.put((started, float(np.median(drawn)), float(np.median(read)), grown["private"], grown["shared"]))


def measure_index(folder: Path, num_clips: int, *, ranks: int, steps: int) -> dict[str, float]:
    """Ranks at the same time on an index of this size; the worst rank of each figure."""
    place = folder / f"index-{num_clips}"
    write_index(place, num_clips)
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(ranks), context.Queue()
    processes = [context.Process(target=rank, args=(str(place), start, answers, steps)) for _ in range(ranks)]
    for process in processes:
        process.start()
    found = np.array([answers.get() for _ in processes]).max(axis=0).tolist()
    for process in processes:
        process.join()
    size = sum(path.stat().st_size for path in place.iterdir())
    for path in place.iterdir():
        path.unlink()
    return {
        "clips": num_clips,
        "start_s": round(found[0], 3),
        "batch_ms": round(found[1] * 1e3, 3),
        "random_read_ms": round(found[2] * 1e3, 3),
        "private_mib": round(found[3], 1),
        "shared_mib": round(found[4], 1),
        "bytes_a_clip": round(size / num_clips, 1),
    }


def rows_of(first: int, num_clips: int) -> pa.Table:
    """Rows of a manifest of clips that do not exist, from one of them on."""
    random, number = np.random.default_rng(first), np.arange(first, first + num_clips)
    texts = {
        "clip_id": [f"{value:016x}" for value in random.integers(2**63, size=num_clips).tolist()],
        "video_id": [f"videos/{value // CLIPS_PER_VIDEO:012d}.mp4" for value in number.tolist()],
        "sha256": [random.bytes(32).hex() for _ in range(num_clips)],
        "shard": [f"{value // CLIPS_PER_SHARD:016x}" for value in number.tolist()],
        "entry": [f"{value // CLIPS_PER_VIDEO:016x}" for value in number.tolist()],
        "video_sha256": [f"{value // CLIPS_PER_VIDEO:064x}" for value in number.tolist()],
    }
    numbers = {
        "start_seconds": number % CLIPS_PER_VIDEO * 2.0,
        "offset": number % CLIPS_PER_SHARD * 2**20,
        "num_bytes": np.full(num_clips, 2**20),
        "row": number % CLIPS_PER_SHARD,
        "shot": number % CLIPS_PER_VIDEO // 4,
    }
    columns = []
    for field in FIELDS:
        if field.name in texts:
            columns.append(pa.array(texts[field.name], field.type))
        elif field.name in numbers:
            columns.append(pa.array(numbers[field.name]).cast(field.type))
        elif field.nullable:
            columns.append(pa.nulls(num_clips, field.type))
        else:
            columns.append(pa.array([0 if pa.types.is_integer(field.type) else False] * num_clips).cast(field.type))
    return pa.Table.from_arrays(columns, schema=pa.schema(FIELDS))


def write(uri: str, num_clips: int) -> None:
    """Writes a manifest, as the driver of ingest does at its end."""
    (Path(uri) / "shards").mkdir(parents=True)
    names = [f"{number:016x}" for number in range((num_clips - 1) // CLIPS_PER_SHARD + 1)]
    for name in names:
        (Path(uri) / "shards" / f"{name}.arrow").touch()
    files = {name: ShardFile(0, "0" * 64, by_clips=True) for name in names}
    rows = ClipRows()
    for first in range(0, num_clips, _ROWS):
        rows.add(rows_of(first, min(_ROWS, num_clips - first)))
    write_manifest(uri, rows, settings={}, frame_shape=(16, 128, 171, 3), encoding="raw", shards=files, num_rejected=0)


def drive(uri: str, num_videos: int) -> None:
    """Lists and plans videos that do not exist."""
    settings = IngestSettings(videos="/in", output=uri)
    listed = gather(Found(f"class {n % 1000:04d}/{n:010d}.mp4", 10**6 + n) for n in range(num_videos))
    catalog = Catalog(settings, None)
    catalog.take_listing(listed, [])
    for found in catalog.new_videos():
        catalog.add_probed(Probed(found, f"{hash64(found.video_id):064x}", CLIPS_PER_VIDEO, (), 10.0))
    catalog.reject_duplicates()
    planned = sum(len(plan.units) for plan in plan_shards(catalog.good(), settings))
    assert planned == catalog.num_good == num_videos


def list_shards(uri: str, num_shards: int) -> None:
    """Writes a manifest of many shards, which are not there."""
    files = {f"{n:016x}": ShardFile(2**28 + n, f"{n:064x}", by_clips=True) for n in range(num_shards)}
    about: dict[str, Any] = {"settings": {}, "frame_shape": (16, 128, 171, 3), "encoding": "raw"}
    write_manifest(uri, rows_of(0, 1000), shards=files, num_rejected=0, **about)


def open_data_set(uri: str, num_shards: int) -> Manifest:
    """Opens it, as a rank does."""
    manifest = Manifest.load(uri, check_shards=False)
    assert len(manifest.shards) == num_shards
    return manifest


def make(uri: str, num_clips: int) -> None:
    """Makes the index of a manifest."""
    assert ClipIndex.of(Manifest.load(uri), DataSettings()).num_clips == num_clips


def read(uri: str, num_clips: int) -> None:
    """Holds what a rank held before there was an index: the rows, and the names of the clips."""
    table = Manifest.load(uri).table
    assert len(table["clip_id"].to_pylist()) == num_clips


def alone(action: Callable[[str, int], object], uri: str, num_clips: int) -> dict[str, float]:
    """Seconds of an action in a process of its own, growth of the peak memory, and of that which its result keeps."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_alone, args=(action, uri, num_clips, answers))
    process.start()
    seconds, mib, kept = answers.get()
    process.join()
    return {"seconds": round(seconds, 2), "mib": round(mib, 1), "kept_mib": round(kept, 1)}


def _alone(action: Callable[[str, int], object], uri: str, num_clips: int, answers: Any) -> None:
    held, before, began = memory()["private"], _peak_mib(), time.perf_counter()
    result = action(uri, num_clips)
    seconds = time.perf_counter() - began
    answers.put((seconds, _peak_mib() - before, memory()["private"] - held))
    del result


def _peak_mib() -> float:
    """Since the program of this process began; `getrusage` counts what its parent had, too."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    parser.add_argument("--manifest-clips", type=float, default=1e6)
    parser.add_argument("--videos", type=float, default=1e6)
    parser.add_argument("--shards", type=float, default=4e5)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    found: dict[str, Any] = {"ranks": options.ranks, "index": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["VMOCO_HOME"] = str(folder / "home")
        for size in options.clips:
            found["index"].append(measure_index(folder, int(size), ranks=options.ranks, steps=options.steps))
            print(found["index"][-1], flush=True)
        uri, num_clips = str(folder / "data"), int(options.manifest_clips)
        found["videos"] = int(options.videos)
        found["driver"] = alone(drive, uri, found["videos"])
        print("driver", found["driver"], flush=True)
        found["shards"], many = int(options.shards), str(folder / "many")
        list_shards(many, found["shards"])
        found["open"] = alone(open_data_set, many, found["shards"])
        print("open", found["open"], flush=True)
        found["manifest_clips"] = num_clips
        for what, action in (("write_manifest", write), ("make_index", make), ("rows_in_memory", read)):
            found[what] = alone(action, uri, num_clips)
            print(what, found[what], flush=True)
    largest = max(found["index"], key=lambda each: each["clips"])
    print(json.dumps(largest | {"finalise_mib": found["write_manifest"]["mib"]} | found))


if __name__ == "__main__":
    main()
