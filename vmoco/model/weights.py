"""Loads weights of other projects: torchvision's video models, and checkpoints of the released VideoMoCo code.

    backbone = build_backbone("r2plus1d_18")
    load_torchvision(backbone, torchvision.models.video.R2Plus1D_18_Weights.KINETICS400_V1.get_state_dict())

    encoder = MocoEncoder("r2plus1d_18", embedding_dim=128, head="linear")
    load_released(encoder, read_checkpoint(Path("r2d_200.pth.tar")))

Others save a network of torchvision inside something: DDP, torch.compile, Lightning. `unwrap` finds it there.

Every key must fit: a missing or unknown key, or another shape, is refused by name, and nothing is loaded then. Only the
classifier of a torchvision model is dropped. The weights do not include the normalisation of the pixels. Those of
torchvision expect the same as ours, those of the released code the mean and deviation of ImageNet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmoco.model.backbone import Backbone, build_backbone
from vmoco.model.moco import MocoEncoder

ENCODERS = {"query": "module.encoder_q.", "key": "module.encoder_k."}
"""Prefixes of the two encoders in a checkpoint of the released code, which saved its DDP wrapper."""

TORCHVISION = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
"""Backbones for which torchvision has weights."""

# torchvision names its classifier `fc` in the ResNets and `classifier` in S3D; the released code's `fc` is its head.
_CLASSIFIERS = ("fc.", "classifier.")

StateDict = Mapping[str, torch.Tensor]


def load_torchvision(backbone: Backbone, state_dict: StateDict) -> None:
    """Loads the state dict of torchvision's r3d_18, mc3_18, r2plus1d_18 or s3d; its classifier is dropped.

    Args:
        backbone: of the same architecture; changed in place.
        state_dict: keys as torchvision names them, with or without the classifier.

    Raises:
        ValueError: it is of another architecture.
    """
    kept = {name: tensor for name, tensor in state_dict.items() if not name.startswith(_CLASSIFIERS)}
    _load(backbone.trunk, kept, "the state dict does not fit this backbone")


def load_released(encoder: MocoEncoder, checkpoint: Mapping[str, object], *, which: str = "query") -> None:
    """Loads an encoder and its projection from a checkpoint of the released VideoMoCo code.

    Args:
        encoder: a torchvision ResNet of the same architecture, embedding width and head; changed in place.
        checkpoint: what `read_checkpoint` returned: a dict with an entry `state_dict`, or that entry itself.
        which: "query" or "key".

    Raises:
        ValueError: the checkpoint has no such encoder, or one of another architecture, width or head.
    """
    entry = checkpoint.get("state_dict", checkpoint)
    if which not in ENCODERS:
        raise ValueError(f"encoder {which!r} is not known: give one of {', '.join(ENCODERS)}")
    prefix = ENCODERS[which]
    named = entry if isinstance(entry, Mapping) else {}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(
            f"the checkpoint has no {prefix}*, its first keys are {_first(named)}: "
            "give a checkpoint of the released VideoMoCo code"
        )
    renamed = {
        f"head.{name.removeprefix('fc.')}" if name.startswith("fc.") else f"backbone.trunk.{name}": tensor
        for name, tensor in found.items()
    }
    _load(encoder, renamed, "the checkpoint does not fit this encoder")


_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model")
"""Entries of a checkpoint that hold weights: of Lightning and mmaction2, torch's tutorials, PySlowFast, torchvision."""
_FIRST = ("stem.0.weight", "features.0.0.0.weight")
"""The first key of torchvision's ResNets, and of its S3D: what stands before it is where the network lies."""
_COMPILED = "_orig_mod."


