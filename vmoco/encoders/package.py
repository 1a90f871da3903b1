"""An exported encoder: a folder that any process can load, without Ray.

    encoder.safetensors   weights of the backbone
    encoder.json          the card: preprocessing, lineage, and the SHA-256 of each file listed here
    settings.json         all settings of the run, the same bytes as in its checkpoint and in MLflow
    videos.parquet        the videos of its data set, and which of them were held out
    program.pt2           the network as a program that needs no vmoco (`encoder_program.py`)
    encoder.onnx          the same for ONNX Runtime, if it was asked for

Imported weights have no settings.json and no videos.parquet. `registry.attach` adds README.md and plots/ for people,
and MLmodel, requirements and code/ for MLflow. `load_encoder` reads safetensors and JSON only, so no file of the folder
can run code, and it reads only bytes that have the recorded hash: the card records the files, the registry the card.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from safetensors.torch import load, save_file

from vmoco import storage
from vmoco.encoders.encoder import Encoder, Preprocessing
from vmoco.encoders.encoder_program import CARD, PROGRAM
from vmoco.encoders.portable import ONNX, write_onnx, write_program
from vmoco.model.backbone import Backbone, build_backbone

if TYPE_CHECKING:
    from vmoco.encoders import registry

__all__ = ["Encoder", "EncoderFiles", "Preprocessing", "load_encoder", "write_folder"]

VERSION = 2
WEIGHTS, SETTINGS, VIDEOS = "encoder.safetensors", "settings.json", "videos.parquet"
VIDEO_FIELDS = pa.schema([("video_id", pa.string()), ("held_out", pa.bool_())])

NO_LICENCE = (
    "not recorded: before you use this encoder, ask the owner of the data set what its videos may be used for "
    "(--tracking.data-licence records it)"
)
_PACKAGES = ("vmoco", "torch", "torchvision", "numpy", "safetensors", "pyarrow", "av", "mlflow", "ray")


def write_folder(
    folder: Path,
    backbone: Backbone,
    backbone_name: str,
    preprocessing: Preprocessing,
    *,
    lineage: dict[str, Any],
    onnx: bool = False,
) -> dict[str, Any]:
    """Writes weights, program and, last, the card, with the hash of every file in the folder.

    Args:
        folder: exists, and already holds settings.json and videos.parquet if the encoder has them.
        backbone: its weights.
        backbone_name: for `build_backbone`.
        preprocessing: of the encoder.
        lineage: entries of the card about the encoder's origin.
        onnx: also write encoder.onnx.

    Returns:
        The card.

    Raises:
        ValueError: ONNX is not installed.
    """
    save_file({name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}, folder / WEIGHTS)
    encoder = Encoder(backbone, preprocessing, {"backbone": backbone_name}).eval()
    write_program(encoder, folder)
    if onnx:
        write_onnx(encoder, folder)
    names = (WEIGHTS, SETTINGS, VIDEOS, PROGRAM, ONNX)
    card = {
        "version": VERSION,
        "backbone": backbone_name,
        "feature_dim": backbone.feature_dim,
        "preprocessing": preprocessing.to_json(),
        **lineage,
        "git_commit": git_commit(),
        "versions": _versions(),
        "files": {name: storage.file_sha256(str(folder / name)) for name in names if (folder / name).exists()},
    }
    storage.write_atomic(str(folder / CARD), json.dumps(card, indent=1, sort_keys=True).encode())
    return card


def add_scores(folder: Path, scores: dict[str, dict[str, Any]]) -> None:
    """Adds scores, by protocol, to the card of an encoder that is not registered yet."""
    card = json.loads((folder / CARD).read_text())
    storage.write_atomic(str(folder / CARD), json.dumps(card | {"scores": scores}, indent=1, sort_keys=True).encode())


def load_encoder(uri: str) -> Encoder:
    """Loads an encoder in evaluation mode, on the CPU.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/encoder`, or a folder that `write_folder` wrote.

    Raises:
        ValueError: there is no such encoder, it is damaged or was changed, or its format has another version.
    """
    return EncoderFiles(uri).encoder()


class EncoderFiles:
    """The files of an encoder, each read when it is asked for, and only if it has the recorded hash.

    Args:
        uri: as for `load_encoder`.

    Attributes:
        card: the content of encoder.json.

    Raises:
        ValueError: there is no such encoder, its card is damaged or was changed, or its format has another version.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._located: registry.Located | None = None
        if uri.startswith(("models:/", "runs:/")):
            from vmoco.encoders import registry

            self._located = registry.locate(uri)
            content = registry.pull(self._located, CARD, sha256=self._located.card_sha256)
        else:
            content = _read(Path(uri) / CARD, f"{uri} is not an encoder of vmoco")
        self.card = _parsed(content, uri)

    def __contains__(self, name: str) -> bool:
        """Whether the encoder has a file of this name, such as encoder.onnx."""
        return name in self.card["files"]

    def read(self, name: str) -> bytes:
        """The content of one of its files.

        Raises:
            ValueError: the encoder has no such file, or the file is missing, damaged or was changed.
        """
        if name not in self:
            raise ValueError(f"encoder {self._uri} has no {name}: its {CARD} does not list it")
        sha256 = self.card["files"][name]
        if self._located is not None:
            from vmoco.encoders import registry

            return registry.pull(self._located, name, sha256=sha256)
        content = _read(Path(self._uri) / name, f"encoder {self._uri} is damaged")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(
                f"encoder {self._uri} is damaged or was changed: its {name} does not have the hash in its {CARD}"
            )
        return content

    def encoder(self) -> Encoder:
        """The encoder in evaluation mode, on the CPU.

        Raises:
            ValueError: its weights are missing, damaged or were changed.
        """
        weights = self.read(WEIGHTS)
        backbone = build_backbone(self.card["backbone"])
        backbone.load_state_dict(load(weights))
        return Encoder(backbone, Preprocessing.from_json(self.card["preprocessing"]), self.card).eval()


def _read(path: Path, problem: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{problem}: it has no {path.name}") from None


def _parsed(content: bytes, uri: str) -> dict[str, Any]:
    """The card of an encoder.

    Raises:
        ValueError: it is not JSON, or its format has another version.
    """
    try:
        card: dict[str, Any] = json.loads(content)
    except ValueError:
        raise ValueError(f"encoder {uri} is damaged: its {CARD} is not JSON") from None
    if card.get("version") != VERSION:
        raise ValueError(
            f"encoder {uri} has format version {card.get('version')}, and this vmoco reads version {VERSION}: use the "
            "vmoco that wrote it, or export the encoder again"
        )
    return card


def git_commit() -> str | None:
    """The commit of vmoco's sources, with `+changes` if files differ from it; None outside a git checkout.

    VMOCO_COMMIT overrides it, for images and working directories without .git.
    """
    if given := os.environ.get("VMOCO_COMMIT"):
        return given
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout of another user
        return None
    return f"{commit}+changes" if changes else commit


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions | {"torch": torch.__version__}  # with the build, such as +cpu
