"""An export gives the features of its encoder in the library that it is for, by the lines that the job prints."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.dataset import make_data_set
from tests.made import clips, encoder_of, save_checkpoint, settings_for
from vmoco import tracking
from vmoco.architectures import ARCHITECTURES
from vmoco.encoders import export, package, portable, promotion, registry
from vmoco.encoders.encoder import Encoder, Preprocessing
from vmoco.encoders.export import Exported
from vmoco.encoders.promotion import Score
from vmoco.train import publish

ROOT = Path(__file__).parents[2]
LINEAGE = {
    "step": 7,
    "run_id": "a run",
    "settings_hash": "5e77",
    "data": {"manifest_hash": "da7a", "uri": "/data", "counts": None, "licence": "mine, CC0"},
}


def write(folder: Path, encoder: Encoder) -> Path:
    """The encoder as a registered one is stored, with running statistics and affine weights as if it was trained."""
    generator = torch.Generator().manual_seed(5)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    folder.mkdir()
    name = encoder.card["backbone"]
    package.write_folder(folder, encoder.backbone, name, encoder.preprocessing, lineage=LINEAGE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("stored") / "encoder", encoder_of())


@pytest.fixture
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders are written without their program, which takes seconds for a large network."""
    monkeypatch.setattr(package, "write_program", lambda encoder, folder: None)


@pytest.fixture
def clean_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the printed lines add to the path of modules, and import from there, is forgotten after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "encoder_program", raising=False)


def run(made: Exported, **names: Any) -> dict[str, Any]:
    """The variables that the printed lines of Python leave."""
    exec("\n".join(made.usage), names)
    return names


def text(made: Exported) -> str:
    place = made.path if made.path.is_dir() else made.path.parent
    return (place / "README.md").read_text()


TORCHVISION = [
    ("mc3_18", 32, 8),
    pytest.param("r3d_18", 32, 8, marks=pytest.mark.slow),
    pytest.param("r2plus1d_18", 32, 8, marks=pytest.mark.slow),
    ("s3d", 40, 8),
    pytest.param("s3d", 40, 40, marks=pytest.mark.slow),
    pytest.param("s3d", 256, 16, marks=pytest.mark.slow),
    pytest.param("swin3d_t", 224, 16, marks=pytest.mark.slow),
    pytest.param("mvit_v2_s", 224, 16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "size", "num_frames"), TORCHVISION)
def test_torchvision_loads_the_state_dict(
    name: str, size: int, num_frames: int, tmp_path: Path, no_program: None
) -> None:
    """The keys are those of torchvision's network without its classifier; features are equal bit for bit."""
    stored = write(tmp_path / "encoder", encoder_of(name, size=size, num_frames=num_frames))
    made = export.export(str(stored), to="torchvision", folder=str(tmp_path / "out"))
    assert len(made.usage) == 4, "imports, network, classifier, weights"
    model = run(made)["model"]
    theirs = getattr(__import__("torchvision").models.video, name)().state_dict()
    state = load_file(made.path)
    assert {key.partition(".")[0] for key in theirs.keys() - state.keys()} == {
        "classifier" if name == "s3d" else "fc" if ARCHITECTURES[name].batch_norm else "head"
    }
    assert state.keys() <= theirs.keys()
    encoder = package.load_encoder(str(stored))
    frames = clips(2, num_frames=num_frames, height=size + 8, width=size + 30)
    with torch.inference_mode():
        found, expected = model(encoder.preprocess(frames)), encoder(frames)
        assert (found - expected).abs().max() <= (1e-4 if name == "mvit_v2_s" else 0)


