"""Features of a video at regular times, for localising actions: a window slides over the video.

`Encoder.embed_dense` is the way in. A film of hours has more clips than memory holds, so the decoder process hands them
over a batch at a time (`Decoder.cut_in_pieces`), and decodes the next batch meanwhile.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from vmoco.encoders.video_file import MOST_SECONDS, SECONDS_PER_VIDEO, clip_plan, decoding, local_file
from vmoco.job_settings import ShortVideos
from vmoco.progress import Progress

if TYPE_CHECKING:
    from vmoco.data.decoder import Decoder, StoredClips
    from vmoco.encoders.encoder import Encoder

Result = TypeVar("Result")
Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DenseFeatures:
    """The features of a video, clip by clip in the order of time."""

    features: torch.Tensor
    """float32 (N, feature_dim), unit rows, on the encoder's device."""
    start_seconds: npt.NDArray[np.float64]
    """float64 (N,): when each clip begins, by the time stamps of the video, which mostly count from its start."""
    clip_seconds: float
    """Length of each clip: row n shows the video from start_seconds[n] to start_seconds[n] + clip_seconds."""


@dataclass(frozen=True)
class SlidingWindow:
    """Which clips of a video are embedded: one of `num_frames` frames begins every `every_seconds`."""

    every_seconds: float
    num_frames: int
    short_videos: ShortVideos = "reject"

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        *,
        every_seconds: float | None,
        clip_seconds: float | None,
        short_videos: ShortVideos,
        named: Callable[[str], str] = lambda name: name,
    ) -> SlidingWindow:
        """The window of these arguments of `Encoder.embed_dense`.

        Args:
            encoder: its frame rate tells how many frames a clip has.
            every_seconds: None is half a clip.
            clip_seconds: None is the length of the encoder's training clips.
            short_videos: of a video that is shorter than a clip.
            named: the name of an argument as the user typed it.

        Raises:
            ValueError: a clip has too few frames, or two clips would begin with the same frame.
        """
        fps, num_frames = encoder.preprocessing.fps, encoder.preprocessing.num_frames
        if clip_seconds is not None:
            num_frames = max(0, round(clip_seconds * fps))
            if num_frames < encoder.min_frames:
                raise ValueError(
                    f"{named('clip_seconds')} {clip_seconds:g} is {num_frames} frames at the encoder's {fps:.4g} "
                    f"frames per second: give at least {_rounded_up(encoder.min_frames / fps)}"
                )
        every_seconds = num_frames / fps / 2 if every_seconds is None else every_seconds
        if every_seconds * fps < 1 - 1e-9:
            raise ValueError(
                f"{named('every_seconds')} {every_seconds:g} is less than a frame at the encoder's {fps:.4g} frames "
                f"per second: give at least {_rounded_up(1 / fps)}"
            )
        return cls(every_seconds, num_frames, short_videos)


def _rounded_up(seconds: float) -> str:
    return f"{math.ceil(seconds * 1000 - 1e-9) / 1000:g}"


def embed_videos(
    encoder: Encoder,
    videos: Sequence[object],
    window: SlidingWindow,
    *,
    batch_size: int,
    show: Callable[[str], None],
    places: bool,
) -> list[DenseFeatures]:
    """The features of each video, in order.

    Args:
        encoder: in evaluation mode.
        videos: paths and URIs.
        window: which clips.
        batch_size: as for `slide`.
        show: takes a progress line every few seconds.
        places: an error message begins with the place of its video, counted from 0.

    Raises:
        ValueError: as `Encoder.embed_dense`.
    """
    counted = _Counted(show, len(videos))
    found = []
    with decoding() as decoder:
        for place, video in enumerate(videos):
            try:
                if not isinstance(video, str | os.PathLike):
                    raise ValueError(
                        f"{type(video).__name__} is not a path or URI of a video: embed_dense takes these, because "
                        "frames alone have no times; embed takes frames"
                    )
                found.append(_embed_video(encoder, os.fspath(video), window, decoder, batch_size, counted))
            except ValueError as error:
                raise ValueError(f"source {place}: {error}" if places else str(error)) from None
    return found


