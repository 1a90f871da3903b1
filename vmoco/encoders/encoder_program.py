"""Runs an exported encoder with only torch and MLflow: this file is logged with every registered encoder.

MLflow calls `_load_pyfunc` where vmoco is not installed, so this file imports nothing of vmoco. The program is a
torch.export archive, and opening one can run code. It is opened only if its SHA-256 is the one in the encoder's card,
and the card's SHA-256 the one that the registry recorded. This file and MLmodel come from the artifact store, as with
any model of MLflow: use `vmoco.load_encoder`, which runs no code of an encoder, if you do not trust that store.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

CARD, PROGRAM = "encoder.json", "program.pt2"
SHA256_TAG = "vmoco.sha256"
"""Tag of a registered version: SHA-256 of its card."""
_REGISTERED = "registered_model_meta"  # MLflow writes it into what it fetches by models:/


class EncoderProgram:
    """What `mlflow.pyfunc.load_model` returns.

    Args:
        folder: of the encoder.
    """

    def __init__(self, folder: Path) -> None:
        import torch

        content = _read(folder / CARD)
        _check_card(folder, content)
        self.card: dict[str, Any] = json.loads(content)
        program = _read(folder / PROGRAM)
        if (found := hashlib.sha256(program).hexdigest()) != self.card["files"].get(PROGRAM):
            raise ValueError(
                f"{folder / PROGRAM} is damaged or was changed: its SHA-256 is {found[:12]}..., {CARD} says "
                f"{str(self.card['files'].get(PROGRAM))[:12]}...; it was not opened"
            )
        self._module = torch.export.load(io.BytesIO(program)).module()  # the bytes that were checked

    def predict(self, clips: Any, params: dict[str, Any] | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Raw clips, uint8 (B, T, H, W, 3), RGB, of any height and width -> unit features float32 (B, feature_dim).

        Raises:
            ValueError: clips of another shape or type.
        """
        import torch

        frames = np.asarray(clips)
        length = self.card["preprocessing"]["num_frames"]
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[1] != length or frames.shape[-1] != 3:
            raise ValueError(
                f"clips are {frames.dtype} {frames.shape}: give uint8 RGB, of shape (clips, {length} frames, height, "
                "width, 3)"
            )
        side = min(frames.shape[2:4])
        top, left = (frames.shape[2] - side) // 2, (frames.shape[3] - side) // 2
        square = np.ascontiguousarray(frames[:, :, top : top + side, left : left + side])
        square = square if square.flags.writeable else square.copy()
        with torch.inference_mode():
            features: np.ndarray[Any, np.dtype[np.float32]] = self._module(torch.from_numpy(square)).numpy()
        return features


def _load_pyfunc(path: str) -> EncoderProgram:
    """Called by MLflow with the folder of the encoder."""
    return EncoderProgram(Path(path))


def _check_card(folder: Path, content: bytes) -> None:
    """Compares the card with the registry's record, where the encoder was fetched by its name."""
    if not (folder / _REGISTERED).exists():
        return  # a local folder, or an artifact of a run: the registry has no record of it
    import mlflow

    lines = (folder / _REGISTERED).read_text().splitlines()
    named = {key: value.strip(" '\"") for key, _, value in (line.partition(":") for line in lines)}
    version = mlflow.MlflowClient().get_model_version(named["model_name"], named["model_version"])
    if version.tags.get(SHA256_TAG) != hashlib.sha256(content).hexdigest():
        raise ValueError(
            f"{folder / CARD} is not what was registered as {version.name} version {version.version}: it is damaged "
            "or was changed; it was not opened"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: this is not an encoder of vmoco, or it is damaged") from None
