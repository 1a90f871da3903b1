"""How many CPU seconds does a clip cost from a file to its pixels, beside other decoders?

    python -m tests.benchmarks.decode              dense and sparse, in some minutes
    python -m tests.benchmarks.decode --seconds 60 600

Each decoder has one thread and the same files (H.264 with B-frames), and gives clips of 16 frames that cover 128 x 171,
as uint8 RGB. `dense` keeps every frame of a minute. `sparse` keeps 32 clips, spread evenly over a minute, ten minutes
and an hour, with key frames every 1, 2 and 10 seconds. CPU seconds count, those of child processes too: the least of
several tries.

- ours: `video.cut_clips`, which first finds the time stamp of each frame, and checks what it decodes for damage.
- whole: the same without runs: every frame is decoded, as before there were runs.
- PyAV: decodes and scales each frame that it keeps. For sparse clips it seeks, and trusts that the rate is constant.
- FFmpeg: its command; for sparse clips one process for each.
- decord, torchcodec: their readers, at the size of the clips; torchcodec with the faster of its two ways to seek.

`dense_over_best_peer` is what the best other decoder spends on a clip of 640x360 over what ours spends,
`sparse_over_dense` what decoding every frame of the longest videos spends over what ours does, and
`sparse_over_best_peer` the same against the best other decoder. `probe_share` is the part of ours that finds the time
stamps: in ingest another task has done that.

On a core of a virtual machine, milliseconds a clip: an hour with key frames every second takes 20, of which 14 find the
time stamps (every frame of it decoded: 200), PyAV 4, torchcodec 6 or 9, decord 15, FFmpeg 79. Ten minutes with key
frames every 2 s take 8, PyAV 4, torchcodec 6, decord 11. Every frame of a minute of 640x360 takes 12, PyAV 11 with a
cheaper filter, decord 13, FFmpeg 18, torchcodec 23. So what is slower than the best is to look at each time stamp
before anything is decoded, which PyAV does not do, and the filter.

Decoders that are not installed are left out with a note. The files stay in `$VMOCO_HOME/cache/decode`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vmoco import storage
from vmoco.data import probing, video
from vmoco.data.clips import ClipPlan, start_indices

HEIGHT, WIDTH, FRAMES, FPS, CLIPS = 128, 171, 16, 25, 32
WIDE = 228
"""Width of a scaled frame of 16:9 before it is cropped to WIDTH."""
DENSE = {"640x360": (360, 640), "320x180": (180, 320)}
MINUTE = 60 * FPS


class Counted:
    """A sink that only counts."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, frames: Any) -> None:
        self.count += 1

    def restart(self) -> None:
        self.count = 0


