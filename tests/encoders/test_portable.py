"""The exported programs compute what the encoder computes, whatever the batch and the size of the frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.made import clips, encoder_of
from vmoco.encoders import portable


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("r3d_nano", 32),
        ("swin3d_nano", 40),
        *(pytest.param(name, 40, marks=pytest.mark.slow) for name in ("s3d", "mvit_v2_s")),
    ],
)
def test_torch_export_is_bitwise_the_encoder(tmp_path: Path, name: str, size: int) -> None:
    """The difference is 0, also for one clip and for frames of the exact size, larger and smaller ones."""
    encoder = encoder_of(name, size=size)
    archive = torch.export.load(str(portable.write_program(encoder, tmp_path))).module()
    for count, side in ((1, size), (3, 2 * size), (2, size // 2)):
        frames = clips(count, height=side, width=side)
        assert torch.equal(archive(frames), encoder.embed(frames)), (count, side)


def test_a_program_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written file is compared, not the program in memory."""
    encoder = encoder_of()
    monkeypatch.setattr(encoder, "embed", lambda source: torch.zeros(len(source), encoder.feature_dim))
    with pytest.raises(RuntimeError, match="the exported program differs from the encoder by"):
        portable.write_program(encoder, tmp_path)


@pytest.mark.parametrize("name", ["r2plus1d_nano", pytest.param("swin3d_nano", marks=pytest.mark.slow)])
def test_onnx_is_numerically_the_encoder(tmp_path: Path, name: str) -> None:
    """ONNX Runtime agrees within 1e-4, for other batches and sizes than those of the export."""
    import onnxruntime

    encoder = encoder_of(name)
    session = onnxruntime.InferenceSession(str(portable.write_onnx(encoder, tmp_path)))
    for count, side in ((1, 32), (3, 64)):
        frames = clips(count, height=side, width=side)
        found = session.run(None, {"clips": frames.numpy()})[0]
        np.testing.assert_allclose(found, encoder.embed(frames).numpy(), atol=portable.ONNX_TOLERANCE)
