"""A pretrained encoder with its preprocessing: what `vmoco.load_encoder` returns.

It takes raw frames, uint8 RGB of any size, or videos, and prepares them itself, so callers need not know how it was
trained.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from vmoco.architectures import ARCHITECTURES, Architecture
from vmoco.data.augment import PIXEL_MEAN, PIXEL_STD, standardise
from vmoco.encoders.dense import DenseFeatures, SlidingWindow, embed_videos
from vmoco.encoders.video_file import MAX_CLIPS, SECONDS_PER_VIDEO, Place, clip_plan, decoding, local_file
from vmoco.job_settings import ShortVideos
from vmoco.model.backbone import Backbone
from vmoco.progress import Progress

if TYPE_CHECKING:
    from vmoco.data.decoder import Decoder
    from vmoco.data.ledger import Damage

Source = Place | npt.NDArray[np.uint8] | torch.Tensor
"""A video (path or URI), or frames."""
One = TypeVar("One", bound=Source)
Video = TypeVar("Video", bound=Place)


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder expects of a clip."""

    num_frames: int
    """T in its training; other lengths are accepted. Those that learn positions (mvit_v2_s) interpolate them then, and
    the encoder warns."""
    fps: float
    """Frames per second of its training clips (their median)."""
    size: int
    """Height and width in pixels; frames are centre-cropped to a square and scaled to it."""
    mean: tuple[float, float, float] = PIXEL_MEAN
    std: tuple[float, float, float] = PIXEL_STD
    standardise: bool = False
    """Scale each clip to zero mean and unit deviation; `mean` and `std` are not used then."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Preprocessing:
        """Reads `to_json` back."""
        return cls(**values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})


@dataclass(frozen=True)
class VideoClips:
    """The clips of one video file."""

    frames: npt.NDArray[np.uint8]
    """(N, T, size, size, 3), RGB."""
    start_times: list[int]
    """Time stamp of the first frame of each, in the video's own unit."""
    start_seconds: list[float]
    clip_seconds: float
    """From the first frame of a clip to the end of its last."""
    damage: Damage | None = None
    """What of the video is lost."""


