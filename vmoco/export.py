"""The encoder as a thing of its own: a folder of safetensors and JSON that any process can load, without Ray.

    encoder.safetensors   weights of the backbone
    encoder.json          preprocessing, lineage, and the SHA-256 of the weights
    settings.json         the resolved settings of the run, the same bytes as in its checkpoint and in MLflow

Nothing in it can run code. `load_encoder` refuses weights whose hash is not the recorded one.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import vmoco
from vmoco import storage
from vmoco.data.augment import PIXEL_MEAN, PIXEL_STD
from vmoco.data.manifest import Manifest
from vmoco.model.backbone import Backbone, build_backbone
from vmoco.train import state

VERSION = 1
WEIGHTS, CARD = "encoder.safetensors", "encoder.json"


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder expects of a clip."""

    num_frames: int
    """T it was trained with; other lengths are accepted."""
    fps: float
    """Frames per second of its training clips (their median)."""
    size: int
    """Height and width in pixels; frames are centre-cropped to a square and scaled to it."""
    mean: tuple[float, float, float] = PIXEL_MEAN
    std: tuple[float, float, float] = PIXEL_STD


class Encoder(nn.Module):
    """A pretrained encoder with its preprocessing.

    Attributes:
        backbone: the network, for fine-tuning: normalised float (B, 3, T, H, W) -> (B, feature_dim).
        preprocessing: what `forward` does to frames first.
        card: where it comes from.
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

    def preprocess(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 (B, T, H, W, 3) -> normalised float32 (B, 3, T, size, size).

        Raises:
            ValueError: frames of another shape or type.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(
                f"frames are {frames.dtype} {tuple(frames.shape)}: "
                "uint8 (clips, frames, height, width, 3), RGB, is needed"
            )
        size, side = self.preprocessing.size, min(frames.shape[2:4])
        top, left = (frames.shape[2] - side) // 2, (frames.shape[3] - side) // 2
        square = frames[:, :, top : top + side, left : left + side].permute(0, 1, 4, 2, 3)
        pixels = square.flatten(0, 1).to(self.mean.device).float() / 255
        scaled = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        clips = scaled.unflatten(0, frames.shape[:2]).transpose(1, 2)
        return (clips - self.mean) / self.std

    @torch.inference_mode()
    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        """Features of clips, float32 (B, feature_dim), unit rows; uint8 frames (B, T, H, W, 3), RGB.

        Features of unit length, because they are compared by cosine. Fine-tuning uses `forward`.

        Raises:
            ValueError: frames of another shape or type.
        """
        return F.normalize(self(frames), dim=1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 frames (B, T, H, W, 3) -> features float32 (B, feature_dim), with graph."""
        features: torch.Tensor = self.backbone(self.preprocess(frames))
        return features


def write_encoder(checkpoint: Path, folder: Path, *, manifest: Manifest) -> dict[str, Any]:
    """Takes the query encoder's backbone out of a checkpoint.

    Args:
        checkpoint: folder that `TrainState.save` wrote.
        folder: receives the encoder's three files.
        manifest: data set that it was trained on.

    Returns:
        The card: what encoder.json says.

    Raises:
        ValueError: the checkpoint is damaged or none.
    """
    record = state.Record.read(checkpoint)
    assert record.manifest_hash == manifest.hash, "an encoder's lineage names the data that it was trained on"
    settings = state.read_settings(checkpoint)
    prefix = "query.backbone."
    tensors = state.read_tensors(checkpoint, record)
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    (folder / state.SETTINGS).write_bytes((checkpoint / state.SETTINGS).read_bytes())
    preprocessing = Preprocessing(
        num_frames=settings.data.num_frames,
        fps=float(np.median(manifest.table["fps"].to_numpy())) / settings.data.stride,
        size=settings.augment.size,
    )
    card = {
        "version": VERSION,
        "backbone": settings.model.backbone,
        "feature_dim": build_backbone(settings.model.backbone).feature_dim,
        "preprocessing": asdict(preprocessing),
        "step": record.step,
        "run_id": record.run_id,
        "settings_hash": record.settings_hash,
        "data": {"manifest_hash": record.manifest_hash, "uri": manifest.uri, "counts": manifest.counts},
        "sha256": state.file_sha256(folder / WEIGHTS),
        "versions": {"vmoco": vmoco.__version__, "torch": torch.__version__},
    }
    storage.write_atomic(str(folder / CARD), json.dumps(card, indent=1, sort_keys=True).encode())
    return card


def load_encoder(uri: str) -> Encoder:
    """Loads an encoder in evaluation mode, on the CPU.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/encoder`, or a folder that `write_encoder` wrote.

    Raises:
        ValueError: there is none, it is damaged, or of another version.
    """
    if uri.startswith(("models:/", "runs:/")):
        from vmoco import registry

        with tempfile.TemporaryDirectory() as folder:
            registry.fetch(uri, Path(folder))
            return _read_encoder(Path(folder), uri)
    return _read_encoder(Path(uri), uri)


def _read_encoder(folder: Path, uri: str) -> Encoder:
    try:
        card = json.loads((folder / CARD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{uri} is not an encoder of vmoco: it has no {CARD}") from None
    if card.get("version") != VERSION:
        raise ValueError(f"encoder {uri} is of version {card.get('version')}, this vmoco reads version {VERSION}")
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"encoder {uri} is damaged: it has no {WEIGHTS}")
    if state.file_sha256(folder / WEIGHTS) != card["sha256"]:
        raise ValueError(f"encoder {uri} is damaged or was changed: its weights do not have the hash that {CARD} says")
    backbone = build_backbone(card["backbone"])
    backbone.load_state_dict(load_file(folder / WEIGHTS))
    wanted = card["preprocessing"]
    preprocessing = Preprocessing(**wanted | {"mean": tuple(wanted["mean"]), "std": tuple(wanted["std"])})
    return Encoder(backbone, preprocessing, card).eval()
