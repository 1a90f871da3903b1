"""Sends thousands of broken videos through ingest, and checks what becomes of each.

    python -m tests.benchmarks.fuzz_ingest --files 2000

Each file must be in the manifest or in the ledger. A plain sequential decoder, in separate processes, decodes each file
and judges ingest:

- A file that ingest accepts as whole is whole for the plain decoder too, with the same frames. (Frames that the decoder
  does not write completely are not compared: they hold a rest of what was in the memory before.)
- A file that ingest rejects is broken for the plain decoder too, or the reason is one that a decoder does not check:
  the length in the header, too few frames, time stamps, the same content twice, no file.
- No clip of a damaged file holds a frame that the plain decoder reports as damaged, or one that refers to such a frame.

Some damage is reported by no decoder. To measure it, each clip is compared with the undamaged original; the report
gives, for each kind of file, the number of clips and how many of them differ.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
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

# Reasons that a decoder does not check.
BESIDE_DECODING = {"truncated", "too-few-frames", "bad-timestamps", "duplicate", "empty", "frame-too-large"}
BESIDE_DECODING |= {"not-a-file", "dangling-link", "no-video-stream", "too-much-memory"}


def run(folder: Path, files: int) -> dict[str, object]:
    """Makes the files, ingests them on the running Ray cluster, and compares; returns the report that main prints."""
    seeds = fuzz.make_seeds(folder / "seeds")
    seed_of = fuzz.write_mutants(folder / "in/mutants", seeds, files)
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
        "reasons": ledger.totals(row.reason for row in rejected.values()),
        "seconds": round(seconds, 1),
    }
    wrong = list(check(manifest.uri, progress=lambda line: None))
    for name, reason in expected.items():
        found = rejected[name].reason if name in rejected else ""
        if found != reason and reason != "*":
            wrong.append(f"{name!r} is {found or 'accepted'}, and should be {reason or 'accepted'}")
    damaged = {loss.video_id for loss in ledger.read_losses(manifest.uri)}
    originals = {f"mutants/{name}": seed for name, seed in seed_of.items()}
    wrong += _compare(folder, manifest, damaged, rejected, names, kept := _Kept(originals))
    report |= {"damaged": len(damaged), "differing": kept.totals()}
    for line in wrong[:50]:
        print("wrong:", line)
    return report | {"wrong": len(wrong)}


class _Kept:
    """Compares the clips of damaged videos with the undamaged ones."""

    def __init__(self, originals: dict[str, Path]) -> None:
        self._originals = originals
        self._frames = {path: fuzz.decode_plainly(path).frames for path in set(originals.values())}
        self._clips: Counter[str] = Counter()
        self._differing: Counter[str] = Counter()

    def add(self, video: str, clips: list[npt.NDArray[np.uint8]]) -> None:
        if video not in self._originals:
            return
        seed = self._originals[video]
        frames = self._frames[seed]
        assert frames is not None, seed
        self._clips[seed.name] += len(clips)
        self._differing[seed.name] += sum(not fuzz.is_original(clip, frames) for clip in clips)

    def totals(self) -> dict[str, str]:
        """`2 of 90 clips` for each kind of file."""
        return {name: f"{self._differing[name]} of {self._clips[name]} clips" for name in sorted(self._clips)}


def _compare(
    folder: Path,
    manifest: Manifest,
    damaged: set[str],
    rejected: dict[str, ledger.Rejection],
    names: set[str],
    kept: _Kept,
) -> list[str]:
    wrong = []
    clips_of: dict[str, list[int]] = {}
    for clip, video in enumerate(manifest.table["video_id"].to_pylist()):
        clips_of.setdefault(video, []).append(clip)
    starting = manifest.table["start_seconds"].to_pylist()
    notes, rates = manifest.table["notes"].to_pylist(), manifest.table["fps"].to_pylist()
    reader = ClipReader.of(manifest)
    decodable = sorted(name for name in names if (folder / "in" / name).is_file())
    for name, plain in plainly([folder / "in" / name for name in decodable]).items():
        video = str(name.relative_to(folder / "in"))
        if video in clips_of:
            own = [reader.frames(clip) for clip in clips_of[video]]
            kept.add(video, own)
            if video in damaged:
                held = [
                    at
                    for clip in clips_of[video]
                    for at in fuzz.held(plain.reported, float(starting[clip]), fps=rates[clip] * fuzz.STRIDE)
                ]
                wrong += [f"{video!r} has a clip with a frame that was reported, at {at:.2f} s" for at in held[:1]]
                continue
            if plain.frames is None:
                wrong.append(f"{video!r} is accepted as whole, and plainly it is not: {plain.why}")
                continue
            if not _are_clips_of(plain, own, joined="joined" in (notes[clips_of[video][0]] or "")):
                wrong.append(f"{video!r} has other frames than a plain decoder finds")
        elif plain.frames is not None and rejected[video].reason not in BESIDE_DECODING:
            wrong.append(f"{video!r} is rejected ({rejected[video].reason}: {rejected[video].message}), but decodes")
    return wrong


def _are_clips_of(plain: fuzz.Plain, own: list[npt.NDArray[np.uint8]], *, joined: bool) -> bool:
    """Whether the clips equal those that a plain decoder finds, in all frames that it writes completely."""
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
    """Decodes files plainly in other processes. A crash of the decoder counts as a result."""
    found: dict[Path, fuzz.Plain] = {}
    left = list(paths)
    while left:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            futures = [(path, pool.submit(fuzz.examine, path)) for path in left]
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
