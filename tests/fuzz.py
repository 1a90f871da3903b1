"""Broken videos by the thousand, and a plain decoder that says what ingest should make of each."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from tests.data import videos
from vmoco.data.pixels import MAX_PIXELS, Scaler
from vmoco.data.video import FORMATS

SIZE, NUM_FRAMES, STRIDE = (24, 32), 8, 2
MAX_CLIPS = 3

_SEEDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": {"bf": "2", "g": "12"}},
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
MUTATIONS = ("truncate", "flip", "splice", "header")


def make_seeds(folder: Path) -> list[Path]:
    """Whole videos of several codecs in several containers, 24 frames each."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(-20, 20, (48, 64, 3)) for _ in range(24)]
    images = videos.images(24, height=48, width=64)
    noisy = [(image + each).clip(0, 255).astype(np.uint8) for image, each in zip(images, noise, strict=True)]
    return [videos.write_video(folder / name, noisy, **options) for name, options in _SEEDS.items()]


def mutate(content: bytes, other: bytes, mutation: str, rng: np.random.Generator) -> bytes:
    """One damage, as drawn."""
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
    else:  # sizes, counts, rates and offsets stand near the two ends
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, min(size, 1024)))
            at = at if rng.random() < 0.5 else max(0, size - 4 - at)
            damaged[at : at + 4] = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**16])).to_bytes(4, "big")
    return bytes(damaged)


def write_mutants(folder: Path, seeds: list[Path], number: int) -> None:
    """`number` damaged videos, every seed and every mutation in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [seed.read_bytes() for seed in seeds]
    for at in range(number):
        seed, mutation = at % len(seeds), MUTATIONS[at // len(seeds) % len(MUTATIONS)]
        rng = np.random.default_rng(at)
        other = contents[int(rng.integers(0, len(contents)))]
        damaged = mutate(contents[seed], other, mutation, rng)
        (folder / f"{at:05d}-{mutation}{seeds[seed].suffix}").write_bytes(damaged)


def write_hostile(folder: Path, seeds: list[Path]) -> dict[str, str]:
    """What else a pile of videos may hold; returns what must become of each: "" where it gives clips, or its reason."""
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
    """uint8 (F, H, W, 3) of all frames, scaled as ingest does; None where anything is wrong with the file."""
    why: str
    written: npt.NDArray[np.bool_] | None = None
    """bool (F,): frames that a decoder fully writes. Of others, damaged without a report, some is left from before."""


def decode_plainly(path: Path) -> Plain:
    """From the first to the last frame, in one go, nothing left out; the first error ends it."""
    found, again = (_decode_plainly(path, keep=keep) for keep in (False, True))
    if found.frames is None or again.frames is None or len(found.frames) != len(again.frames):
        return found
    return dataclasses.replace(found, written=(found.frames == again.frames).all(axis=(1, 2, 3)))


def _decode_plainly(path: Path, *, keep: bool) -> Plain:
    """`keep` keeps all decoded frames, so the decoder gets other memory for each new one."""
    frames: list[videos.Image] = []
    kept = []
    scaler = Scaler(height=SIZE[0], width=SIZE[1])
    try:
        # The same formats, or FFmpeg takes what is left of one for another.
        formats = {"format_whitelist": FORMATS}
        with av.open(str(path), options=formats, metadata_errors="replace") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
            scaler.pixel_aspect = stream.sample_aspect_ratio
            for packet in container.demux(stream):
                if packet.is_corrupt and packet.size:
                    return Plain(None, "a packet is corrupt")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        return Plain(None, "a frame is corrupt")
                    frames.append(scaler.scale(frame).copy())
                    if keep:
                        kept.append(frame)
    except Exception as error:  # whatever a decoder raises means that it cannot be decoded
        return Plain(None, f"{type(error).__name__}: {error}")
    return Plain(np.stack(frames) if frames else np.empty((0, *SIZE, 3), np.uint8), "")


def plain_clips(total: int, *, joined: bool) -> list[npt.NDArray[np.int64]]:
    """Frames of the clips of a whole video: as many as fit side by side, each in the middle of its share.

    Args:
        total: frames of the video.
        joined: gives all places where a clip may be, for a video of several recordings.
    """
    span = (NUM_FRAMES - 1) * STRIDE + 1
    count = min(MAX_CLIPS, total // span)
    starts = [((2 * at + 1) * total - count * span) // (2 * count) for at in range(count)]
    return [np.arange(start, start + span, STRIDE) for start in (range(total - span + 1) if joined else starts)]
