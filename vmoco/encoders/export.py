"""An encoder in the format of another library, as a folder that needs no vmoco.

    torchvision   NETWORK.safetensors: a state dict with torchvision's keys, without the classifier
    huggingface   what `transformers.AutoModel.from_pretrained` loads: weights, configuration, and the code of the model
    onnx          encoder.onnx
    program       program.pt2, the archive of torch.export, and encoder_program.py, which checks its hash and opens it

Each has a README.md, the model card. A folder appears under its name when it is complete and its features are those of
the encoder: of torchvision, huggingface and program bit for bit, of onnx within 1e-4. The last two are the files of the
registered encoder, with their recorded hash, where it has them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torchvision
from safetensors.torch import load_file, save
from torch import nn

from vmoco import storage
from vmoco.encoders import encoder_program, model_card, promotion, registry, video_network
from vmoco.encoders.encoder import Encoder
from vmoco.encoders.encoder_program import CARD, PROGRAM
from vmoco.encoders.package import EncoderFiles
from vmoco.encoders.portable import ONNX, example_clips, write_onnx
from vmoco.encoders.video_network import VideoNetwork
from vmoco.model.weights import TORCHVISION

Format = Literal["torchvision", "huggingface", "onnx", "program"]

CONFIG, HUGGINGFACE_WEIGHTS = "config.json", "model.safetensors"
MODELING = "modeling_vmoco.py"
_PREFIX = "encoder."
"""Of the keys in model.safetensors: where `VmocoModel` holds the network."""


@dataclass(frozen=True)
class Exported:
    """An exported encoder."""

    path: Path
    """Its folder, or the file in it that counts; a writer gives it relative to the folder."""
    about: str
    """What it is."""
    usage: tuple[str, ...]
    """Lines of Python that load it."""


def export(uri: str, *, to: Format, folder: str, show: Callable[[str], None] = print) -> Exported:
    """Writes an encoder in the format of another library.

    Args:
        uri: of the encoder, as for `load_encoder`.
        to: format.
        folder: new or empty folder; its parents are made.
        show: prints a line.

    Raises:
        ValueError: there is no such encoder, the folder is not empty or cannot be written, or the format has no place
            for this network.
        RuntimeError: the written files do not give the features of the encoder.
    """
    if to not in get_args(Format):
        raise ValueError(f"format {to!r} is not known: give one of {', '.join(get_args(Format))}")
    place = _free(folder)
    files = EncoderFiles(uri)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as temporary:
        staged = Path(temporary, "export")
        staged.mkdir()
        made = _WRITERS[to](files, staged, show)
        (staged / model_card.README).write_text(_readme(_with_scores(files.card, uri), to, made))
        staged.replace(place)  # over an empty folder too: nothing half-written is ever seen
    # The page says FOLDER, because an export is moved and copied; the caller knows where it is now.
    usage = tuple(line.replace("FOLDER", str(place)) for line in made.usage)
    return Exported(place / made.path, made.about, usage)


def _free(folder: str) -> Path:
    """The absolute path of a folder to which an export may be written."""
    if "://" in folder:
        raise ValueError(f"--out {folder} is a URI: give a folder of this machine, and copy the export from there")
    place = Path(folder).expanduser().absolute()
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        what = "a file" if place.is_file() else "not empty"
        raise ValueError(f"--out {folder} is {what}: give a new folder, because an export replaces nothing")
    storage.check_writable(str(place.parent))
    return place


def _torchvision(files: EncoderFiles, staged: Path, show: Callable[[str], None]) -> Exported:
    encoder = files.encoder()
    name = str(files.card["backbone"])
    if name not in TORCHVISION:
        raise ValueError(
            f"--to torchvision is not possible for {name}, because torchvision has no such network: give --to "
            f"huggingface, onnx or program, or pretrain one of {', '.join(TORCHVISION)}"
        )
    state = {key: tensor.contiguous() for key, tensor in encoder.backbone.trunk.state_dict().items()}
    about = {"format": "pt", "network": name, "preprocessing": json.dumps(files.card["preprocessing"])}
    file = f"{name}.safetensors"
    (staged / file).write_bytes(save(state, metadata=about))
    model: Any = getattr(torchvision.models.video, name)().eval()
    (classifier,) = {key.partition(".")[0] for key in model.state_dict().keys() - state.keys()}
    setattr(model, classifier, nn.Identity())
    without = f"model.{classifier} = torch.nn.Identity()"
    pixels = encoder.preprocess(example_clips(encoder))
    if name == "s3d":
        # Its pooling over 2x7x7 refuses clips below 16x224x224.
        maps = encoder.backbone.feature_maps(pixels[:1]).shape[2:]
        window = (min(maps[0], 2), min(maps[1], 7), min(maps[2], 7))
        model.avgpool = nn.AvgPool3d(window, stride=1)
        without += f"; model.avgpool = torch.nn.AvgPool3d({window}, stride=1)"
    model.load_state_dict(load_file(staged / file))
    _compare(lambda: model(pixels), encoder, "torchvision's network")
    usage = (
        "import safetensors.torch, torch, torchvision",
        f"model = torchvision.models.video.{name}().eval()",
        without,
        f'model.load_state_dict(safetensors.torch.load_file("FOLDER/{file}"))',
    )
    about_it = f"a state dict of torchvision's {name} without {classifier}; {encoder.feature_dim} features"
    return Exported(Path(file), about_it, usage)


def _huggingface(files: EncoderFiles, staged: Path, show: Callable[[str], None]) -> Exported:
    encoder = files.encoder()
    name, expected = str(files.card["backbone"]), encoder.preprocessing
    if name not in video_network.NETWORKS:
        raise ValueError(
            f"--to huggingface is not possible for {name}: its code knows {', '.join(video_network.NETWORKS)}. Give "
            "--to onnx or program"
        )
    trunk = encoder.backbone.trunk.state_dict()
    weights = {f"{_PREFIX}trunk.{key}": tensor.contiguous() for key, tensor in trunk.items()}
    (staged / HUGGINGFACE_WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
    network = VideoNetwork(
        name, size=expected.size, mean=expected.mean, std=expected.std, standardise=expected.standardise
    )
    read = load_file(staged / HUGGINGFACE_WEIGHTS)
    network.load_state_dict({key.removeprefix(_PREFIX): tensor for key, tensor in read.items()})
    clips = example_clips(encoder)
    _compare(lambda: network.eval()(clips)[1], encoder, Path(video_network.__file__).name)
    module = Path(MODELING).stem
    config = {
        "architectures": ["VmocoModel"],
        "auto_map": {"AutoConfig": f"{module}.VmocoConfig", "AutoModel": f"{module}.VmocoModel"},
        "model_type": "vmoco",
        "network": name,
        "hidden_size": encoder.feature_dim,
        "num_frames": expected.num_frames,
        "fps": expected.fps,
        "image_size": expected.size,
        "image_mean": expected.mean,
        "image_std": expected.std,
        "standardise": expected.standardise,
    }
    (staged / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for source in (Path(video_network.__file__), Path(video_network.__file__).with_name(MODELING)):
        shutil.copyfile(source, staged / source.name)
    usage = (
        "import transformers",
        'model = transformers.AutoModel.from_pretrained("FOLDER", trust_remote_code=True)',
        f"features = model.embed(clips)     # a tensor of raw frames, uint8 (B, {expected.num_frames}, H, W, 3), RGB",
    )
    return Exported(Path(), f"a model for transformers; {encoder.feature_dim} features", usage)


def _onnx(files: EncoderFiles, staged: Path, show: Callable[[str], None]) -> Exported:
    if ONNX in files:
        (staged / ONNX).write_bytes(files.read(ONNX))
    else:
        show(f"writing {ONNX} and comparing it with the encoder: this takes up to a few minutes")
        write_onnx(files.encoder(), staged)
    frames = files.card["preprocessing"]["num_frames"]
    usage = (
        "import onnxruntime",
        f'session = onnxruntime.InferenceSession("FOLDER/{ONNX}")',
        f'features = session.run(None, {{"clips": clips}})[0]     # numpy, uint8 (B, {frames}, S, S, 3), RGB, square',
    )
    about = f"input `clips`, output `features`, {files.card['feature_dim']} numbers of unit length"
    return Exported(Path(ONNX), about, usage)


def _program(files: EncoderFiles, staged: Path, show: Callable[[str], None]) -> Exported:
    (staged / PROGRAM).write_bytes(files.read(PROGRAM))
    storage.write_atomic(str(staged / CARD), json.dumps(files.card, indent=1, sort_keys=True).encode())
    loader = Path(encoder_program.__file__)
    shutil.copyfile(loader, staged / loader.name)
    frames = files.card["preprocessing"]["num_frames"]
    usage = (
        f'import pathlib, sys; sys.path.append("FOLDER"); import {loader.stem}',
        f'program = {loader.stem}.EncoderProgram(pathlib.Path("FOLDER"))',
        f"features = program.predict(clips)     # numpy, uint8 (B, {frames}, H, W, 3), RGB",
    )
    about = f"an archive of torch.export; {files.card['feature_dim']} features of unit length; needs torch and numpy"
    return Exported(Path(PROGRAM), about, usage)


_WRITERS: Mapping[str, Callable[[EncoderFiles, Path, Callable[[str], None]], Exported]] = {
    "torchvision": _torchvision,
    "huggingface": _huggingface,
    "onnx": _onnx,
    "program": _program,
}


@torch.inference_mode()
def _compare(features: Callable[[], torch.Tensor], encoder: Encoder, what: str) -> None:
    """Refuses an export that computes something else; nobody would notice it later."""
    found, expected = features(), encoder(example_clips(encoder))
    if not torch.equal(found, expected):
        raise RuntimeError(
            f"{what} differs from the encoder by {(found - expected).abs().max().item():.2g}, and must not differ: "
            "nothing was exported"
        )


_FRONT_MATTER = """\
---
library_name: transformers
tags:
- video
- self-supervised
- videomoco
---