class Encoder(nn.Module):
    """A pretrained encoder with its preprocessing.

    Attributes:
        backbone: the network, for fine-tuning: normalised float (B, 3, T, H, W) -> (B, feature_dim).
        preprocessing: what `forward` does to frames first.
        card: its origin, the content of encoder.json.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: Backbone, preprocessing: Preprocessing, card: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.preprocessing = preprocessing
        self.card = card
        self._set_pixel_statistics(torch.device("cpu"))

    def _set_pixel_statistics(self, device: torch.device) -> None:
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.preprocessing, name), dtype=torch.float32, device=device)
            self.register_buffer(name, values.view(3, 1, 1, 1), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Encoder:
        """What `to`, `half` and their like call: pixels are normalised in float32, whatever the type of the weights."""
        super()._apply(fn, recurse)
        self._set_pixel_statistics(self.mean.device)
        return self

    @property
    def feature_dim(self) -> int:
        """Width of a feature."""
        return self.backbone.feature_dim

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which the network computes: float32 unless it was changed, as by `half()`."""
        for weights in self.backbone.parameters():  # a loop, because torch 2.7 does not compile `next` of a generator
            return weights.dtype
        return torch.float32

    @property
    def min_frames(self) -> int:
        """Fewest frames of a clip."""
        return self._architecture.min_frames

    @property
    def _architecture(self) -> Architecture:
        return ARCHITECTURES.get(self.card.get("backbone", ""), Architecture())

    def clips(self, source: Source, *, short_videos: ShortVideos = "reject") -> torch.Tensor:
        """Frames as clips, uint8 (B, T, H, W, 3).

        Args:
            source: path or URI (s3://, gs://) of a video, which gives as many clips as fit side by side (32 at most) at
                the encoder's frame rate; or uint8 frames (T, H, W, 3) or (B, T, H, W, 3), RGB, an array or a tensor.
            short_videos: "loop" repeats the frames of a video that is shorter than a clip, as ingest does.

        Raises:
            ValueError: a video that cannot be read, or frames of another shape or type.
        """
        if isinstance(source, str | os.PathLike):
            with decoding() as decoder:
                return self._decoded(source, decoder, short_videos)
        return self._checked(source)

    def _checked(self, source: npt.NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
        if isinstance(source, np.ndarray) and source.dtype == np.uint8:
            # A copy where torch cannot share the memory: a read-only view of a shard, or negative strides.
            shared = source.flags.writeable and all(stride > 0 for stride in source.strides)
            frames = torch.from_numpy(source if shared else source.copy())
        elif isinstance(source, torch.Tensor):
            frames = source
        else:
            kind = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
            raise ValueError(f"frames are {kind}: give a path, or uint8 frames as an array or a tensor")
        frames = frames[None] if frames.ndim == 4 else frames
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3 or not frames.numel():
            raise ValueError(
                f"frames are {frames.dtype} {tuple(frames.shape)}: "
                "give uint8 RGB, of shape (clips, frames, height, width, 3) or (frames, height, width, 3)"
            )
        if frames.shape[1] < self.min_frames:
            raise ValueError(
                f"clips have {frames.shape[1]} frames: give at least {self.min_frames}, which an "
                f"{self.card['backbone']} needs"
            )
        trained_on = self.preprocessing.num_frames
        if self._architecture.learns_positions and frames.shape[1] != trained_on:
            warnings.warn(
                f"clips have {frames.shape[1]} frames, and this {self.card['backbone']} was trained on {trained_on}: "
                f"its positions in time are interpolated; features of {trained_on} frames may be better",
                stacklevel=3,
            )
        return frames

    def preprocess(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 (B, T, H, W, 3) -> normalised (B, 3, T, size, size) of the encoder's `dtype`, computed in float32.

        Raises:
            ValueError: frames of another shape or type.
        """
        frames = self._checked(frames)
        side = min(frames.shape[2:4])
        top, left = (frames.shape[2] - side) // 2, (frames.shape[3] - side) // 2
        return self.preprocess_square(frames[:, :, top : top + side, left : left + side])

    def preprocess_square(self, frames: torch.Tensor) -> torch.Tensor:
        """The same for square frames, without checks: only scales and normalises."""
        size = self.preprocessing.size
        pixels = frames.permute(0, 1, 4, 2, 3).flatten(0, 1).to(self.mean.device).float() / 255
        scaled = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        clips = scaled.unflatten(0, frames.shape[:2]).transpose(1, 2)
        normalised = standardise(clips) if self.preprocessing.standardise else (clips - self.mean) / self.std
        return normalised.to(self.dtype)

    @overload
    def embed(
        self,
        source: Source,
        *,
        short_videos: ShortVideos = ...,
        batch_size: int = ...,
        progress: Callable[[str], None] | None = ...,
    ) -> torch.Tensor: ...

    @overload
    def embed(
        self,
        source: list[One] | tuple[One, ...],
        *,
        short_videos: ShortVideos = ...,
        batch_size: int = ...,
        progress: Callable[[str], None] | None = ...,
    ) -> list[torch.Tensor]: ...

    @torch.inference_mode()
    def embed(
        self,
        source: Source | list[One] | tuple[One, ...],
        *,
        short_videos: ShortVideos = "reject",
        batch_size: int = 32,
        progress: Callable[[str], None] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Features of clips, float32 (B, feature_dim) on the encoder's device, unit rows.

        Features of unit length, because they are compared by cosine. Fine-tuning uses `forward`. Memory holds one batch
        and one video, however many there are.

            encoder.embed("cat.mp4")                               # (B, feature_dim), a row per clip
            encoder.embed(["cat.mp4", "s3://videos/dog.mp4"])      # a list: one such tensor per video

        Args:
            source: as for `clips`, or a list or tuple of such sources.
            short_videos: as for `clips`.
            batch_size: most clips that go through the network together; clips of several sources share a batch.
            progress: takes a line every few seconds, with the time left; such as `print`.

        Raises:
            ValueError: a video that cannot be read, or frames of another shape or type. Of a list, the message names
                the place of the source that failed, counted from 0.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: 1 or more is needed")
        several = isinstance(source, list | tuple)
        sources: Sequence[Source] = source if isinstance(source, list | tuple) else [source]
        show = progress or (lambda line: None)
        counted = Progress(show, "embed  read", total=len(sources), unit="sources", counts=["clips"], every_seconds=2)

        def prepared() -> Iterator[tuple[int, torch.Tensor]]:
            with decoding() as decoder:
                for place, each in enumerate(sources):
                    try:
                        if isinstance(each, str | os.PathLike):
                            frames = self._decoded(each, decoder, short_videos)
                        else:
                            frames = self._checked(each)
                    except ValueError as error:
                        raise ValueError(f"source {place}: {error}" if several else str(error)) from None
                    for some in frames.split(batch_size):
                        yield place, self.preprocess(some)
                    counted.add(clips=len(frames))

        features: list[list[torch.Tensor]] = [[] for _ in sources]
        for batch in _batches(prepared(), batch_size):
            clips = torch.cat([clips for _, clips in batch])
            rows = F.normalize(self.backbone(clips).float(), dim=1).split([len(clips) for _, clips in batch])
            for (place, _), found in zip(batch, rows, strict=True):
                features[place].append(found)
        found_of = [torch.cat(rows) for rows in features]
        return found_of if several else found_of[0]

    @overload
    def embed_dense(
        self,
        source: Place,
        *,
        every_seconds: float | None = ...,
        clip_seconds: float | None = ...,
        short_videos: ShortVideos = ...,
        batch_size: int = ...,
        progress: Callable[[str], None] | None = ...,
    ) -> DenseFeatures: ...

    @overload
    def embed_dense(
        self,
        source: list[Video] | tuple[Video, ...],
        *,
        every_seconds: float | None = ...,
        clip_seconds: float | None = ...,
        short_videos: ShortVideos = ...,
        batch_size: int = ...,
        progress: Callable[[str], None] | None = ...,
    ) -> list[DenseFeatures]: ...

    @torch.inference_mode()
    def embed_dense(
        self,
        source: Place | list[Video] | tuple[Video, ...],
        *,
        every_seconds: float | None = None,
        clip_seconds: float | None = None,
        short_videos: ShortVideos = "reject",
        batch_size: int = 32,
        progress: Callable[[str], None] | None = None,
    ) -> DenseFeatures | list[DenseFeatures]:
        """Features of a video at regular times, from its start to its end, and the times: where in it is what?

        A clip begins every `every_seconds`, with the frame that is shown then; clips may overlap. Their pixels are
        those of an ingest at the encoder's frame rate. Clips with a damaged frame are left out, with a warning, and so
        are clips that would hold frames of two joined recordings; the times of the others stay the same. Memory holds
        two batches, and the features, also of a video of hours.

            dense = encoder.embed_dense("film.mp4", every_seconds=0.5)
            dense.features, dense.start_seconds     # (N, feature_dim) and 0.0, 0.5, 1.0 ... of the N clips

        Args:
            source: path or URI of a video, or a list or tuple of these.
            every_seconds: seconds from the begin of a clip to that of the next one, at least one frame at the encoder's
                frame rate. Default: half a clip.
            clip_seconds: length of a clip in seconds; the clip has that many frames of the encoder's frame rate.
                Default: as in the encoder's training, num_frames / fps.
            short_videos: "loop" gives one clip of a video that is shorter than a clip, which repeats its frames.
            batch_size: most clips that go through the network together; fewer where they are longer than in training.
            progress: takes a line every few seconds, with the time left; such as `print`.

        Raises:
            ValueError: a video that cannot be read or is shorter than a clip, or seconds that are not allowed. Of a
                list, the message names the place of the video that failed, counted from 0.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: 1 or more is needed")
        window = SlidingWindow.of(
            self, every_seconds=every_seconds, clip_seconds=clip_seconds, short_videos=short_videos
        )
        several = isinstance(source, list | tuple)
        videos: Sequence[object] = source if isinstance(source, list | tuple) else [source]
        show = progress or (lambda line: None)
        found = embed_videos(self, videos, window, batch_size=batch_size, show=show, places=several)
        return found if several else found[0]

    @torch.inference_mode()
    def feature_maps(self, source: Source) -> torch.Tensor:
        """What the last layer sees at each time and place, float32 (B, C, T', H', W'), C = feature_dim.

        Time and space are halved a few times on the way: a clip of 16x112x112 gives 2x7x7 in r3d_18, 8x4x4 in swin3d_t
        and mvit_v2_s. Their mean is the feature, but for mvit_v2_s, whose feature is a token of its own. `source` is as
        for `clips`. All clips go through the network together.

        Raises:
            ValueError: a video that cannot be read, or frames of another shape or type.
        """
        return self.backbone.feature_maps(self.preprocess(self.clips(source))).float()

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 frames (B, T, H, W, 3) -> features (B, feature_dim) of the encoder's `dtype`, with graph."""
        features: torch.Tensor = self.backbone(self.preprocess(frames))
        return features

    def weights_hash(self) -> str:
        """Hash of weights and preprocessing, 16 hex digits; encoders with equal hashes give equal features."""
        digest = hashlib.sha256(repr(self.preprocessing).encode())
        for name, tensor in sorted(self.backbone.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def stride(self, fps: float) -> int:
        """The n for which every n-th frame of a video of `fps` comes nearest to the encoder's frame rate."""
        return max(1, round(fps / self.preprocessing.fps))

    def cut_video(
        self,
        path: str,
        *,
        decoder: Decoder,
        max_clips: int = MAX_CLIPS,
        seconds: float = SECONDS_PER_VIDEO,
        short_videos: ShortVideos = "reject",
    ) -> VideoClips:
        """The clips of a video file as this encoder sees them, decoded in the process of `decoder`.

        They are those of an ingest with `--fps`, the encoder's frame rate, or without it where the video has that rate.
        Of a long video that can seek, only the frames around them are decoded. A damaged video gives the clips without
        a damaged frame, as ingest takes them by default.

        Raises:
            VideoError: the video is too short or too slow, or more than half of it is lost.
        """
        expected = self.preprocessing
        size = (expected.size, expected.size)
        plan, _ = clip_plan(
            path, num_frames=expected.num_frames, fps=expected.fps, short_videos=short_videos, max_clips=max_clips
        )
        cut = decoder.cut(
            path, plan, extent="choose", size=size, encoding="raw", quality=100, offset=0, seconds=seconds
        )
        stored = os.pread(decoder.scratch.fileno(), sum(cut.sizes), 0)
        frames = np.frombuffer(stored, np.uint8).reshape(len(cut.sizes), expected.num_frames, *size, 3).copy()
        clip_seconds = expected.num_frames / (plan.fps or cut.fps)
        return VideoClips(frames, cut.start_times, cut.start_seconds, clip_seconds, cut.damage)

    def _decoded(self, video: str | os.PathLike[str], decoder: Decoder, short_videos: ShortVideos) -> torch.Tensor:
        from vmoco.data.ledger import VideoError

        place = os.fspath(video)
        try:
            with local_file(place) as path:
                cut = self.cut_video(path, decoder=decoder, short_videos=short_videos)
            if cut.damage:
                warnings.warn(f"video {place} gives its clips without damage: {cut.damage}", stacklevel=4)
            return torch.from_numpy(cut.frames)
        except VideoError as error:
            raise ValueError(f"video {place} gives no clips ({error})") from None


def _batches(items: Iterator[tuple[int, torch.Tensor]], size: int) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Groups clips of one length into batches of at most `size`: (place of the source, clips (N, 3, T, S, S))."""
    batch: list[tuple[int, torch.Tensor]] = []
    for place, clips in items:
        full = sum(len(others) for _, others in batch) + len(clips) > size
        if batch and (full or batch[0][1].shape[1:] != clips.shape[1:]):
            yield batch
            batch = []
        batch.append((place, clips))
    if batch:
        yield batch
