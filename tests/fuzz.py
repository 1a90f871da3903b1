"""Makes thousands of broken videos, and decodes them plainly, to know what ingest should do with each."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from tests.data import videos
from vmoco.data.opening import FORMATS
from vmoco.data.pixels import MAX_PIXELS, Scaler

SIZE, NUM_FRAMES, STRIDE = (24, 32), 8, 2
MAX_CLIPS = 4
FRAMES, KEY_FRAMES = 72, "12"
"""Frames of an undamaged video, and frames from one of its key frames to the next."""

_SEEDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": {"bf": "2"}},
    "h264-fast-start.mp4": {"container_options": {"movflags": "faststart"}},
    "h264.mkv": {},
    "h264.ts": {},
    "h264.flv": {},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:pools=1:frame-threads=1"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "vp8.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "h264-10-bit.mp4": {"pix_fmt": "yuv420p10le"},
    "h264-444.mov": {"pix_fmt": "yuv444p", "rotation": 90},
    "ffv1.mkv": {"codec": "ffv1", "pix_fmt": "yuv420p"},
}
MUTATIONS = ("truncate", "flip", "splice", "header", "noise", "lose")


def make_seeds(folder: Path) -> list[Path]:
    """Writes undamaged videos of several codecs in several containers."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(-20, 20, (48, 64, 3)) for _ in range(FRAMES)]
    images = videos.images(FRAMES, height=48, width=64)
    noisy = [(image + each).clip(0, 255).astype(np.uint8) for image, each in zip(images, noise, strict=True)]
    seeds = []
    for name, given in _SEEDS.items():
        options = {"g": KEY_FRAMES, **given.get("options", {})}
        if given.get("codec", "libx264") == "libx264":
            options.setdefault("x264-params", "mbtree=0")  # with it, the same pictures give other bytes each time
        if given.get("codec") == "libx265":
            options["x265-params"] += f":keyint={KEY_FRAMES}:min-keyint={KEY_FRAMES}"
        # Without random numbers in Matroska: the same files in every run.
        container = {**given.get("container_options", {}), "fflags": "bitexact"}
        made = {**given, "options": options, "container_options": container}
        seeds.append(videos.write_video(folder / name, noisy, **made))
    return seeds


def mutate(content: bytes, other: bytes, mutation: str, rng: np.random.Generator) -> bytes:
    """Returns a copy of a file with one kind of damage; `rng` decides where."""
    damaged = bytearray(content)
    size = len(damaged)
    if mutation == "truncate":
        return content[: int(rng.integers(0, size))]
    if mutation == "flip":
        for place in rng.integers(0, size, int(rng.integers(1, 20))):
            damaged[place] ^= 1 << int(rng.integers(0, 8))
    elif mutation == "splice":
        at, length, source = (int(rng.integers(0, size)) for _ in range(3))
        length = min(length, 4096)
        damaged[at : at + length * int(rng.integers(0, 2))] = other[source : source + length]
    elif mutation == "noise":  # a bad spot of the disk
        at, length = int(rng.integers(0, size)), int(rng.integers(1, 300))
        damaged[at : at + length] = rng.bytes(len(damaged[at : at + length]))
    elif mutation == "lose":  # a piece that was lost on the way
        at = int(rng.integers(size // 10, size))
        del damaged[at : at + int(rng.integers(1, 600))]
    else:  # sizes, counts, rates and offsets are near both ends of a file
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, min(size, 1024)))
            at = at if rng.random() < 0.5 else max(0, size - 4 - at)
            damaged[at : at + 4] = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**16])).to_bytes(4, "big")
    return bytes(damaged)