"""
_NOTES = {
    "torchvision": "Features are the network's output for normalised pixels, float (B, 3, T, H, W). Prepare frames as "
    "in its training, and scale them with antialiasing.",
    "huggingface": "`model(clips).pooler_output` are the same features before they are scaled to unit length, with "
    "gradients for fine-tuning, and `last_hidden_state` is what the last convolution sees at each time and place. The "
    f"model prepares raw frames itself, so there is no processor. `trust_remote_code=True` runs `{MODELING}` and "
    "`video_network.py`, which are vmoco's, under the licence Apache-2.0. They need torch, torchvision, transformers "
    "and safetensors.",
    "onnx": "Clips are square: cut frames to their middle square first. The program scales and normalises them.",
    "program": "Opening an archive of torch.export can run code: `encoder_program.py` opens it only if it has the hash "
    f"in `{CARD}`. The program scales and normalises frames itself.",
}


def _with_scores(card: Mapping[str, Any], uri: str) -> Mapping[str, Any]:
    """The card with the scores that a registered version has by now; its own are those of its registration."""
    if not uri.startswith("models:/"):
        return card
    found = {score.protocol: score.row() for score in promotion.scores_of(registry.find_version(uri))}
    return {**card, "scores": {**(card.get("scores") or {}), **found}}


def _readme(card: Mapping[str, Any], to: Format, made: Exported) -> str:
    """The model card, which says how to load what is beside it."""
    code = "\n".join(f"    {line}" for line in made.usage)
    text = model_card.filled(f"{_NOTES[to]} {model_card.preprocessing(card)}")
    page = model_card.page(card, usage=f"## How to use it\n\n{code}\n\n{text}", complete=False)
    return f"{_FRONT_MATTER if to == 'huggingface' else ''}{page}"
