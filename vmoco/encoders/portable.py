"""An encoder as a program without vmoco: torch.export for Python, ONNX for everything else.

Both take square raw clips, uint8 (B, T, S, S, 3), with the encoder's T and any B and S. They scale and normalise them
and return unit features. The caller crops to a square (`encoder_program.py` does): cropping depends on which side is
shorter, and an exported program cannot branch on that.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vmoco.encoders.encoder import Encoder
from vmoco.encoders.encoder_program import PROGRAM

ONNX = "encoder.onnx"
ONNX_TOLERANCE = 1e-4
"""Largest difference of a unit feature between ONNX Runtime and torch that is accepted."""


class _Program(nn.Module):
    """Features of square clips, as `Encoder.embed` gives them."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        features = self.encoder.backbone(self.encoder.preprocess_square(clips))
        return F.normalize(features, dim=1)


def write_program(encoder: Encoder, folder: Path) -> Path:
    """Writes the torch.export archive, after comparing it with the encoder; returns its path.

    Raises:
        RuntimeError: the program does not give the encoder's features bit for bit.
    """
    program, clips = _Program(encoder).eval(), example_clips(encoder)
    exported = torch.export.export(program, (clips,), dynamic_shapes=_dynamic())
    path = folder / PROGRAM
    torch.export.save(exported, str(path))
    # Checked before anyone can pull it: an archive that loads and computes something else would go unnoticed.
    found = torch.export.load(str(path)).module()(clips)
    if not torch.equal(found, encoder.embed(clips)):
        difference = (found - encoder.embed(clips)).abs().max().item()
        raise RuntimeError(
            f"the exported program differs from the encoder by {difference:.2g}, and must not differ: it is not kept"
        )
    return path


def write_onnx(encoder: Encoder, folder: Path) -> Path:
    """Writes encoder.onnx (input `clips`, output `features`), after comparing it with the encoder; returns its path.

    Raises:
        ValueError: the packages for it are not installed.
        RuntimeError: ONNX Runtime gives other features than the encoder.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it, and its own message is less clear
    except ImportError as error:
        raise ValueError(f"ONNX needs the package {error.name}: pip install 'vmoco[onnx]'") from None
    program, clips = _Program(encoder).eval(), example_clips(encoder)
    path = folder / ONNX
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*axis name", UserWarning)  # height and width share one name on purpose
        torch.onnx.export(
            program,
            (clips,),
            str(path),
            dynamo=True,
            dynamic_shapes=_dynamic(),
            input_names=["clips"],
            output_names=["features"],
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = float(np.abs(session.run(None, {"clips": clips.numpy()})[0] - encoder.embed(clips).numpy()).max())
    if not difference <= ONNX_TOLERANCE:
        raise RuntimeError(
            f"ONNX Runtime differs from the encoder by {difference:.2g}, above {ONNX_TOLERANCE:g}: {ONNX} is not kept"
        )
    return path


def example_clips(encoder: Encoder) -> torch.Tensor:
    """Two square clips of noise, uint8 (2, T, S, S, 3), larger than the encoder's size, so that they are scaled."""
    expected = encoder.preprocessing
    side = expected.size + expected.size // 4 + 1
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, expected.num_frames, side, side, 3), dtype=torch.uint8, generator=generator)


def _dynamic() -> dict[str, dict[int, torch.export.Dim]]:
    side = torch.export.Dim("side", min=2)
    return {"clips": {0: torch.export.Dim("batch", min=1), 2: side, 3: side}}