def test_a_network_that_torchvision_does_not_have_is_refused(folder: Path, tmp_path: Path) -> None:
    """The message names the formats that are left; nothing is written."""
    with pytest.raises(ValueError, match=r"not possible for r3d_nano, because torchvision has no such network: give"):
        export.export(str(folder), to="torchvision", folder=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def module_of(path: Path) -> ModuleType:
    """A module of a folder without __init__.py, as a part of a package, as transformers imports it."""
    name = f"exported_{len(sys.modules)}"
    package = ModuleType(name)
    package.__path__ = [str(path.parent)]
    sys.modules[name] = package
    return importlib.import_module(f"{name}.{path.stem}")


def rebuilt(place: Path) -> torch.nn.Module:
    """The network of a Hugging Face export, by its own code and configuration, without transformers."""
    config = json.loads((place / "config.json").read_text())
    network: torch.nn.Module = module_of(place / "video_network.py").VideoNetwork(
        config["network"],
        num_frames=config["num_frames"],
        size=config["image_size"],
        mean=config["image_mean"],
        std=config["image_std"],
        standardise=config["standardise"],
    )
    weights = load_file(place / "model.safetensors")
    network.load_state_dict({key.removeprefix("encoder."): tensor for key, tensor in weights.items()})
    return network.eval()


@pytest.mark.parametrize(
    ("name", "standardise"),
    [
        ("r3d_nano", True),
        ("r2plus1d_nano", False),
        ("s3d", False),
        ("swin3d_nano", False),
        pytest.param("mvit_v2_s", False, marks=pytest.mark.slow),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("r3d_18", "mc3_18", "r2plus1d_18")),
    ],
)
def test_the_code_beside_hugging_face_weights_gives_the_features(
    name: str, standardise: bool, tmp_path: Path, no_program: None
) -> None:
    """Bit for bit, with the maps before pooling, for raw frames of any size, and for prepared ones."""
    made_of = encoder_of(name, size=40)
    expected = Preprocessing.from_json(made_of.preprocessing.to_json() | {"standardise": standardise})
    stored = write(tmp_path / "encoder", Encoder(made_of.backbone, expected, {"backbone": name}))
    made = export.export(str(stored), to="huggingface", folder=str(tmp_path / "out"))
    assert {path.name for path in made.path.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_vmoco.py",
        "transformer.py",
        "video_network.py",
    }
    network, encoder = rebuilt(made.path), package.load_encoder(str(stored))
    for frames in (clips(2, height=70, width=50), clips(1, height=30, width=44)):
        with torch.inference_mode():
            maps, features = network(frames)
            assert torch.equal(features, encoder(frames))
            assert torch.equal(maps, encoder.feature_maps(frames))
            assert torch.equal(network(encoder.preprocess(frames))[1], features)


def test_exported_code_refuses_what_the_encoder_refuses(tmp_path: Path, no_program: None) -> None:
    """Frames of another shape or type, clips below five frames of an S3D, and a network that it does not know."""
    stored = write(tmp_path / "encoder", encoder_of("s3d", size=40))
    network = rebuilt(export.export(str(stored), to="huggingface", folder=str(tmp_path / "out")).path)
    for wrong, said in (
        (clips()[..., :2], r"frames are torch.uint8 \(3, 8, 40, 48, 2\): give uint8 RGB, of shape"),
        (clips().int(), r"frames are torch.int32 \(3, 8, 40, 48, 3\): give uint8 RGB"),
        (clips().float(), r"clips are torch.float32 \(3, 8, 40, 48, 3\): give uint8 .*, or normalised float"),
        (clips(num_frames=4), r"clips have 4 frames: give at least 5, which an s3d needs"),
    ):
        with pytest.raises(ValueError, match=said):
            network(wrong)
    with pytest.raises(ValueError, match=r"network 'c3d' is not known: give one of r3d_18, "):
        module_of(tmp_path / "out" / "video_network.py").VideoNetwork(
            "c3d", num_frames=8, size=8, mean=[0] * 3, std=[1] * 3
        )


