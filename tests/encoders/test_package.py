"""A loaded encoder gives the features of the exported one, and a changed one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.dataset import make_data_set
from tests.made import TINY, clips, save_checkpoint
from vmoco.data.manifest import Manifest
from vmoco.encoders import model_card, package
from vmoco.storage import file_sha256
from vmoco.train import publish
from vmoco.train.state import TrainState


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("data"), num_held_out=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> tuple[Path, TrainState]:
    """An encoder's folder, and the state that it was taken from."""
    place = tmp_path_factory.mktemp("written")
    state = save_checkpoint(place / "checkpoint", manifest)
    publish.write_encoder(place / "checkpoint", place / "encoder", data=manifest, data_licence="mine, CC0")
    return place / "encoder", state


@pytest.fixture
def folder(written: tuple[Path, TrainState], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(written[0], tmp_path / "encoder"))


def test_features_are_those_of_the_query_encoder(written: tuple[Path, TrainState]) -> None:
    """Bit for bit, with the same preprocessing: weights and running statistics are those of the query encoder."""
    encoder = package.load_encoder(str(written[0]))
    backbone = written[1].moco.query.backbone.eval()
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(backbone(encoder.preprocess(clips())), dim=1)
    assert torch.equal(encoder.embed(clips()), expected)


def test_the_normalisation_of_the_run_travels_with_it(manifest: Manifest, tmp_path: Path) -> None:
    """A run that normalised each clip by itself gives an encoder to which a flatter, lighter copy is the same clip."""
    augment = TINY.augment.model_copy(update={"standardise": True})
    settings = TINY.model_copy(update={"augment": augment})
    state = TrainState(settings, manifest_hash=manifest.hash, device=torch.device("cpu"))
    (tmp_path / "checkpoint").mkdir()
    state.save(tmp_path / "checkpoint")
    publish.write_encoder(tmp_path / "checkpoint", tmp_path / "encoder", data=manifest)
    encoder = package.load_encoder(str(tmp_path / "encoder"))
    lighter = encoder.preprocess(clips() // 2 + 60)
    torch.testing.assert_close(lighter, encoder.preprocess(clips()), rtol=0, atol=0.03)
    model_card.write(tmp_path, encoder.card, histories={})
    page = " ".join((tmp_path / model_card.README).read_text().split())
    assert "normalised so that each clip has mean 0 and deviation 1" in page


def test_its_files_are_read_by_name(written: tuple[Path, TrainState], folder: Path) -> None:
    """Those that the card lists, with the recorded hash; others are refused, also if they are in the folder."""
    files = package.EncoderFiles(str(folder))
    assert "videos.parquet" in files
    assert files.read("videos.parquet") == (written[0] / "videos.parquet").read_bytes()
    (folder / "encoder.onnx").write_bytes(b"from somewhere")
    assert "encoder.onnx" not in files
    with pytest.raises(ValueError, match=r"has no encoder.onnx: its encoder.json does not list it"):
        files.read("encoder.onnx")
    (folder / "videos.parquet").write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"was changed: its videos.parquet does not have the hash in its encoder.json"):
        files.read("videos.parquet")


def test_the_card_says_where_it_comes_from(written: tuple[Path, TrainState], manifest: Manifest) -> None:
    """It has data set with hash, counts and licence; run, step, frame rate, versions, commit and hashes."""
    card = json.loads((written[0] / package.CARD).read_text())
    assert card["data"] == {
        "manifest_hash": manifest.hash,
        "uri": manifest.uri,
        "counts": manifest.counts,
        "licence": "mine, CC0",
    }
    assert (card["run_id"], card["step"]) == ("a run", 0)
    assert card["preprocessing"]["fps"] == 25.0
    assert {"vmoco", "torch", "torchvision", "safetensors"} <= set(card["versions"])
    assert "git_commit" in card
    others = {path.name for path in written[0].iterdir()} - {package.CARD}
    assert card["files"] == {name: file_sha256(str(written[0] / name)) for name in others}
    assert others == {"encoder.safetensors", "settings.json", "videos.parquet", "program.pt2"}


def test_the_card_says_which_weights_the_run_began_with(
    written: tuple[Path, TrainState], manifest: Manifest, tmp_path: Path
) -> None:
    """They are in encoder.json and in the model card; after random weights neither mentions any."""
    model = TINY.model.model_copy(update={"init": "/runs/trunk/step-00000700"})
    state = TrainState(
        TINY.model_copy(update={"model": model}), manifest_hash=manifest.hash, device=torch.device("cpu")
    )
    (tmp_path / "checkpoint").mkdir()
    state.save(tmp_path / "checkpoint")
    card = publish.write_encoder(tmp_path / "checkpoint", tmp_path, data=manifest)
    assert card["began_from"] == "/runs/trunk/step-00000700"
    model_card.write(tmp_path, card, histories={})
    text = (tmp_path / model_card.README).read_text()
    assert "began with the weights of `/runs/trunk/step-00000700`" in text
    assert "began_from" not in json.loads((written[0] / package.CARD).read_text())


def test_the_commit_is_that_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit has 40 hex digits, and a mark if files were changed; VMOCO_COMMIT overrides it."""
    commit = package.git_commit()
    if commit is not None:  # else the sources are not a checkout
        assert len(commit.removesuffix("+changes")) == 40
    monkeypatch.setenv("VMOCO_COMMIT", "abc")
    assert package.git_commit() == "abc"


def test_the_videos_travel_with_it(written: tuple[Path, TrainState], manifest: Manifest) -> None:
    """The list has one row per video, sorted, with whether the video was held out."""
    table = pq.read_table(written[0] / package.VIDEOS)
    assert table["video_id"].to_pylist() == [f"video-{video:03d}" for video in range(12)]
    assert table["held_out"].to_pylist() == [False] * 9 + [True] * 3


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty"])
def test_changed_weights_are_refused(folder: Path, how: str) -> None:
    """Weights with one changed bit, half of the file, or an empty file are refused."""
    path = folder / package.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"flipped": content, "truncated": content[: len(content) // 2], "empty": b""}[how])
    with pytest.raises(ValueError, match=r"is damaged or was changed"):
        package.load_encoder(str(folder))


def test_what_is_no_encoder_is_said(folder: Path, tmp_path: Path) -> None:
    """No folder, no card, no weights, a card that is cut off, and one of another version."""
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=r"is not an encoder of vmoco: it has no encoder.json"):
            package.load_encoder(str(place))
    (folder / package.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"has no encoder.safetensors"):
        package.load_encoder(str(folder))
    (folder / package.CARD).write_text('{"version": 1}')
    with pytest.raises(ValueError, match=r"has format version 1, and this vmoco reads version 2: use the vmoco"):
        package.load_encoder(str(folder))
    (folder / package.CARD).write_text('{"version": ')
    with pytest.raises(ValueError, match=r"its encoder.json is not JSON"):
        package.load_encoder(str(folder))
