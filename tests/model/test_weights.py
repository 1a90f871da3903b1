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
from vmoco.model.weights import load_released, load_torchvision, read_checkpoint, recognise, unwrap

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


class Wrapped(nn.Module):
    """A network inside another module, beside one of its own, as in Lightning."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network
        self.criterion = nn.Linear(2, 3)


@pytest.mark.parametrize("name", ["r2plus1d_18", "s3d"])
def test_networks_are_found_inside_what_wraps_them(name: str) -> None:
    """DDP, torch.compile, Lightning and both: the weights are those of the network alone, and the sentence says it."""
    network = BUILDERS[name]()
    compiled = torch.compile(BUILDERS[name]())
    compiled.load_state_dict({f"_orig_mod.{key}": value for key, value in network.state_dict().items()})
    inside = Wrapped(network)
    both = {f"module.{key}": value for key, value in Wrapped(compiled).state_dict().items()}
    for wrapped, said in (
        (nn.DataParallel(network).state_dict(), "removed module. before each key"),
        (compiled.state_dict(), "removed _orig_mod. in keys"),
        (
            {"state_dict": inside.state_dict(), "epoch": 3, "pytorch-lightning_version": "2.5"},
            "in the entry state_dict; removed model. before each key; left out criterion.weight, criterion.bias",
        ),
        ({"model": network.state_dict(), "epoch": 3}, "in the entry model"),
        (both, "removed _orig_mod. in keys and module.model. before each key; left out module.criterion.weight, "),
    ):
        checkpoint, found = unwrap(wrapped)
        assert found.startswith(said)
        assert recognise(checkpoint) == ("torchvision", name, 0, "")
        tensors = checkpoint["state_dict"]
        assert isinstance(tensors, dict)
        assert tensors.keys() == network.state_dict().keys()
        assert all(torch.equal(tensors[key], value) for key, value in network.state_dict().items())
    assert unwrap(network.state_dict())[1] == ""
    assert unwrap(released("r3d_18")[0])[1] == ""


def test_several_networks_are_refused() -> None:
    """Nobody can say which of them is meant: the sentence names where they are."""
    pair = nn.ModuleDict({"student": BUILDERS["r3d_18"](), "teacher": BUILDERS["r3d_18"]()})
    with pytest.raises(ValueError, match=r"of 2 networks, whose keys begin with student\., teacher\.: save the state"):
        unwrap({"state_dict": pair.state_dict()})


class ConvModule(nn.Module):
    """A convolution and its normalisation under the names of mmcv."""

    def __init__(self, narrow: int, wide: int, kernel: tuple[int, ...], stride: tuple[int, ...], *, relu: bool) -> None:
        super().__init__()
        padding = tuple(size // 2 for size in kernel)
        self.conv = nn.Conv3d(narrow, wide, kernel, stride=stride, padding=padding, bias=False)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm3d(wide)
        self.activate = nn.ReLU() if relu else nn.Identity()

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.activate(self.bn(self.conv(clips)))
        return found


class BasicBlock3d(nn.Module):
    """Two convolutions and a shortcut under the names of mmaction2."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvModule(narrow, wide, (3, 3, 3), (stride,) * 3, relu=True)
        self.conv2 = ConvModule(wide, wide, (3, 3, 3), (1, 1, 1), relu=False)
        self.downsample = ConvModule(narrow, wide, (1, 1, 1), (stride,) * 3, relu=False) if stride > 1 else None

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        shortcut = clips if self.downsample is None else self.downsample(clips)
        return F.relu(self.conv2(self.conv1(clips)) + shortcut)