def test_code_that_computes_something_else_is_not_exported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copied code repeats that of vmoco: a difference of the two is found before anything is written."""
    monkeypatch.setattr(Encoder, "forward", lambda self, frames: torch.zeros(len(frames), self.feature_dim))
    with pytest.raises(RuntimeError, match=r"video_network.py differs from the encoder by .*: nothing was exported"):
        export.export(str(folder), to="huggingface", folder=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_onnx_runtime_loads_the_file(folder: Path, tmp_path: Path) -> None:
    """A stored file is copied; where there is none, it is made. Features differ by 1e-4 at most."""
    shown: list[str] = []
    made = export.export(str(folder), to="onnx", folder=str(tmp_path / "out"), show=shown.append)
    assert shown == ["writing encoder.onnx and comparing it with the encoder: this takes up to a few minutes"]
    square = clips(height=64, width=64)
    features = run(made, clips=square.numpy())["features"]
    expected = package.load_encoder(str(folder)).embed(square).numpy()
    np.testing.assert_allclose(features, expected, atol=portable.ONNX_TOLERANCE)

    card = json.loads((folder / package.CARD).read_text())
    with_file = tmp_path / "with-onnx"
    with_file.mkdir()
    for path in folder.iterdir():
        (with_file / path.name).write_bytes(path.read_bytes())
    (with_file / "encoder.onnx").write_bytes(made.path.read_bytes())
    card["files"]["encoder.onnx"] = package.storage.file_sha256(str(made.path))
    (with_file / package.CARD).write_text(json.dumps(card))
    again = export.export(str(with_file), to="onnx", folder=str(tmp_path / "copied"), show=shown.append)
    assert again.path.read_bytes() == made.path.read_bytes()
    assert len(shown) == 1, "it was not made anew"
    (with_file / "encoder.onnx").write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"was changed: its encoder.onnx does not have the hash in its encoder.json"):
        export.export(str(with_file), to="onnx", folder=str(tmp_path / "never"))


def test_the_program_is_that_of_the_encoder(folder: Path, tmp_path: Path, clean_imports: None) -> None:
    """The same bytes, with the code that checks their hash and opens them: features are equal bit for bit."""
    made = export.export(str(folder), to="program", folder=str(tmp_path / "out"))
    assert made.path.read_bytes() == (folder / "program.pt2").read_bytes()
    frames = clips(height=70, width=44)
    found = run(made, clips=frames.numpy())
    assert Path(found["encoder_program"].__file__).parent == tmp_path / "out"
    assert np.array_equal(found["features"], package.load_encoder(str(folder)).embed(frames).numpy())


def test_the_page_says_where_it_comes_from_and_how_to_load_it(folder: Path, tmp_path: Path) -> None:
    """It has the lines of Python without this machine's path, origin, licence, and preprocessing.

    It names no file that the export does not have.
    """
    made = export.export(str(folder), to="huggingface", folder=str(tmp_path / "out"))
    page = text(made)
    assert page.startswith("---\nlibrary_name: transformers\n")
    for said in (
        'from_pretrained("FOLDER", trust_remote_code=True)',
        "7 steps",
        "mine, CC0",
        "about 25 frames per second",
    ):
        assert said in page
    for absent in (str(tmp_path), "settings.json", "videos.parquet"):
        assert absent not in page


def test_only_a_new_folder_is_written(folder: Path, tmp_path: Path) -> None:
    """Also an empty one; a folder with files, a file and a URI are refused before the encoder is read."""
    (tmp_path / "empty").mkdir()
    made = export.export(str(folder), to="program", folder=str(tmp_path / "empty"))
    assert made.path == tmp_path / "empty" / "program.pt2"
    for place, said in (
        (tmp_path / "empty", "is not empty: give a new folder, because an export replaces nothing"),
        (made.path, "is a file: give a new folder"),
        ("s3://bucket/out", "--out s3://bucket/out is a URI: give a folder of this machine"),
    ):
        with pytest.raises(ValueError, match=said):
            export.export("no encoder", to="program", folder=str(place))
    with pytest.raises(ValueError, match=r"no encoder is not an encoder of vmoco: it has no encoder.json"):
        export.export("no encoder", to="program", folder=str(tmp_path / "new"))
    with pytest.raises(ValueError, match=r"format 'tf' is not known: give one of torchvision, huggingface, onnx, "):
        export.export(str(folder), to="tf", folder=str(tmp_path / "new"))  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


@pytest.mark.slow
def test_the_job_exports_a_registered_encoder(tmp_path: Path, tracker_home: Path) -> None:
    """By its name, with the scores that it got after its registration; the printed lines load the export."""
    manifest = make_data_set(tmp_path / "data")
    save_checkpoint(tmp_path / "checkpoint", manifest)
    publish.write_encoder(tmp_path / "checkpoint", tmp_path / "encoder", data=manifest)
    run_id = tracking.create_run(settings_for(manifest), tags={})
    registry.attach(tmp_path / "encoder", run_id=run_id)
    registry.register(run_id, name="tested", alias="candidate")
    promotion.record("models:/tested@candidate", [Score("knn", "c11b5", 0.625, 0.5, 0.75, "chance 25.0%")])
    command = [sys.executable, "jobs/export.py", "models:/tested@candidate", "--to", "program"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'out' / 'program.pt2'}: an archive of torch.export; 128 features")
    assert "| knn | 62.5% | 50.0% to 75.0% | chance 25.0% | `c11b5` |" in (tmp_path / "out" / "README.md").read_text()
    frames = clips()
    np.save(tmp_path / "clips.npy", frames.numpy())
    code = "\n".join(
        ["import numpy as np", f"clips = np.load({str(tmp_path / 'clips.npy')!r})", *(line.strip() for line in lines)]
    )
    code += f"\nnp.save({str(tmp_path / 'features.npy')!r}, features)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=300)
    expected = package.load_encoder("models:/tested@candidate").embed(frames).numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), expected)
