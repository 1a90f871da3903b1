"""Every backbone turns a clip into a feature of the width it says."""

from __future__ import annotations

import pytest
import torch

from vmoco.model.backbone import build_backbone
from vmoco.model.moco import MocoEncoder, running_statistics_kept


@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18", "mc3_18", "r3d_nano", "r2plus1d_nano"])
def test_backbone_gives_features(name: str) -> None:
    """(B, 3, T, H, W) becomes (B, feature_dim)."""
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 8, 32, 32)).shape == (1, backbone.feature_dim)


def test_unknown_backbone_lists_the_known_ones() -> None:
    """The message names what is allowed."""
    with pytest.raises(ValueError, match=r"'r3d'.*r3d_18"):
        build_backbone("r3d")


def test_embeddings_are_unit_rows() -> None:
    """Embeddings lie on the unit sphere."""
    encoder = MocoEncoder("r3d_nano", embedding_dim=16, head="mlp")
    norms = encoder(torch.randn(4, 3, 8, 32, 32)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4))


def test_kept_statistics_do_not_change_but_normalise_by_the_batch() -> None:
    """Inside, the output is that of training mode; the running statistics and their count stay as they were."""
    encoder = MocoEncoder("r3d_nano", embedding_dim=16, head="linear").train()
    clips = torch.randn(4, 3, 8, 32, 32)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    with running_statistics_kept(encoder):
        kept = encoder(clips)
    assert all(torch.equal(before[name], buffer) for name, buffer in encoder.named_buffers())
    assert torch.equal(kept, encoder(clips))
    assert not all(torch.equal(before[name], buffer) for name, buffer in encoder.named_buffers())