class Recognizer3D(nn.Module):
    """mmaction2's ResNet3d of depth 18 without pooling, and its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.cls_head = nn.Module(), nn.Module()
        self.backbone.conv1 = ConvModule(3, 64, (3, 7, 7), (1, 2, 2), relu=True)
        for number, (narrow, wide) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), start=1):
            blocks = [BasicBlock3d(narrow, wide, 1 if number == 1 else 2), BasicBlock3d(wide, wide, 1)]
            self.backbone.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.cls_head.fc_cls = nn.Linear(512, 400)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = clips
        for layer in self.backbone.children():
            found = layer(found)
        return found.mean(dim=(2, 3, 4))


FITS = """model = dict(type='Recognizer3D', backbone=dict(type='ResNet3d', depth=18, conv1_kernel=(3, 7, 7),
    conv1_stride_t=1, with_pool1=False, with_pool2=False, temporal_strides=(
        1,
        2,
        2,
        2,
    ), norm_cfg=dict(type='BN3d', requires_grad=True), zero_init_residual=False))"""


def test_mmaction2_weights_give_mmaction2_features() -> None:
    """Where its configuration, in the file, says that layers do what those of r3d_18 do; the classifier is dropped."""
    theirs = with_statistics(Recognizer3D())
    checkpoint, found = unwrap({"meta": {"cfg": FITS}, "state_dict": theirs.state_dict()})
    assert found == (
        "in the entry state_dict; of mmaction2's ResNet3d; removed backbone. before each key; left out "
        "cls_head.fc_cls.weight, cls_head.fc_cls.bias"
    )
    assert recognise(checkpoint) == ("torchvision", "r3d_18", 0, "")
    ours = build_backbone("r3d_18").eval()
    tensors = checkpoint["state_dict"]
    assert isinstance(tensors, dict)
    load_torchvision(ours, tensors)
    with torch.no_grad():
        torch.testing.assert_close(ours(clips()), theirs(clips()))


def test_weights_whose_layers_do_something_else_are_refused() -> None:
    """The sentence says what differs: pooling, strides, eps or depth of mmaction2, its R(2+1)D, and others."""
    state = Recognizer3D().state_dict()
    for text, said in (
        (FITS.replace("with_pool1=False", "with_pool1=True"), "has with_pool1=True: only with with_pool1=False, "),
        (FITS.replace("        2,\n", "        1,\n"), r"has temporal_strides=\(1,1,1,1\): only"),
        (FITS.replace("requires_grad=True)", "requires_grad=True, eps=1e-3)"), "has eps=1e-3: only"),
        ("", "has with_pool1=nothing, with_pool2=nothing, conv1_stride_t=nothing, temporal_strides=nothing: only"),
    ):
        with pytest.raises(ValueError, match=f"mmaction2's ResNet3d, and the configuration in the file {said}"):
            unwrap({"meta": {"cfg": text}, "state_dict": state})
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"mmaction2's R\(2\+1\)D, which pools after its first convolution"):
        unwrap({"state_dict": {"backbone.conv1.conv.conv_s.weight": one, "backbone.conv1.conv.bn_s.weight": one}})
    for key in (
        "s1.pathway0_stem.conv.weight",
        "backbone.s1.pathway0_stem.conv.weight",
        "s1.pathway0_stem.conv_xy.weight",
    ):
        with pytest.raises(ValueError, match=r"of PySlowFast, whose networks keep the number of frames"):
            unwrap({"model_state": {key: one}})
    for key in (
        "model.blocks.1.res_blocks.0.branch2.conv_a.weight",  # PySlowFast's R(2+1)D
        "blocks.1.res_blocks.0.branch2.conv_a.weight",  # PyTorchVideo's own files
        "blocks.1.multipathway_blocks.0.res_blocks.0.branch2.conv_a.weight",  # its SlowFast
    ):
        with pytest.raises(ValueError, match=r"of PyTorchVideo, which also builds the R\(2\+1\)D of PySlowFast"):
            unwrap({"model_state": {key: one}})
    for key in ("backbone.layer1.2.conv1.conv.weight", "backbone.layer1.0.conv3.conv.weight"):
        with pytest.raises(ValueError, match=r"of mmaction2's ResNet3d with more than 18 layers"):
            unwrap({"meta": {"cfg": FITS}, "state_dict": {**state, key: one}})


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