def make(path: Path, *, seconds: int, key_seconds: float, height: int, width: int) -> Path:
    """A camera that moves over a textured scene: one minute is encoded, and repeated without encoding it again."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (height // 4 + 30, width // 4 + 60, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    key = str(int(key_seconds * FPS))
    options = {"g": key, "keyint_min": key, "bf": "2", "sc_threshold": "0", "crf": "30", "preset": "veryfast"}
    packets = []
    part = path.with_suffix(".part.mp4")
    with av.open(str(part), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options={**options, "x264-params": "open-gop=0"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in [*range(MINUTE), None]:
            frame = None
            if number is not None:
                turn = 2 * np.pi * number / MINUTE
                top, left = (int(40 + 40 * np.sin(turn * each)) for each in (9, 5))
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(scene[top : top + height, left : left + width]), format="rgb24"
                )
                frame.pts, frame.time_base = number, Fraction(1, FPS)
            packets += [(each, each.pts, each.dts) for each in stream.encode(frame)]
        for minute in range(seconds // 60):
            for packet, shown, coded in packets:
                again = av.Packet(bytes(packet))
                again.is_keyframe, again.time_base, again.stream = packet.is_keyframe, Fraction(1, FPS), stream
                again.pts, again.dts, again.duration = shown + minute * MINUTE, coded + minute * MINUTE, 1
                container.mux(again)
    part.rename(path)
    return path


def cache() -> Path:
    return Path(storage.home()) / "cache/decode"


def starts(seconds: int) -> list[int]:
    return start_indices(seconds * FPS, num_frames=FRAMES, stride=1, max_clips=CLIPS)


def ours(path: str, seconds: int, *, dense: bool, cut: Any = video.cut_clips) -> int:
    sink = Counted()
    plan = ClipPlan(FRAMES) if dense else ClipPlan(FRAMES, max_clips=CLIPS)
    cut(path, plan, height=HEIGHT, width=WIDTH, sink=sink)
    return sink.count


def whole(path: str, seconds: int, *, dense: bool) -> int:
    return ours(path, seconds, dense=dense, cut=video.cut_whole)


def probe(path: str, seconds: int, *, dense: bool) -> int:
    probing.probe(path)
    return 1


def pyav(path: str, seconds: int, *, dense: bool) -> int:
    reformatter = av.video.reformatter.VideoReformatter()
    clips: list[Any] = []
    with av.open(path) as container:
        stream: Any = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        step = int(1 / (FPS * stream.time_base))
        for start in [0] if dense else starts(seconds):
            if not dense:
                container.seek(start * step, stream=stream)
            kept: list[Any] = []
            for frame in container.decode(stream):
                if frame.pts < start * step:
                    continue
                scaled = reformatter.reformat(frame, width=WIDE, height=HEIGHT, format="rgb24", threads=1)
                kept.append(scaled.to_ndarray()[:, (WIDE - WIDTH) // 2 :][:, :WIDTH])
                if len(kept) == FRAMES:
                    clips.append(np.stack(kept).shape)
                    kept.clear()
                    if not dense:
                        break
    return len(clips)


def ffmpeg(path: str, seconds: int, *, dense: bool) -> int:
    size = FRAMES * HEIGHT * WIDTH * 3
    found = 0
    for start in [None] if dense else starts(seconds):
        at = [] if start is None else ["-ss", f"{start / FPS:.3f}"]
        end = [] if start is None else ["-frames:v", str(FRAMES)]
        made = ["-vf", f"scale={WIDE}:{HEIGHT},crop={WIDTH}:{HEIGHT}", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        command = [_ffmpeg(), "-v", "error", "-threads", "1", *at, "-i", path, *end, *made]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found += len(done.stdout) // size
    return found


def _ffmpeg() -> str:
    found = shutil.which("ffmpeg")
    if found is None:
        import imageio_ffmpeg

        found = str(imageio_ffmpeg.get_ffmpeg_exe())
    return found


def decord(path: str, seconds: int, *, dense: bool) -> int:
    import decord

    reader = decord.VideoReader(path, width=WIDE, height=HEIGHT, num_threads=1)
    firsts = range(0, len(reader) - FRAMES + 1, FRAMES) if dense else starts(seconds)
    return len([reader.get_batch(range(at, at + FRAMES)).asnumpy()[..., :WIDTH, :].copy() for at in firsts])


def torchcodec(path: str, seconds: int, *, dense: bool, seek_mode: str = "exact") -> int:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    reader = VideoDecoder(
        path, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode=seek_mode, transforms=[Resize((HEIGHT, WIDE))]
    )
    firsts = range(0, seconds * FPS - FRAMES + 1, FRAMES) if dense else starts(seconds)
    return len([reader.get_frames_in_range(at, at + FRAMES).data[:, :, :WIDTH].clone() for at in firsts])


def torchcodec_approximate(path: str, seconds: int, *, dense: bool) -> int:
    return torchcodec(path, seconds, dense=dense, seek_mode="approximate")


PEERS: tuple[Callable[..., int], ...] = (pyav, ffmpeg, decord, torchcodec, torchcodec_approximate)


def cpu_seconds(run: Callable[..., int], path: str, seconds: int, *, dense: bool, tries: int) -> float:
    """CPU seconds for each clip: the least of some tries."""
    spent = []
    for _ in range(tries):
        before = os.times()
        clips = run(path, seconds, dense=dense)
        after = os.times()
        spent.append(sum(after[:4]) - sum(before[:4]))
    expected = 1 if run is probe else seconds * FPS // FRAMES if dense else CLIPS
    assert clips == expected, (run.__name__, clips, expected)
    return min(spent) / (CLIPS if run is probe else clips)


def installed() -> list[Callable[..., int]]:
    """The peers that work here; a note for each other one."""
    found = []
    path = make(cache() / "short.mp4", seconds=60, key_seconds=1, height=90, width=160)
    for peer in PEERS:
        try:
            peer(str(path), 60, dense=False)
            found.append(peer)
        except Exception as error:
            print(f"{peer.__name__} is left out: {' '.join(str(error).split())[:120] or type(error).__name__}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, nargs="+", default=[60, 600, 3600], help="lengths of the sparse videos")
    parser.add_argument("--keys", type=float, nargs="+", default=[1, 2, 10], help="seconds between key frames")
    parser.add_argument("--tries", type=int, default=2, help="times that each figure is measured; the least counts")
    chosen = parser.parse_args()
    folder, peers = cache(), installed()
    figures: dict[str, dict[str, float]] = {}

    def measure(name: str, path: Path, seconds: int, *, dense: bool) -> dict[str, float]:
        found = {}
        for run in (ours, whole, probe, *peers):
            slow = run is whole and not dense
            found[run.__name__] = cpu_seconds(run, str(path), seconds, dense=dense, tries=1 if slow else chosen.tries)
        said = ", ".join(f"{peer} {1e3 * each:.2f}" for peer, each in found.items())
        print(f"{name}: ms a clip: {said}", flush=True)
        figures[name] = {peer: round(each, 6) for peer, each in found.items()}
        return found

    def best(found: dict[str, float]) -> float:
        return min(found[peer.__name__] for peer in peers)

    result: dict[str, Any] = {}
    for name, (height, width) in DENSE.items():
        path = make(folder / f"dense-{name}.mp4", seconds=60, key_seconds=2, height=height, width=width)
        found = measure(f"dense {name}", path, 60, dense=True)
        if name == "640x360" or "dense_over_best_peer" not in result:
            result["dense_over_best_peer"] = round(best(found) / found["ours"], 3)
    longest = max(chosen.seconds)
    for seconds in chosen.seconds:
        for key in chosen.keys:
            path = folder / f"sparse-{seconds}-{key:g}.mp4"
            make(path, seconds=seconds, key_seconds=key, height=108, width=192)
            found = measure(f"sparse {seconds} s, key frames every {key:g} s", path, seconds, dense=False)
            if seconds == longest:
                gains = {"sparse_over_dense": found["whole"] / found["ours"]}
                gains |= {"sparse_over_best_peer": best(found) / found["ours"]}
                gains |= {"without_probe_over_best_peer": best(found) / (found["ours"] - found["probe"])}
                for gain, value in gains.items():
                    result[gain] = round(min(value, result.get(gain, value)), 3)
                result["probe_share"] = round(max(found["probe"] / found["ours"], result.get("probe_share", 0)), 3)
    print(json.dumps({**result, "cpu_seconds": figures}))


if __name__ == "__main__":
    main()
