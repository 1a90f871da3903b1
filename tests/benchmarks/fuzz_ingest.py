"""Thousands of broken videos through the real ingest, and what became of each of them.

    python -m tests.benchmarks.fuzz_ingest --files 2000

Every file must be in the manifest or in the ledger. A plain sequential decoder, in processes of its own, says which
files are whole and what their frames are: what ingest accepts must be whole for it too, with the same frames (where a
decoder writes them at all: with damage that it does not report, a part is left from whatever was in the memory); what
ingest rejects must be broken for it too, or be rejected for a reason that a decoder does not look at (a length that the
header promises, too few frames, time stamps, the same content twice, no file).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests import fuzz
from vmoco.data import ledger
from vmoco.data.check import check
from vmoco.data.ingest import ingest
from vmoco.data.manifest import Manifest
from vmoco.data.shard_reader import ClipReader
from vmoco.job import connect
from vmoco.job_settings import IngestSettings

# Reasons that do not come from decoding.
BESIDE_DECODING = {"truncated", "too-few-frames", "bad-timestamps", "duplicate", "empty", "frame-too-large"}
BESIDE_DECODING |= {"not-a-file", "dangling-link", "no-video-stream", "too-much-memory"}


def run(folder: Path, files: int) -> dict[str, object]:
    """Makes the files, ingests them on the Ray that is running, and compares; the report is what main prints."""
    seeds = fuzz.make_seeds(folder / "seeds")
    fuzz.write_mutants(folder / "in/mutants", seeds, files)
    expected = {f"hostile/{name}": reason for name, reason in fuzz.write_hostile(folder / "in/hostile", seeds).items()}
    began = time.monotonic()
    settings = IngestSettings(
        videos=str(folder / "in"),
        output=str(folder / "out"),
        num_frames=fuzz.NUM_FRAMES,
        stride=fuzz.STRIDE,
        height=fuzz.SIZE[0],
        width=fuzz.SIZE[1],
        max_clips_per_video=fuzz.MAX_CLIPS,
        max_rejected_percent=100,
        videos_per_shard=32,
        seconds_per_video=20.0,
    )
    manifest = ingest(settings, progress=print)
    seconds = time.monotonic() - began
    rejected = {row.video_id: row for row in ledger.read(manifest.uri)}
    accepted = set(manifest.table["video_id"].to_pylist())
    names = {f"mutants/{path.name}" for path in (folder / "in/mutants").iterdir()} | expected.keys()
    report: dict[str, object] = {
        "files": len(names),
        "accepted": len(accepted),
        "crashes": sum(row.reason in ("decoder-crash", "unexpected-error") for row in rejected.values()),
        "hangs": sum(row.reason == "timeout" for row in rejected.values()),
        "unaccounted": len(names - accepted - rejected.keys()) + len(accepted & rejected.keys()),
        "wrong": 0,
        "reasons": ledger.totals(rejected.values()),
        "seconds": round(seconds, 1),
    }
    wrong = list(check(manifest.uri, progress=lambda line: None))
    for name, reason in expected.items():
        found = rejected[name].reason if name in rejected else ""
        if found != reason and reason != "*":
            wrong.append(f"{name!r} is {found or 'accepted'}, and should be {reason or 'accepted'}")
    wrong += _compare(folder, manifest, accepted, rejected, names)
    for line in wrong[:50]:
        print("wrong:", line)
    return report | {"wrong": len(wrong)}


def _compare(
    folder: Path, manifest: Manifest, accepted: set[str], rejected: dict[str, ledger.Rejection], names: set[str]
) -> list[str]:
    wrong = []
    clips_of: dict[str, list[int]] = {}
    for clip, video in enumerate(manifest.table["video_id"].to_pylist()):
        clips_of.setdefault(video, []).append(clip)
    notes = manifest.table["notes"].to_pylist()
    reader = ClipReader.of(manifest)
    decodable = sorted(name for name in names if (folder / "in" / name).is_file())
    for name, plain in plainly([folder / "in" / name for name in decodable]).items():
        video = str(name.relative_to(folder / "in"))
        if video in accepted:
            if plain.frames is None:
                wrong.append(f"{video!r} is accepted, and plainly it is not: {plain.why}")
                continue
            own = [reader.frames(clip) for clip in clips_of[video]]
            if not _are_clips_of(plain, own, joined="joined" in (notes[clips_of[video][0]] or "")):
                wrong.append(f"{video!r} has other frames than a plain decoder finds")
        elif plain.frames is not None and rejected[video].reason not in BESIDE_DECODING:
            wrong.append(f"{video!r} is rejected ({rejected[video].reason}: {rejected[video].message}), but decodes")
    return wrong


def _are_clips_of(plain: fuzz.Plain, own: list[npt.NDArray[np.uint8]], *, joined: bool) -> bool:
    """Whether clips are those that a plain decoder finds, in all frames that it fully writes."""
    assert plain.frames is not None
    written = np.ones(len(plain.frames), bool) if plain.written is None else plain.written
    equal = [
        [
            all(
                not written[at] or np.array_equal(plain.frames[at], frame)
                for at, frame in zip(places, clip, strict=True)
            )
        ]
        for places in fuzz.plain_clips(len(plain.frames), joined=joined)
        for clip in own
    ]
    table = np.array(equal).reshape(-1, len(own))
    return bool(table.any(axis=0).all()) if joined else len(table) == len(own) and bool(table.diagonal().all())


def plainly(paths: list[Path]) -> dict[Path, fuzz.Plain]:
    """The plain decoder's opinion of files, in other processes: a crash of one is an opinion too."""
    found: dict[Path, fuzz.Plain] = {}
    left = list(paths)
    while left:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            futures = [(path, pool.submit(fuzz.decode_plainly, path)) for path in left]
            try:
                for path, future in futures:
                    found[path] = future.result()
            except BrokenProcessPool:
                found[path] = fuzz.Plain(None, "the decoder crashed")
        left = [path for path in left if path not in found]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=2000, help="mutated files, beside the hostile ones")
    files = parser.parse_args().files
    connect(worker_output=False)
    with tempfile.TemporaryDirectory(prefix="fuzz-ingest-") as folder:
        report = run(Path(folder), files)
    print(json.dumps(report))
    if report["unaccounted"] or report["wrong"] or report["crashes"] or report["hangs"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
