"""Real footage in pieces, and copies of each piece as people make them: encoded anew, made smaller, with a logo.

Pieces of one film share scene and camera. So a pair of them is the hardest pair that is no copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from tests.data.videos import Image, Kept, write_video
from vmoco.data.clips import ClipPlan
from vmoco.data.shard import Clip
from vmoco.data.video import cut_clips
from vmoco.seed import hash64

PIECE_FRAMES = 64


@dataclass(frozen=True)
class Copy:
    """How a copy is made."""

    scale: float
    """Of height and width; no copy is lower than 96 pixels."""
    crf: int
    """Of x264: 23 is its default, 35 looks bad."""
    codec: str = "libx264"
    lost_frames: int = 0
    """Frames that are missing at its end. Its clips are spread over what is left, so they begin at other frames."""


COPIES = (Copy(0.75, 23), Copy(0.5, 29), Copy(0.34, 35), Copy(0.75, 23, lost_frames=6))
ORIGINAL = Copy(1.0, 16)


def pieces(path: Path, *, most: int, height: int = 360) -> list[list[Image]]:
    """At most `most` pieces of PIECE_FRAMES consecutive frames, spread evenly over a film, at most `height` high."""
    with av.open(str(path)) as container:
        images = []
        for frame in container.decode(video=0):
            factor = min(1.0, height / frame.height)
            size = {"width": _even(frame.width * factor), "height": _even(frame.height * factor)}
            images.append(frame.to_ndarray(format="rgb24", **size))
    count = len(images) // PIECE_FRAMES
    chosen = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    return [images[at * PIECE_FRAMES : (at + 1) * PIECE_FRAMES] for at in chosen]


def write_copies(folder: Path, name: str, images: list[Image]) -> list[Path]:
    """The piece as `name-0.mp4`, and its copies as `name-1.mp4` and so on."""
    paths = []
    for number, copy in enumerate((ORIGINAL, *COPIES)):
        height, width = images[0].shape[:2]
        scale = min(1.0, max(copy.scale, 96 / height))
        size = (_even(height * scale), _even(width * scale))
        frames = [_scaled(image, size) for image in images[: len(images) - copy.lost_frames]]
        if number:
            frames = [with_logo(frame, corner=number) for frame in frames]
        path = folder / f"{name}-{number}.mp4"
        write_video(path, frames, codec=copy.codec, options={"crf": str(copy.crf), "preset": "veryfast"})
        paths.append(path)
    return paths


def copied_clips(folder: Path, films: list[Path], *, most: int) -> list[Clip]:
    """The clips of pieces of films, and of their copies, 16 frames of 128x171 each; videos are named as the files."""
    clips = []
    for film in films:
        for number, images in enumerate(pieces(film, most=most)):
            for path in write_copies(folder, f"{film.stem}-{number}", images):
                sink = Kept()
                cut = cut_clips(str(path), ClipPlan(16), height=128, width=171, sink=sink)
                for start, frames in zip(cut.start_seconds, sink.clips, strict=True):
                    name = f"{hash64(path.stem, round(start * 1000)):016x}"
                    clips.append(Clip(name, path.stem, start, cut.fps, False, frames))
    return clips


def with_logo(image: Image, *, corner: int = 0) -> Image:
    """The frame (H, W, 3) with a white and red mark in one of its corners, an eighth as high and a fifth as wide."""
    marked = image.copy()
    height, width = image.shape[0] // 8, image.shape[1] // 5
    # Inside the part that a centre crop to 4:3 keeps of a wide frame.
    side = max(0, (image.shape[1] - image.shape[0] * 4 // 3) // 2)
    top = image.shape[0] // 16 if corner % 2 else image.shape[0] * 15 // 16 - height
    left = side + image.shape[1] // 16 if corner // 2 % 2 else image.shape[1] * 15 // 16 - width - side
    marked[top : top + height, left : left + width] = 255
    marked[top + height // 4 : top + height // 2, left + width // 8 : left + width // 2] = (200, 20, 30)
    return marked


def _scaled(image: Image, size: tuple[int, int]) -> Image:
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    scaled: Image = frame.reformat(height=size[0], width=size[1], format="rgb24", interpolation="AREA").to_ndarray()
    return scaled


def _even(size: float) -> int:
    return max(2, round(size / 2) * 2)
