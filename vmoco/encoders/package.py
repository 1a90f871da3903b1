"""The encoder as a thing of its own: a folder that any process can load, without Ray.

    encoder.safetensors   weights of the backbone
    encoder.json          the card: preprocessing, lineage, and the SHA-256 of every other file of this list
    settings.json         the resolved settings of the run, the same bytes as in its checkpoint and in MLflow
    videos.parquet        which videos it was trained on, and which were held out
    program.pt2           the same network for whoever has no vmoco (`vmoco/encoders/encoder_program.py`)

`load_encoder` reads safetensors and JSON alone, so nothing in the folder can run code, and only files whose hash is
the recorded one: the card holds the files' hashes, the registry the card's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load, save_file

from vmoco import storage
from vmoco.encoders.encoder import Encoder, Preprocessing
from vmoco.encoders.encoder_program import CARD, PROGRAM
from vmoco.encoders.portable import ONNX, write_onnx, write_program
from vmoco.model.backbone import Backbone, build_backbone

__all__ = ["Encoder", "Preprocessing", "load_encoder", "read_encoder", "write_folder"]

VERSION = 2
WEIGHTS, SETTINGS, VIDEOS = "encoder.safetensors", "settings.json", "videos.parquet"
VIDEO_FIELDS = pa.schema([("video_id", pa.string()), ("held_out", pa.bool_())])

NO_LICENCE = (
    "not recorded: whoever uses this encoder asks whoever made the data set what its videos may be used for "
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
    """Writes weights, program and, last, the card, which accounts for every file in the folder.

    Args:
        folder: exists; what the encoder brings along is in it already.
        backbone: its weights.
        backbone_name: for `build_backbone`.
        preprocessing: of the encoder.
        lineage: where it comes from: entries of the card.
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
    """Notes scores in the card of an encoder that is not registered yet, by protocol."""
    card = json.loads((folder / CARD).read_text())
    storage.write_atomic(str(folder / CARD), json.dumps(card | {"scores": scores}, indent=1, sort_keys=True).encode())


def load_encoder(uri: str) -> Encoder:
    """Loads an encoder in evaluation mode, on the CPU.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/encoder`, or a folder that `write_encoder` wrote.

    Raises:
        ValueError: there is none, it is damaged or was changed, or it is of another version.
    """
    if uri.startswith(("models:/", "runs:/")):
        from vmoco.encoders import registry

        with tempfile.TemporaryDirectory() as folder:
            sha256 = registry.fetch(uri, Path(folder), names=(CARD, WEIGHTS))
            return read_encoder(Path(folder), uri, sha256=sha256)
    return read_encoder(Path(uri), uri)


def read_encoder(folder: Path, uri: str, *, sha256: str | None = None) -> Encoder:
    """Reads an encoder from a folder.

    Args:
        folder: with card and weights.
        uri: its name in errors.
        sha256: of its card, as the registry recorded it; None for a folder of one's own, which has no other record.

    Raises:
        ValueError: as for `load_encoder`.
    """
    content = read_card(folder, uri, sha256=sha256)
    card = json.loads(content)
    if card.get("version") != VERSION:
        raise ValueError(f"encoder {uri} is of version {card.get('version')}, this vmoco reads version {VERSION}")
    try:
        weights = (folder / WEIGHTS).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"encoder {uri} is damaged: it has no {WEIGHTS}") from None
    if hashlib.sha256(weights).hexdigest() != card["files"].get(WEIGHTS):
        raise ValueError(f"encoder {uri} is damaged or was changed: its weights do not have the hash that {CARD} says")
    backbone = build_backbone(card["backbone"])
    backbone.load_state_dict(load(weights))  # the very bytes that were checked
    return Encoder(backbone, Preprocessing.from_json(card["preprocessing"]), card).eval()


def read_card(folder: Path, uri: str, *, sha256: str | None) -> bytes:
    """The bytes of a card, checked against the registry's record of it, where there is one.

    Raises:
        ValueError: there is none, or it is another.
    """
    try:
        content = (folder / CARD).read_bytes()
        json.loads(content)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{uri} is not an encoder of vmoco: it has no {CARD}") from None
    except ValueError:
        raise ValueError(f"encoder {uri} is damaged: its {CARD} is no JSON") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"encoder {uri} is damaged or was changed: its {CARD} is not the one that was registered")
    return content


def git_commit() -> str | None:
    """The commit of vmoco's own sources, `+changes` where they differ from it; None outside a git checkout.

    VMOCO_COMMIT overrides it, for images and working directories that travel without .git.
    """
    if told := os.environ.get("VMOCO_COMMIT"):
        return told
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
    return versions | {"torch": torch.__version__}  # with its build
