"""Backbones: their features, their arithmetic and its reason, and the deterministic mode."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torchvision.models import video as torchvision_video

from vmoco.model.backbone import autocast_dtype, build_backbone, require_determinism
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


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU by name only; the parameter says whether it computes in bf16."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    # Emulated bf16 is there on any GPU: who asks for it as well gets yes.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or request.param
    )


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_cpu_computes_in_float32(precision: str) -> None:
    """No autocast, with a reason for the log."""
    dtype, reason = autocast_dtype(precision, CPU)
    assert dtype is None
    assert reason.startswith("fp32 ")


def test_bf16_on_a_cpu_is_refused() -> None:
    """The sentence has the setting, why, and what is allowed."""
    with pytest.raises(ValueError, match=r"^--train\.precision bf16 is not allowed on a CPU, because .*: use auto or"):
        autocast_dtype("bf16", CPU)


@pytest.mark.parametrize("gpu", [True], indirect=True)
@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", None)]
)
@pytest.mark.usefixtures("gpu")
def test_gpu_with_bf16_uses_it(precision: str, expected: torch.dtype | None) -> None:
    """Unless fp32 is asked for."""
    assert autocast_dtype(precision, CUDA)[0] is expected


@pytest.mark.parametrize("gpu", [False], indirect=True)
@pytest.mark.usefixtures("gpu")
def test_gpu_without_bf16_computes_in_float32() -> None:
    """`auto` says which GPU it is; asking for bf16 is refused, although it could be emulated slowly."""
    assert autocast_dtype("auto", CUDA) == (None, "fp32 because a GPU has no bf16 arithmetic")
    with pytest.raises(
        ValueError, match=r"^--train\.precision bf16, but a GPU does not compute in it: use auto or fp32$"
    ):
        autocast_dtype("bf16", CUDA)


@pytest.fixture
def process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The mode belongs to the process: it is turned off again."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("process_as_it_was")
def test_nondeterministic_work_becomes_an_error() -> None:
    """torch refuses from then on, and cuDNN and cuBLAS are asked for the same."""
    torch.backends.cudnn.benchmark = True
    require_determinism("r3d_18", torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    # New memory is not written before it is used, which would cost a pass over every result.
    assert not torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


@pytest.mark.usefixtures("process_as_it_was")
def test_backbone_without_deterministic_gradient_is_refused() -> None:
    """On a GPU: on a CPU it has one."""
    with pytest.raises(
        ValueError, match=r"--train\.deterministic, .* average pooling in --model\.backbone s3d .*: use another"
    ):
        require_determinism("s3d", torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()
    require_determinism("s3d", torch.device("cpu"))