def _embed_video(
    encoder: Encoder, video: str, window: SlidingWindow, decoder: Decoder, batch_size: int, counted: _Counted
) -> DenseFeatures:
    from vmoco.data.ledger import VideoError

    def compute(first: int, frames: Frames) -> torch.Tensor:
        features = F.normalize(encoder.backbone(encoder.preprocess(torch.from_numpy(frames))).float(), dim=1)
        counted.clips(first + len(frames))
        return features

    try:
        with local_file(video) as path:
            cut, features, clip_seconds = slide(
                encoder,
                path,
                window,
                compute,
                decoder=decoder,
                batch_size=batch_size,
                seconds=SECONDS_PER_VIDEO,
                planned=counted.planned,
            )
    except VideoError as error:
        raise ValueError(f"video {video} gives no clips ({error})") from None
    counted.video()
    if cut.damage:
        # The caller of `Encoder.embed_dense`, which torch wraps.
        warnings.warn(f"video {video} gives its clips without damage: {cut.damage}", stacklevel=5)
    return DenseFeatures(torch.cat(features), np.array(cut.start_seconds), clip_seconds)


def slide(
    encoder: Encoder,
    path: str,
    window: SlidingWindow,
    compute: Callable[[int, Frames], Result],
    *,
    decoder: Decoder,
    batch_size: int,
    seconds: float,
    planned: Callable[[int], None] = lambda num_clips: None,
) -> tuple[StoredClips, list[Result], float]:
    """Computes something of each batch of clips of a video file, which is decoded in the process of `decoder`.

    Args:
        encoder: it tells frame rate and size.
        path: of a local file.
        window: which clips.
        compute: takes the number of the first clip of a batch, and the batch: uint8 (N, T, size, size, 3). Number 0
            comes again where decoding starts again; the results before it are discarded then.
        decoder: of this thread.
        batch_size: clips in a batch; fewer where clips are longer than those of the encoder's training.
        seconds: time limit for decoding, for each ten minutes of the video.
        planned: takes about the number of clips before the first batch comes.

    Returns:
        Times and damage of the clips, the result for each batch, and the length of a clip in seconds.

    Raises:
        VideoError: the video is too short, or more than half of it is lost.
    """
    expected = encoder.preprocessing
    plan, line = clip_plan(path, num_frames=window.num_frames, fps=expected.fps, short_videos=window.short_videos)
    duration = float((line.times[-1] - line.times[0]) * line.time_base) if len(line.times) else 0.0
    planned(1 + int(max(0.0, duration - window.num_frames / expected.fps) / window.every_seconds))
    cut, results = decoder.cut_in_pieces(
        path,
        plan.sliding(window.every_seconds),
        compute,
        size=(expected.size, expected.size),
        clips_per_piece=max(1, min(batch_size, batch_size * expected.num_frames // window.num_frames)),
        seconds=min(seconds * max(1.0, duration / 600), MOST_SECONDS),
    )
    return cut, results, window.num_frames / (plan.fps or cut.fps)


class _Counted:
    """Progress in shares of a video, because the number of clips of the videos to come is not known."""

    _SHARES = 1000

    def __init__(self, show: Callable[[str], None], num_videos: int) -> None:
        work = self._SHARES * num_videos
        self._progress = Progress(
            show,
            "embed  read",
            total=num_videos,
            unit="sources",
            counts=["clips"],
            rate="clips",
            total_work=work,
            every_seconds=2,
        )
        self._planned, self._clips, self._shares = 1, 0, 0

    def planned(self, num_clips: int) -> None:
        """A new video, and about how many clips it has."""
        self._planned, self._clips, self._shares = max(1, num_clips), 0, 0

    def clips(self, done: int) -> None:
        """So many clips of the video are done; fewer than before where decoding started again."""
        shares = min(self._SHARES * done // self._planned, self._SHARES - 1)
        self._progress.add(0, work=shares - self._shares, clips=done - self._clips)
        self._clips, self._shares = done, shares

    def video(self) -> None:
        """The video is done."""
        self._progress.add(work=self._SHARES - self._shares)
