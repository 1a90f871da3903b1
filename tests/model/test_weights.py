"""Weights under the exact keys of others give, in our networks, the outputs that they give in theirs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import video as torchvision_video

from vmoco.model.backbone import build_backbone
from vmoco.model.moco import MocoEncoder
from vmoco.model.weights import load_released, load_torchvision, read_checkpoint, recognise

BUILDERS = {name: getattr(torchvision_video, name) for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")}


def with_statistics(model: nn.Module) -> nn.Module:
    """The model as if trained: running statistics and affine weights of their own, so that a lost one shows."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def clips() -> torch.Tensor:
    return torch.randn(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))


def features_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What a torchvision model hands to its classifier."""
    seen: list[torch.Tensor] = []
    model.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(inputs)
    return seen[0]


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_torchvision_weights_give_torchvision_features(name: str) -> None:
    """The feature is bit for bit what torchvision's own classifier receives; the classifier is dropped."""
    theirs = with_statistics(BUILDERS[name]())
    ours = build_backbone(name).eval()
    load_torchvision(ours, theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(clips()), features_of(theirs, clips()))


def test_torchvision_s3d_weights_give_torchvision_features() -> None:
    """Before the pooling, because torchvision's S3D takes no clip below 16x224x224."""
    theirs = with_statistics(BUILDERS["s3d"]())
    ours = build_backbone("s3d").eval()
    load_torchvision(ours, theirs.state_dict())
    with torch.no_grad():
        expected = theirs.features(clips()).mean(dim=(2, 3, 4))
        torch.testing.assert_close(ours(clips()), expected)


def released(name: str, *, width: int = 16, mlp: bool = False) -> tuple[dict[str, object], nn.Module]:
    """A checkpoint as the released code writes it, and its query encoder."""
    encoders = {"encoder_q": BUILDERS[name](num_classes=width), "encoder_k": BUILDERS[name](num_classes=width)}
    state: dict[str, torch.Tensor] = {"module.queue": torch.randn(width, 32), "module.queue_ptr": torch.zeros(1)}
    for side, encoder in encoders.items():
        if mlp:
            encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), encoder.fc)
        with_statistics(encoder)
        state |= {f"module.{side}.{key}": tensor for key, tensor in encoder.state_dict().items()}
    return {"epoch": 200, "arch": name, "state_dict": state}, encoders["encoder_q"]


@pytest.mark.parametrize(("name", "mlp"), [("r2plus1d_18", False), ("r3d_18", True)])
def test_released_checkpoint_gives_the_released_embeddings(tmp_path: Path, name: str, *, mlp: bool) -> None:
    """Through a file: keys `module.encoder_q.*`, `fc` as the head; embeddings as from the released encoder."""
    checkpoint, theirs = released(name, mlp=mlp)
    torch.save(checkpoint, tmp_path / "released.pth.tar")
    ours = MocoEncoder(name, embedding_dim=16, head="mlp" if mlp else "linear").eval()
    load_released(ours, read_checkpoint(tmp_path / "released.pth.tar"))
    with torch.no_grad():
        assert torch.equal(ours(clips()), F.normalize(theirs(clips()), dim=1))


def test_key_encoder_and_bare_state_dict_are_taken() -> None:
    """`which` chooses the other encoder; the entry `state_dict` alone will do."""
    checkpoint, _ = released("r3d_18")
    ours = MocoEncoder("r3d_18", embedding_dim=16, head="linear")
    state = checkpoint["state_dict"]
    assert isinstance(state, dict)
    load_released(ours, state, which="key")
    assert torch.equal(ours.head.weight, state["module.encoder_k.fc.weight"])


def test_another_architecture_is_refused_by_its_keys_and_changes_nothing() -> None:
    """The sentence names the first keys that are missing, unknown or of another shape."""
    ours = build_backbone("r3d_18")
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing .*layer1.0.conv1.0.weight.*; unknown .*layer1.0.conv1.0.0.weight"):
        load_torchvision(ours, BUILDERS["r2plus1d_18"]().state_dict())
    with pytest.raises(ValueError, match=r"unknown features\.0\.0\.0\.weight.* and \d+ more: build the architecture"):
        load_torchvision(ours, BUILDERS["s3d"]().state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


def test_another_width_or_head_is_refused() -> None:
    """Shapes are shown side by side; an MLP head is not a linear one."""
    checkpoint, _ = released("r3d_18")
    with pytest.raises(ValueError, match=r"another shape .*head.weight \(16, 512\) where \(128, 512\) is needed"):
        load_released(MocoEncoder("r3d_18", embedding_dim=128, head="linear"), checkpoint)
    with pytest.raises(ValueError, match=r"missing head.0.bias.*; unknown head.bias"):
        load_released(MocoEncoder("r3d_18", embedding_dim=16, head="mlp"), checkpoint)


def test_what_is_no_such_checkpoint_is_refused() -> None:
    """Of torchvision instead of the released code: the sentence shows the keys that it has."""
    encoder = MocoEncoder("r3d_18", embedding_dim=16, head="linear")
    with pytest.raises(ValueError, match=r"no module\.encoder_q\.\*, its first keys are stem\.0\.weight"):
        load_released(encoder, BUILDERS["r3d_18"]().state_dict())
    with pytest.raises(ValueError, match=r"encoder 'both' is not known: give one of query, key"):
        load_released(encoder, {}, which="both")


@pytest.mark.parametrize("name", list(BUILDERS))
def test_weights_are_recognised_by_their_keys(name: str) -> None:
    """Of each of torchvision's networks, with and without its classifier; of the released code, with its head."""
    theirs = BUILDERS[name]().state_dict()
    bare = {key: tensor for key, tensor in theirs.items() if not key.startswith(("fc.", "classifier."))}
    assert recognise(theirs) == recognise(bare) == recognise({"state_dict": theirs}) == ("torchvision", name, 0, "")
    if name != "s3d":
        for mlp in (False, True):
            expected = ("released", name, 16, "mlp" if mlp else "linear")
            assert recognise(released(name, mlp=mlp)[0]) == expected


def test_other_weights_are_not_recognised() -> None:
    """A lost key, a key too many, nothing at all: the sentence shows what keys there are."""
    theirs = BUILDERS["r3d_18"]().state_dict()
    for wrong in ({k: v for k, v in theirs.items() if k != "stem.0.weight"}, theirs | {"more": torch.zeros(1)}, {}):
        with pytest.raises(ValueError, match=r"of no network that is known, their first keys are"):
            recognise(wrong)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    """A pickle that would run something is refused unread, and so is what is no file of torch at all."""
    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pth", "text.pth", "old.pth"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as weights"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="holds a Tensor, a dict of tensors is needed"):
        read_checkpoint(tmp_path / "tensor.pth")
