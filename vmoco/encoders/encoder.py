"""A pretrained encoder with its preprocessing: what `vmoco.load_encoder` returns.

It takes raw frames, uint8 RGB of any size, and prepares them itself, so callers need not know how it was trained.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from vmoco.data.augment import PIXEL_MEAN, PIXEL_STD, standardise
from vmoco.model.backbone import Backbone

if TYPE_CHECKING:
    from vmoco.data.decoder import Decoder

Source = str | os.PathLike[str] | npt.NDArray[np.uint8] | torch.Tensor
"""A video file, or frames."""

MAX_CLIPS = 32
"""Most clips of one video file; the default of ingest."""
SECONDS_PER_VIDEO = 600.0
S3D_FRAMES = 5
"""Fewest frames for S3D: it halves time three times, the last time without padding."""


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder expects of a clip."""

    num_frames: int
    """T in its training; other lengths are accepted."""
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
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1, 1), persistent=False)

    @property
    def feature_dim(self) -> int:
        """Width of a feature."""
        return self.backbone.feature_dim

    def clips(self, source: Source) -> torch.Tensor:
        """Frames as clips, uint8 (B, T, H, W, 3).

        Args:
            source: path of a video file, which gives as many clips as fit side by side (32 at most) at the encoder's
                frame rate; or uint8 frames (T, H, W, 3) or (B, T, H, W, 3), RGB, an array or a tensor.

        Raises:
            ValueError: a video that cannot be read, or frames of another shape or type.
        """
        if isinstance(source, str | os.PathLike):
            return torch.from_numpy(self._decoded(os.fspath(source)))
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
        if self.card.get("backbone") == "s3d" and frames.shape[1] < S3D_FRAMES:
            raise ValueError(f"clips have {frames.shape[1]} frames: give at least {S3D_FRAMES}, which an s3d needs")
        return frames

    def preprocess(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 (B, T, H, W, 3) -> normalised float32 (B, 3, T, size, size).

        Raises:
            ValueError: frames of another shape or type.
        """
        frames = self.clips(frames)
        side = min(frames.shape[2:4])
        top, left = (frames.shape[2] - side) // 2, (frames.shape[3] - side) // 2
        return self.preprocess_square(frames[:, :, top : top + side, left : left + side])

    def preprocess_square(self, frames: torch.Tensor) -> torch.Tensor:
        """The same for square frames, without checks: only scales and normalises."""
        size = self.preprocessing.size
        pixels = frames.permute(0, 1, 4, 2, 3).flatten(0, 1).to(self.mean.device).float() / 255
        scaled = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        clips = scaled.unflatten(0, frames.shape[:2]).transpose(1, 2)
        if self.preprocessing.standardise:
            return standardise(clips)
        return (clips - self.mean) / self.std

    @torch.inference_mode()
    def embed(self, source: Source) -> torch.Tensor:
        """Features of clips, float32 (B, feature_dim), unit rows; `source` as for `clips`.

        Features of unit length, because they are compared by cosine. Fine-tuning uses `forward`.

        Raises:
            ValueError: a video that cannot be read, or frames of another shape or type.
        """
        return F.normalize(self(self.clips(source)), dim=1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 frames (B, T, H, W, 3) -> features float32 (B, feature_dim), with graph."""
        features: torch.Tensor = self.backbone(self.preprocess(frames))
        return features

    def weights_hash(self) -> str:
        """Hash of weights and preprocessing, 16 hex digits; encoders with equal hashes give equal features."""
        digest = hashlib.sha256(repr(self.preprocessing).encode())
        for name, tensor in sorted(self.backbone.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def stride(self, fps: float) -> int:
        """The n for which every n-th frame of a video of `fps` comes nearest to the encoder's frame rate."""
        return max(1, round(fps / self.preprocessing.fps))

    def cut_video(
        self, path: str, *, decoder: Decoder, max_clips: int = MAX_CLIPS, seconds: float = SECONDS_PER_VIDEO
    ) -> VideoClips:
        """The clips of a video file as this encoder sees them, decoded in the process of `decoder`.

        Raises:
            VideoError: the video is damaged, too short or too slow.
        """
        from vmoco.data import video
        from vmoco.data.clips import ClipPlan

        expected = self.preprocessing
        size = (expected.size, expected.size)
        stride = self.stride(video.probe(path).fps)
        plan = ClipPlan(expected.num_frames, stride=stride, max_clips=max_clips)
        cut = decoder.cut(path, plan, part=None, size=size, encoding="raw", quality=100, offset=0, seconds=seconds)
        stored = os.pread(decoder.scratch.fileno(), sum(cut.sizes), 0)
        frames = np.frombuffer(stored, np.uint8).reshape(len(cut.sizes), expected.num_frames, *size, 3).copy()
        return VideoClips(frames, cut.start_times, cut.start_seconds, expected.num_frames * stride / cut.fps)

    def _decoded(self, path: str) -> npt.NDArray[np.uint8]:
        from vmoco.data.decoder import Decoder
        from vmoco.data.ledger import VideoError

        if not os.path.isfile(path):
            raise ValueError(f"there is no video file {path}")
        decoder = Decoder()
        try:
            return self.cut_video(path, decoder=decoder).frames
        except VideoError as error:
            raise ValueError(f"video {path} gives no clips ({error})") from None
        finally:
            decoder.close()
