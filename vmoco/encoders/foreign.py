"""Encoders that vmoco did not train: torchvision's and the released VideoMoCo, each with its own preprocessing.

Also random initialisation, the baseline that every trained encoder has to beat.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vmoco.encoders.encoder import Encoder, Preprocessing
from vmoco.model import weights
from vmoco.model.backbone import build_backbone
from vmoco.model.moco import MocoEncoder
from vmoco.seed import hash64

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
# torchvision's recipes: 16 frames at 15 per second; S3D at twice the size (its own clips are longer).
_RESNETS = Preprocessing(num_frames=16, fps=15.0, size=112)
_TORCHVISION = {
    "s3d": Preprocessing(num_frames=16, fps=15.0, size=224),
    "swin3d_t": Preprocessing(num_frames=32, fps=15.0, size=224, mean=_MEAN, std=_STD),
    "swin3d_s": Preprocessing(num_frames=32, fps=15.0, size=224, mean=_MEAN, std=_STD),
    "mvit_v2_s": Preprocessing(num_frames=16, fps=7.5, size=224, mean=(0.45,) * 3, std=(0.225,) * 3),
}
# The released code: 32 consecutive frames of videos of about 25 per second, normalised as ImageNet.
_RELEASED = Preprocessing(num_frames=32, fps=25.0, size=112, mean=_MEAN, std=_STD)


def read(path: Path) -> tuple[str, Encoder, str]:
    """Reads weights of torchvision, of the released code, or of a network of torchvision inside something else.

    The keys show which it is. The weights do not tell how clips were prepared: others get torchvision's preprocessing,
    those of mmaction2 its normalisation, which is that of ImageNet.

    Returns:
        "torchvision", "released" or "other", the encoder, and for "other" a sentence about what was found and assumed.

    Raises:
        ValueError: the file has no weights, or weights of an unknown network.
    """
    checkpoint, found = weights.unwrap(weights.read_checkpoint(path))
    kind, name, width, head = weights.recognise(checkpoint)
    if kind == "torchvision":
        entry = checkpoint["state_dict"]
        assert isinstance(entry, dict), "recognised"
        encoder = _torchvision(name, entry)
        if not found:
            return kind, encoder, ""
        if "mmaction2" in found:
            values = encoder.preprocessing.to_json() | {"mean": _RELEASED.mean, "std": _RELEASED.std}
            encoder = Encoder(encoder.backbone, Preprocessing.from_json(values), encoder.card).eval()
        assumed = encoder.preprocessing
        said = (
            f"weights of {name}, {found}; the file does not tell how clips were prepared: assumed {assumed.num_frames} "
            f"frames at {assumed.fps:g} per second, {assumed.size} pixels, normalised by mean {assumed.mean}"
        )
        return "other", encoder, said
    released = MocoEncoder(name, embedding_dim=width, head=head)
    weights.load_released(released, checkpoint)
    return kind, Encoder(released.backbone, _RELEASED, {"backbone": name}).eval(), ""


def supervised(name: str) -> Encoder:
    """torchvision's encoder of an architecture, trained on Kinetics-400 with labels; downloaded once per machine.

    Raises:
        ValueError: torchvision has no such weights, or they cannot be downloaded.
    """
    if name not in weights.TORCHVISION:
        raise ValueError(f"torchvision has no weights of {name}: choose one of {', '.join(weights.TORCHVISION)}")
    from torchvision.models import get_model_weights

    found = get_model_weights(name)["KINETICS400_V1"]
    try:
        return _torchvision(name, found.get_state_dict(progress=False))
    except (OSError, RuntimeError) as error:  # no network, or a file that does not have the hash in its name
        place = f"{torch.hub.get_dir()}/checkpoints/{found.url.rpartition('/')[2]}"
        raise ValueError(f"torchvision's weights cannot be fetched ({error}): copy {found.url} to {place}") from None


def random_initialisation(encoder: Encoder, *, seed: int) -> Encoder:
    """An untrained encoder of the same architecture and preprocessing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash64("random initialisation", seed) % 2**63)
        name, expected = encoder.card["backbone"], encoder.preprocessing
        backbone = build_backbone(name, num_frames=expected.num_frames, size=expected.size)
        return Encoder(backbone, expected, {"backbone": name}).eval()


def torchvision_preprocessing(name: str) -> Preprocessing:
    """How clips were prepared for torchvision's weights of an architecture."""
    return _TORCHVISION.get(name, _RESNETS)


def _torchvision(name: str, state_dict: weights.StateDict) -> Encoder:
    expected = torchvision_preprocessing(name)
    backbone = build_backbone(name, num_frames=expected.num_frames, size=expected.size)
    weights.load_torchvision(backbone, state_dict)
    return Encoder(backbone, expected, {"backbone": name}).eval()