def unwrap(checkpoint: Mapping[str, Any]) -> tuple[dict[str, object], str]:
    """The weights of a checkpoint without what DDP, torch.compile, Lightning or a module around them add to the keys.

    Args:
        checkpoint: what `read_checkpoint` returned.

    Returns:
        The checkpoint for `recognise`, and a sentence about what was removed; empty if nothing was.

    Raises:
        ValueError: there are several networks, or one of another project whose layers compute something else.
    """
    container = next((name for name in _CONTAINERS if isinstance(checkpoint.get(name), Mapping)), "")
    entry = checkpoint[container] if container else checkpoint
    named = {name: value for name, value in entry.items() if isinstance(value, torch.Tensor)}
    if not named:
        return dict(entry), ""
    tensors = {name.replace(_COMPILED, ""): tensor for name, tensor in named.items()}
    if any(name.startswith(tuple(ENCODERS.values())) for name in tensors):
        return {"state_dict": tensors}, ""
    _refuse_pyslowfast(tensors)
    translated, project = _from_mmaction2(tensors, checkpoint)
    prefixes = sorted({name.removesuffix(first) for name in translated for first in _FIRST if _ends(name, first)})
    if len(prefixes) > 1:
        raise ValueError(
            f"the weights are of {len(prefixes)} networks, whose keys begin with "
            f"{', '.join(prefix or repr('') for prefix in prefixes)}: save the state dict of one of them in a file"
        )
    prefix = prefixes[0] if prefixes else ""
    kept = {name.removeprefix(prefix): value for name, value in translated.items() if name.startswith(prefix)}
    removed = f"{prefix} before each key" if prefix else ""
    if tensors.keys() != named.keys():
        removed = " and ".join(filter(None, [f"{_COMPILED} in keys", removed]))
    outside = [name for name in translated if not name.startswith(prefix)]
    said = [
        f"in the entry {container}" if container else "",
        project,
        f"removed {removed}" if removed else "",
        f"left out {_first(outside)}" if outside else "",
    ]
    return {"state_dict": kept}, "; ".join(filter(None, said))


def _ends(name: str, with_what: str) -> bool:
    return name == with_what or name.endswith(f".{with_what}")


_PYTORCHVIDEO = re.compile(r"(^|\.)res_blocks\.\d+\.branch2\.conv_a\.weight$")


def _refuse_pyslowfast(tensors: StateDict) -> None:
    """Refuses what no layer of ours corresponds to: PySlowFast's own networks, and those that PyTorchVideo builds.

    Raises:
        ValueError: the weights are of one of them.
    """
    if any("s1.pathway0_stem." in name for name in tensors):  # `conv` in its ResNets, `conv_xy` in X3D
        raise ValueError(
            "the weights are of PySlowFast, whose networks keep the number of frames from stage to stage, and whose "
            f"blocks are others: no layer corresponds to one of {', '.join(TORCHVISION)}, which are needed"
        )
    if any(_PYTORCHVIDEO.search(name) for name in tensors):
        raise ValueError(
            "the weights are of PyTorchVideo, which also builds the R(2+1)D of PySlowFast. Its blocks have three "
            "convolutions and its R(2+1)D has 50 layers or more, where r2plus1d_18 and r3d_18 have two and 18: no "
            f"layer corresponds to one of {', '.join(TORCHVISION)}, which are needed"
        )


# Key of a layer of mmaction2's ResNet3d: a ConvModule with the parts `conv` and `bn`, where torchvision has 0 and 1.
_MMACTION2 = re.compile(r"^(.*?)(?:conv1|(layer\d\.\d+)\.(conv1|conv2|downsample))\.(conv|bn)\.(\w+)$")
_MMACTION2_SETTINGS = {
    "with_pool1": "False",
    "with_pool2": "False",
    "conv1_stride_t": "1",
    "temporal_strides": "(1,2,2,2)",
}
"""With these a ResNet3d of depth 18 computes what r3d_18 does. No tensor tells of them."""
_DEEPER = ("layer1.2.conv1.conv.weight", "layer1.0.conv3.conv.weight")
"""Keys of a third block in the first stage (34 layers), and of a third convolution in a block (50 and more)."""


