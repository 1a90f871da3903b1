"""An encoder that is pulled gives the features of the one that was registered, and a changed one is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dataset import make_data_set
from vmoco import export, registry, tracking
from vmoco.data.augment import PIXEL_MEAN, PIXEL_STD
from vmoco.data.manifest import Manifest
from vmoco.presets import PRESETS
from vmoco.train.state import TrainState

SETTINGS = PRESETS["tiny"][1]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_data_set(tmp_path / "data")


@pytest.fixture
def state(manifest: Manifest) -> TrainState:
    return TrainState(SETTINGS, manifest_hash=manifest.hash, device=torch.device("cpu"))


@pytest.fixture
def exported(tmp_path: Path, manifest: Manifest, state: TrainState) -> Path:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    state.save(checkpoint, run_id="a run")
    export.write_encoder(checkpoint, tmp_path / "encoder", manifest=manifest)
    return tmp_path / "encoder"


def clips() -> torch.Tensor:
    return torch.randint(0, 256, (3, 8, 40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_features_are_those_of_the_query_encoder(exported: Path, state: TrainState) -> None:
    """Bit for bit, at the same preprocessing: weights and running statistics are the query encoder's."""
    encoder = export.load_encoder(str(exported))
    backbone = state.moco.query.backbone.eval()
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(backbone(encoder.preprocess(clips())), dim=1)
    assert torch.equal(encoder.embed(clips()), expected)
    assert encoder.embed(clips()).shape == (3, encoder.feature_dim)


def test_preprocessing_is_a_centre_crop_and_kinetics_normalisation(exported: Path) -> None:
    """Where no scaling is needed, against plain numpy: the middle square of each frame, (pixel / 255 - mean) / std."""
    encoder = export.load_encoder(str(exported))
    frames = clips()[:, :, 4:36, :, :]  # 32 high, as the encoder wants; 48 wide
    found = encoder.preprocess(frames).numpy()
    square = frames.numpy()[:, :, :, 8:40].astype(np.float64) / 255
    expected = ((square - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)).transpose(0, 4, 1, 2, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, 8, 40, 48, 3), torch.zeros(8, 40, 48, 3, dtype=torch.uint8)], ids=["float", "4-D"]
)
def test_other_clips_are_refused(exported: Path, wrong: torch.Tensor) -> None:
    """The sentence says what came and what is needed."""
    with pytest.raises(ValueError, match=r"frames are torch.* uint8 \(clips, frames, height, width, 3\)"):
        export.load_encoder(str(exported)).embed(wrong)


def test_changed_weights_are_refused(exported: Path) -> None:
    """One byte of the weights, or no weights at all."""
    path = exported / export.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged or was changed"):
        export.load_encoder(str(exported))
    path.unlink()
    with pytest.raises(ValueError, match=r"has no encoder.safetensors"):
        export.load_encoder(str(exported))


def test_the_card_says_where_it_comes_from(exported: Path, manifest: Manifest) -> None:
    """Data set with its hash and counts, run, step, preprocessing with frames per second, versions."""
    card = json.loads((exported / export.CARD).read_text())
    assert card["data"] == {"manifest_hash": manifest.hash, "uri": manifest.uri, "counts": manifest.counts}
    assert (card["run_id"], card["step"]) == ("a run", 0)
    assert card["preprocessing"]["fps"] == 25.0
    assert set(card["versions"]) == {"vmoco", "torch"}


def test_encoders_are_pulled_by_alias_and_version(exported: Path, vmoco_home: Path) -> None:
    """A second version takes the alias over, the first stays under its number; both give the exported features.

    An unknown name, and an unknown alias, list what there is.
    """
    with pytest.raises(ValueError, match=r"nothing is registered there yet"):
        export.load_encoder("models:/tested@candidate")
    run_id = tracking.create_run(SETTINGS, tags={})
    registry.attach(exported, run_id=run_id)
    for version in ("1", "2"):
        registered = registry.register(run_id, name="tested", alias="candidate")
        assert (registered.version, registered.uri) == (version, "models:/tested@candidate")
    expected = export.load_encoder(str(exported)).embed(clips())
    for uri in ("models:/tested@candidate", "models:/tested/1", f"runs:/{run_id}/encoder"):
        assert torch.equal(export.load_encoder(uri).embed(clips()), expected)
    with pytest.raises(ValueError, match=r"there are tested \(candidate\)"):
        export.load_encoder("models:/tested@champion")
    code = (
        "import sys, vmoco; vmoco.load_encoder('models:/tested@candidate'); "
        "assert not {'ray', 'av'} & set(sys.modules), 'a pull needs neither'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