def write_mutants(folder: Path, seeds: list[Path], number: int) -> dict[str, Path]:
    """Writes `number` damaged videos, with all seeds and mutations in turn; returns the seed of each by name."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [seed.read_bytes() for seed in seeds]
    made = {}
    for at in range(number):
        seed, mutation = at % len(seeds), MUTATIONS[at // len(seeds) % len(MUTATIONS)]
        rng = np.random.default_rng(at)
        other = contents[int(rng.integers(0, len(contents)))]
        damaged = mutate(contents[seed], other, mutation, rng)
        name = f"{at:05d}-{mutation}{seeds[seed].suffix}"
        (folder / name).write_bytes(damaged)
        made[name] = seeds[seed]
    return made


def write_hostile(folder: Path, seeds: list[Path]) -> dict[str, str]:
    """Writes what else a folder of videos may hold.

    Returns:
        The expected result of each file by name: "" where it gives clips, or the reason of its
        rejection ("*": any result).
    """
    folder.mkdir(parents=True, exist_ok=True)
    good, images = seeds[0].read_bytes(), videos.images(24)
    expected: dict[str, str] = {}

    def put(name: str, content: bytes, reason: str) -> None:
        (folder / name).write_bytes(content)
        expected[name] = reason

    def encode(name: str, reason: str, frames: list[videos.Image] = images, **options: Any) -> None:
        videos.write_video(folder / name, frames, **options)
        expected[name] = reason

    put("empty.mp4", b"", "empty")
    put("header.mp4", good[:20], "cannot-open")
    put("text.mp4", b"no video\n" * 99, "cannot-open")
    put("half.mp4", good[: len(good) // 2], "cannot-open")
    put("last.ts", seeds[3].read_bytes()[:-150], "*")
    videos.write_audio(folder / "audio.mp4")
    expected["audio.mp4"] = "no-video-stream"
    encode("one.mp4", "too-few-frames", images[:1])
    encode("few.mp4", "too-few-frames", images[:14])
    stamps = [number if number < 12 else 12 + 3 * (number - 12) for number in range(24)]
    encode("variable.mp4", "", pts=stamps, options={"bf": "0"})
    encode("turned.mp4", "", rotation=90)
    encode("10-bit.mkv", "", pix_fmt="yuv420p10le")
    encode("444.mp4", "", pix_fmt="yuv444p")
    encode("1x1.mkv", "", [image[:1, :1].copy() for image in images], codec="ffv1", pix_fmt="yuv444p")
    encode("17x3.mkv", "", [image[:3, :17].copy() for image in images], codec="ffv1", pix_fmt="yuv444p")
    encode("negative.mkv", "", pts=[number - 5 for number in range(24)])
    # Matroska's segment length in time: it promises an hour. Huge: the size in the header of AVI's one stream.
    promising = bytearray((folder / "10-bit.mkv").read_bytes())
    at = promising.index(b"\x44\x89\x88") + 3
    promising[at : at + 8] = np.array(3.6e6, ">f8").tobytes()
    put("promises.mkv", bytes(promising), "")
    encode("huge.avi", "", images, codec="ffv1")
    huge = bytearray((folder / "huge.avi").read_bytes())
    at = huge.index((96).to_bytes(4, "little") + (72).to_bytes(4, "little"), huge.index(b"strf"))
    huge[at : at + 8] = (16384).to_bytes(4, "little") * 2
    put("huge.avi", bytes(huge), "decode-error")
    noise = bytearray((folder / "444.mp4").read_bytes())
    noise[len(noise) // 3 : len(noise) // 3 + 300] = np.random.default_rng(0).bytes(300)
    put("corrupted.mp4", bytes(noise), "decode-error")
    for name in (" a b.mp4", "quote's \".mp4", "new\nline.mp4", "🎞.mp4", "é" * 125 + "e.mp4"):
        put(name, good + bytes([0, 0, 0, 8 + len(expected), *b"free", *bytes(len(expected))]), "")
    shutil.copy(folder / "444.mp4", folder / "zzz-same.mp4")
    expected["zzz-same.mp4"] = "duplicate"
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.mp4").symlink_to(folder / "nothing")
    expected["dangling.mp4"] = "dangling-link"
    os.mkfifo(folder / "pipe.mp4")
    expected["pipe.mp4"] = "not-a-file"
    return expected


@dataclasses.dataclass(frozen=True)
class Plain:
    """What a plain sequential decoder finds in a file."""

    frames: npt.NDArray[np.uint8] | None
    """uint8 (F, H, W, 3): all frames, scaled as ingest scales them. None where anything is wrong with the file."""
    why: str
    reported: list[float] = dataclasses.field(default_factory=list)
    """Result of `reported_seconds`, where anything is wrong."""
    written: npt.NDArray[np.bool_] | None = None
    """bool (F,): frames that the decoder writes completely. Others hold a rest of what was in the memory before:
    they are damaged, and no decoder reports it."""


def examine(path: Path) -> Plain:
    """Decodes a file plainly: gives all its frames, or the times of the damaged ones."""
    plain = decode_plainly(path)
    return plain if plain.frames is not None else dataclasses.replace(plain, reported=reported_seconds(path))


def decode_plainly(path: Path) -> Plain:
    """Decodes all frames from the first to the last. The first error ends it."""
    found, again = (_decode_plainly(path, keep=keep) for keep in (False, True))
    if found.frames is None or again.frames is None or len(found.frames) != len(again.frames):
        return found
    return dataclasses.replace(found, written=(found.frames == again.frames).all(axis=(1, 2, 3)))


def _decode_plainly(path: Path, *, keep: bool) -> Plain:
    """Decodes once. With `keep`, decoded frames stay in memory, so the decoder gets other memory for each new frame."""
    frames: list[videos.Image] = []
    kept = []
    scaler = Scaler(height=SIZE[0], width=SIZE[1])
    try:
        # The formats that ingest takes. With others, FFmpeg would open the rest of a broken file as another format.
        formats = {"format_whitelist": FORMATS}
        with (
            _log() as log,
            av.open(str(path), options=formats, metadata_errors="replace") as container,
        ):
            log.clear()
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
            scaler.pixel_aspect = stream.sample_aspect_ratio
            for packet in container.demux(stream):
                if packet.is_corrupt and packet.size:
                    return Plain(None, "a packet is corrupt")
                decoded: list[Any] = list(packet.decode())
                if _reports(log):
                    return Plain(None, f"the log says {log}")
                for frame in decoded:
                    if frame.is_corrupt:
                        return Plain(None, "a frame is corrupt")
                    frames.append(scaler.scale(frame).copy())
                    if keep:
                        kept.append(frame)
                log.clear()
    except Exception as error:  # whatever a decoder raises means that it cannot be decoded
        return Plain(None, f"{type(error).__name__}: {error}")
    return Plain(np.stack(frames) if frames else np.empty((0, *SIZE, 3), np.uint8), "")


def reported_seconds(path: Path) -> list[float]:
    """Times of the frames that a decoder reports as damaged, and of the frames up to the next key frame.

    Times at which the file has another frame too are left out, because they do not tell which one is meant.

    A second opinion on `vmoco.data.damage`: this decoder never restarts, and gives all frames that it
    conceals.
    """
    reported: set[int] = set()
    marked: list[tuple[int, float]] = []
    shown: list[tuple[float, bool]] = []
    try:
        with (
            _log() as log,
            av.open(str(path), options={"format_whitelist": FORMATS}, metadata_errors="replace") as container,
        ):
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            bad, key = False, 0.0
            log.clear()
            for packet in container.demux(stream):
                time = None if packet.pts is None else float(packet.pts * packet.time_base)
                if packet.is_keyframe and time is not None:
                    key = time
                before = bad = (bad or _reports(log)) and not packet.is_keyframe
                log.clear()
                try:
                    frames: list[Any] = list(packet.decode())
                except av.error.FFmpegError:
                    frames, bad = [], True
                bad = bad or packet.is_corrupt or _reports(log)
                log.clear()
                if time is not None and packet.size:
                    shown.append((time, packet.is_keyframe))
                    reported |= {len(shown) - 1} if bad else set()
                    if (
                        time < key
                    ):  # shown before the key frame that precedes it in the file: no later frame refers to it
                        bad = before
                marked += [(len(shown), frame.time) for frame in frames if frame.is_corrupt and frame.time is not None]
    except Exception:  # the frames before the error count
        pass
    for given, time in marked:  # a decoder gives a frame some packets after the one that holds it
        owner = max((number for number, (at, _) in enumerate(shown[:given]) if at == time), default=0)
        until = min((at for at, key in shown[owner + 1 :] if key and at > time), default=float("inf"))
        reported |= {number for number, (at, _) in enumerate(shown) if number >= owner and time <= at < until}
    others = {at for number, (at, _) in enumerate(shown) if number not in reported}
    return sorted({shown[number][0] for number in reported} - others)


def held(reported: Iterable[float], start: float, *, fps: float) -> list[float]:
    """Those of the times that lie in the clip that begins at `start`; damage may have changed the rate of the file."""
    near = min(1e-3, 0.1 / fps)
    return [at for at in reported if -near <= at - start <= (NUM_FRAMES - 1) * STRIDE / max(fps, 25) + near]


@contextlib.contextmanager
def _log() -> Iterator[list[Any]]:
    """Collects what FFmpeg logs."""
    av.logging.set_skip_repeated(False)
    av.logging.set_level(av.logging.INFO)
    try:
        with av.logging.Capture() as log:
            yield log
    finally:
        av.logging.set_level(None)


def _reports(log: list[Any]) -> bool:
    return any(level <= av.logging.ERROR or "conceal" in text or "corrupt" in text for level, _, text in log)


def is_original(clip: npt.NDArray[np.uint8], frames: npt.NDArray[np.uint8]) -> bool:
    """Whether a clip consists of frames, STRIDE apart, of the undamaged video: uint8 (F, H, W, 3)."""
    span = (NUM_FRAMES - 1) * STRIDE + 1
    return any(np.array_equal(clip, frames[start : start + span : STRIDE]) for start in range(len(frames) - span + 1))


def plain_clips(total: int, *, joined: bool) -> list[npt.NDArray[np.int64]]:
    """Numbers of the frames of each clip of a whole video: as many clips as fit, each in the middle of its share.

    Args:
        total: frames of the video.
        joined: the video consists of several recordings; gives all places where a clip may be.
    """
    span = (NUM_FRAMES - 1) * STRIDE + 1
    count = min(MAX_CLIPS, total // span)
    starts = [((2 * at + 1) * total - count * span) // (2 * count) for at in range(count)]
    return [np.arange(start, start + span, STRIDE) for start in (range(total - span + 1) if joined else starts)]
