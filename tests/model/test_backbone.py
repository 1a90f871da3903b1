"""Every backbone turns a clip into a feature of the width it says."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import video as torchvision_video

from vmoco.model.backbone import build_backbone
from vmoco.model.moco import MocoEncoder, running_statistics_kept


@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18", "mc3_18", "s3d", "r3d_nano", "r2plus1d_nano"])
def test_backbone_gives_features(name: str) -> None:
    """(B, 3, T, H, W) becomes (B, feature_dim)."""
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 8, 32, 32)).shape == (1, backbone.feature_dim)


def test_s3d_pools_as_torchvision_does() -> None:
    """Where torchvision takes a clip, here with two windows over time, the feature is what it classifies."""
    torch.manual_seed(0)
    theirs = torchvision_video.s3d().eval()
    ours = build_backbone("s3d").eval()
    ours.trunk.load_state_dict({n: t for n, t in theirs.state_dict().items() if not n.startswith("classifier")})
    classifier = theirs.classifier[1]
    clips = torch.randn(1, 3, 24, 224, 224)
    with torch.no_grad():
        logits = ours(clips) @ classifier.weight.flatten(1).T + classifier.bias
        torch.testing.assert_close(logits, theirs(clips), rtol=1e-4, atol=1e-5)


def test_s3d_takes_the_smallest_clip_that_its_settings_allow() -> None:
    """5 frames of 17 pixels leave one position; 4 frames, or 16 pixels, leave none."""
    backbone = build_backbone("s3d").eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 5, 17, 17)).shape == (1, 1024)
        for shape in ((4, 17, 17), (5, 16, 16)):
            with pytest.raises(RuntimeError, match="too small"):
                backbone(torch.randn(1, 3, *shape))


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