def _from_mmaction2(tensors: StateDict, checkpoint: Mapping[str, Any]) -> tuple[StateDict, str]:
    """Weights of mmaction2 under torchvision's keys, and that they are of mmaction2; other weights as they are.

    Raises:
        ValueError: they are of a network that computes something else than r3d_18.
    """
    if any(_ends(name, "conv1.conv.conv_s.weight") for name in tensors):
        raise ValueError(
            "the weights are of mmaction2's R(2+1)D, which pools after its first convolution and has other widths "
            f"between space and time: they do not fit r2plus1d_18; {', '.join(TORCHVISION)} of torchvision are known"
        )
    if not any(_ends(name, "conv1.conv.weight") for name in tensors):
        return tensors, ""
    if any(_ends(name, deeper) for name in tensors for deeper in _DEEPER):
        raise ValueError(
            "the weights are of mmaction2's ResNet3d with more than 18 layers, which no network here has: "
            f"{', '.join(TORCHVISION)} of torchvision are known, and ResNet3d of depth 18"
        )
    about = checkpoint.get("meta")
    written = [about.get(name) for name in ("cfg", "config")] if isinstance(about, Mapping) else []
    text = re.sub(r"\s", "", next((each for each in written if isinstance(each, str)), "")).replace(",)", ")")
    found = {name: re.search(rf"\b{name}=(\([^)]*\)|[^,)]*)", text) for name in _MMACTION2_SETTINGS}
    values = {name: match[1] if match else "nothing" for name, match in found.items()}
    wrong = [f"{name}={value}" for name, value in values.items() if value != _MMACTION2_SETTINGS[name]]
    epsilon = re.search(r"norm_cfg=dict\([^)]*eps=([^,)]*)", text)
    if epsilon and float(epsilon[1]) != 1e-5:
        wrong.append(f"eps={epsilon[1]}")
    if wrong:
        needed = ", ".join(f"{name}={value}" for name, value in _MMACTION2_SETTINGS.items())
        raise ValueError(
            f"the weights are of mmaction2's ResNet3d, and the configuration in the file has {', '.join(wrong)}: only "
            f"with {needed} and the usual eps does it compute what torchvision's r3d_18 does"
        )
    renamed = {}
    for name, tensor in tensors.items():
        if match := _MMACTION2.match(name):
            before, block, layer, part, rest = match.groups()
            name = f"{before}{f'{block}.{layer}' if block else 'stem'}.{'01'[part == 'bn']}.{rest}"
        renamed[name] = tensor
    return renamed, "of mmaction2's ResNet3d"


def recognise(checkpoint: Mapping[str, object]) -> tuple[str, str, int, str]:
    """Recognises the project and the network of weights by their keys and shapes.

    Args:
        checkpoint: what `read_checkpoint` returned.

    Returns:
        Format ("torchvision" or "released"), name of the backbone, embedding width (0 for torchvision) and head
        ("linear" or "mlp"; empty for torchvision).

    Raises:
        ValueError: they are of an unknown network.
    """
    entry = checkpoint.get("state_dict", checkpoint)
    named = entry if isinstance(entry, Mapping) else {}
    shapes = {name: tuple(value.shape) for name, value in named.items() if isinstance(value, torch.Tensor)}
    prefix = ENCODERS["query"]
    released = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    kept = {name: shape for name, shape in (released or shapes).items() if not name.startswith(_CLASSIFIERS)}
    for name in TORCHVISION:
        with torch.device("meta"):  # only names and shapes are needed
            expected = build_backbone(name).trunk.state_dict()
        needed = {key for key in expected if not key.endswith("num_batches_tracked")}
        if needed <= set(kept) <= set(expected) and all(kept[key] == tuple(expected[key].shape) for key in needed):
            if not released:
                return "torchvision", name, 0, ""
            head = "mlp" if "fc.2.weight" in released else "linear"
            width = released.get("fc.2.weight" if head == "mlp" else "fc.weight")
            if width is not None:
                return "released", name, width[0], head
    raise ValueError(
        f"the weights are of no network that is known, their first keys are {_first(named)}: torchvision's "
        f"{', '.join(TORCHVISION)}, or a checkpoint of the released VideoMoCo code of one of its ResNets, is needed"
    )


def read_checkpoint(path: Path) -> dict[str, object]:
    """Reads a checkpoint of another project onto the CPU, without running code from it.

    Raises:
        ValueError: it is not a file of torch, or has more than tensors and plain values.
    """
    # weights_only: a pickle can run code, and this file comes from another project.
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch raises what its unpickler, its zip reader or the file system raise
        raise ValueError(f"{path} cannot be read as weights ({str(error).splitlines()[0]})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, a dict of tensors is needed")
    return checkpoint


def _load(module: nn.Module, tensors: StateDict, what: str) -> None:
    """Loads every tensor, or raises an error message with the first keys that do not fit."""
    expected = module.state_dict()
    # Old files lack the count of batches, which has no effect on the normalisation.
    needed = {name for name in expected if not name.endswith("num_batches_tracked")}
    shapes = [
        f"{name} {tuple(tensor.shape)} where {tuple(expected[name].shape)} is needed"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = {
        "missing": sorted(needed - set(tensors)),
        "unknown": sorted(set(tensors) - set(expected)),
        "of another shape": shapes,
    }
    found = [f"{kind} {_first(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{what}: {'; '.join(found)}: build the architecture that the weights were trained with")
    module.load_state_dict(tensors, strict=False)


def _first(names: Mapping[str, object] | list[str]) -> str:
    shown = list(names)[:3]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (", ".join(shown) or "none") + more
