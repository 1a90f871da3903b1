"""Clips of which only the motion tells the class, made otherwise than Doom's: a virtual camera moves over real frames.

A clip shows a part of one frame of real footage while the camera pans, zooms or turns over it: eight ways to move, at a
speed of its own. The motion is drawn whatever the frame, so neither what is seen nor a single frame tells the class.
The probe is fitted on other motions over the videos of pretraining, and tested on other videos. The two clips of
one "video" show the same frame and move independently of each other: unlike in Doom, where both hold one action, a pair
of clips tells nothing about the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from vmoco.data.shard import Clip
from vmoco.seed import hash64

MOTIONS = ("pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out", "turn left", "turn right")
NUM_FRAMES, HEIGHT, WIDTH = 16, 48, 64
FPS = 25.0
# Which videos serve for what: no video of the first line is in the others, and each of those in one.
PRETRAIN = FIT = ("dancer.avi", "pianist.avi", "test_A.avi", "test_B.avi", "demo.mp4", "bikes.mp4")
VALIDATION = ("carphone_pristine.mp4",)
TEST = ("bigbuckbunny.mp4", "single_face.mp4", "WolfgangLanger_Pexels.mp4")

_SHORT_SIDE = 144  # pixels of a source frame
_FRAMES_OF_A_VIDEO = 60
_PAN, _ZOOM, _TURN = (0.5, 1.6), (0.008, 0.025), (0.7, 2.2)  # pixels, share and degrees a frame


def render(folder: Path, *, videos: Sequence[str], number: int, seed: int, held_out: bool = False) -> list[Clip]:
    """Two clips of uint8 (NUM_FRAMES, HEIGHT, WIDTH, 3) for each of `number` drawn frames; a pure function.

    Args:
        folder: of the footage, as `vmoco.data.footage.fetch` returns it.
        videos: names of the files that frames are drawn from.
        number: of frames that are drawn.
        seed: of the draws.
        held_out: whether the clips are marked as held out.
    """
    sources = [_frames(next(folder.rglob(name))) for name in videos]
    clips = []
    for place in range(number):
        random = np.random.default_rng(hash64("camera", seed, place, *videos))
        of_video = sources[int(random.integers(len(sources)))]
        image = of_video[int(random.integers(len(of_video)))]
        video_id = f"{'-'.join(sorted(videos))[:24]}-seed{seed}-{place:05d}"
        for part in range(2):
            motion = MOTIONS[int(random.integers(len(MOTIONS)))]
            frames = _moved(image, motion, random)
            clip_id = f"{hash64('camera clip', video_id, part):016x}"
            start = part * NUM_FRAMES / FPS
            clips.append(Clip(clip_id, video_id, start, FPS, held_out, frames, label=motion))
    return clips


def _frames(path: Path) -> list[torch.Tensor]:
    """Frames of a video, evenly spread, float (1, 3, H, W) with a short side of _SHORT_SIDE pixels."""
    with av.open(str(path)) as container:
        every = list(container.decode(video=0))
        chosen = np.unique(np.linspace(0, len(every) - 1, _FRAMES_OF_A_VIDEO).round().astype(int))
        images = [every[at].to_image() for at in chosen]
    scale = _SHORT_SIDE / min(images[0].size)
    size = (round(images[0].width * scale), round(images[0].height * scale))
    small = [np.asarray(image.resize(size, Image.Resampling.BOX)) for image in images]
    return [torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() for frame in small]


def _moved(image: torch.Tensor, motion: str, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """What a camera sees that moves over an image: (NUM_FRAMES, HEIGHT, WIDTH, 3)."""
    kind, _, direction = motion.partition(" ")
    times = np.arange(NUM_FRAMES) - (NUM_FRAMES - 1) / 2
    sign = 1.0 if direction in ("right", "down", "in") else -1.0
    speed = sign * random.uniform(*{"pan": _PAN, "zoom": _ZOOM, "turn": _TURN}[kind])
    size = random.uniform(0.9, 1.4)  # pixels of the source to one of the clip
    zooms = np.full(NUM_FRAMES, size) * (np.exp(-speed * times) if kind == "zoom" else 1.0)
    angles = np.deg2rad(random.uniform(-10, 10) + (speed * times if kind == "turn" else 0 * times))
    height, width = image.shape[2:]
    # The view, with the way that it goes, fits into the image; where it does not, the border is repeated.
    reach = (size * WIDTH / 2 + 14, size * HEIGHT / 2 + 14)
    middle = [random.uniform(min(r, n / 2), max(n - r, n / 2)) for r, n in zip(reach, (width, height), strict=True)]
    shift = speed * times * size if kind == "pan" else 0 * times
    left = middle[0] + (shift if direction in ("left", "right") and kind == "pan" else 0 * times)
    top = middle[1] + (shift if direction in ("up", "down") else 0 * times)
    x = (np.arange(WIDTH) - (WIDTH - 1) / 2)[None, None] * zooms[:, None, None]
    y = (np.arange(HEIGHT) - (HEIGHT - 1) / 2)[None, :, None] * zooms[:, None, None]
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    across, down = left[:, None, None] + cos * x - sin * y, top[:, None, None] + sin * x + cos * y
    grid = torch.from_numpy(np.stack([2 * (across + 0.5) / width - 1, 2 * (down + 0.5) / height - 1], axis=-1)).float()
    seen = F.grid_sample(
        image.expand(NUM_FRAMES, -1, -1, -1), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    pixels: npt.NDArray[np.uint8] = seen.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return pixels
