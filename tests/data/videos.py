"""Small real videos for tests, encoded with PyAV: several codecs, sizes and containers, and broken ones.

Every frame carries its own number in a way that survives lossy coding (`number_of`), so a test can tell exactly which
frames were taken without decoding by the code under test.
"""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

BITS = 8


class Kept:
    """A sink that keeps the clips."""

    def __init__(self) -> None:
        self.clips: list[Image] = []

    def add(self, frames: Image) -> None:
        self.clips.append(frames.copy())

    def restart(self) -> None:
        self.clips.clear()


def numbered_image(number: int, *, height: int = 72, width: int = 96) -> Image:
    """A grey frame (H, W, 3) with `number` in binary: BITS upright bars, black or white, over its middle third."""
    image = np.full((height, width, 3), 128, np.uint8)
    edges = np.linspace(width / 6, width * 5 / 6, BITS + 1).astype(int)
    for bit in range(BITS):
        image[height // 4 : height * 3 // 4, edges[bit] : edges[bit + 1]] = 235 if number >> bit & 1 else 20
    return image


def number_of(image: Image) -> int:
    """The number drawn by `numbered_image` into a frame of the same aspect, whatever its size."""
    height, width = image.shape[:2]
    edges = np.linspace(width / 6, width * 5 / 6, BITS + 1)
    centres = ((edges[:-1] + edges[1:]) / 2).astype(int)
    return sum(1 << bit for bit, x in enumerate(centres) if image[height // 2 - 2 : height // 2 + 2, x].mean() > 128)


def images(count: int, *, height: int = 72, width: int = 96) -> list[Image]:
    """Frames 0 to count - 1."""
    return [numbered_image(number % 2**BITS, height=height, width=width) for number in range(count)]


def write_video(
    path: Path,
    frames: list[Image],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 25,
    rotation: int = 0,
    flips: tuple[bool, bool] = (False, False),
    sample_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: list[int] | None = None,
) -> Path:
    """Encodes the frames; the container follows from the suffix. `pts` counts in units of 1/fps.

    `rotation` and `flips` (left-right, top-bottom) make the display matrix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if sample_aspect is not None:
            stream.codec_context.sample_aspect_ratio = sample_aspect
        if rotation or any(flips):
            stream.set_display_rotation(rotation, hflip=flips[0], vflip=flips[1])
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = pts[number] if pts else number
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def filtered(path: Path, *filters: tuple[str, str], stream: int = 0) -> list[Image]:
    """The frames of a video through FFmpeg's own filters, each a name and its arguments: RGB (H, W, 3)."""
    graph = av.filter.Graph()
    frames: list[Image] = []
    with av.open(str(path)) as container:
        nodes = [graph.add_buffer(template=container.streams.video[stream])]
        nodes += [graph.add(name, arguments) for name, arguments in (*filters, ("format", "rgb24"))]
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        for frame in (*container.decode(video=stream), None):
            graph.push(frame)
            with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
                while True:
                    frames.append(graph.pull().to_ndarray())
    return frames


def write_audio(path: Path) -> Path:
    """A second of a tone without a picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        tone = (np.sin(np.arange(16000) * 0.1) * 0.2).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def truncate(path: Path, share: float) -> Path:
    """Cuts the file to a share of its length."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def corrupt(path: Path, *, start: float = 0.4, end: float = 0.6) -> Path:
    """Overwrites a stretch in the middle of the file with noise."""
    content = bytearray(path.read_bytes())
    low, high = int(len(content) * start), int(len(content) * end)
    content[low:high] = np.random.default_rng(0).bytes(high - low)
    path.write_bytes(bytes(content))
    return path
