"""Runs, kept checkpoints and foreign weights become registered encoders; it is known which of them saw a video."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import video as torchvision_video

from tests.dataset import make_data_set
from tests.made import TINY, clips, tracked_run
from vmoco.data.manifest import Manifest
from vmoco.encoders import promotion, registry
from vmoco.encoders.package import load_encoder
from vmoco.evaluate.score import scored_clips
from vmoco.job_settings import RegisterSettings
from vmoco.train.publish import publish_file, publish_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("data"), num_held_out=4)


@pytest.fixture(scope="module")
def other_manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("other"), num_videos=6)


def job(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"jobs/{name}.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, check=False)


def test_any_kept_checkpoint_of_a_run_becomes_an_encoder(
    manifest: Manifest, tracker_home: Path, tmp_path: Path
) -> None:
    """By run name and step, or the last one; it is scored on held-out videos. A wrong step lists the kept ones."""
    run_id = tracked_run(tmp_path, manifest, steps=(10, 20))
    said: list[str] = []
    first = publish_run("a-run", RegisterSettings(name="tested"), step=10, show=said.append)
    last = publish_run(run_id, RegisterSettings(name="tested", score=False))
    encoders = [load_encoder(f"models:/tested/{registered.version}") for registered in (first, last)]
    assert [encoder.card["step"] for encoder in encoders] == [10, 20]
    assert not torch.equal(encoders[0].embed(clips()), encoders[1].embed(clips()))
    scored, unscored = (registry.find_version(f"models:/tested/{each.version}") for each in (first, last))
    (score,) = promotion.scores_of(scored)
    assert score.protocol == "label-free"
    assert f"{score.value:.1%}" in said[0]
    assert promotion.scores_of(unscored) == []
    card = Path(scored.source, "README.md").read_text()
    assert f"| label-free | {score.value:.1%} |" in card
    with pytest.raises(ValueError, match=r"has no checkpoint of step 15: it has kept those of step 10, 20"):
        publish_run("a-run", RegisterSettings(name="tested"), step=15)
    with pytest.raises(ValueError, match=r"run 'none' is not in .*the newest there are a-run"):
        publish_run("none", RegisterSettings(name="tested"))


def test_a_score_of_training_is_not_measured_again(manifest: Manifest, tracker_home: Path, tmp_path: Path) -> None:
    """A score that the run measured is registered with the encoder; a checkpoint without one is scored the same way."""
    known = promotion.Score("label-free", "its own clips", 0.123, 0.1, 0.2, "chance 1 %")
    tracked_run(tmp_path, manifest, steps=(10, 20), scores={10: known})
    said: list[str] = []
    for step in (10, 20):
        publish_run("a-run", RegisterSettings(name="tested"), step=step, show=said.append)
    versions = [registry.find_version(f"models:/tested/{number}") for number in (1, 2)]
    (first,), (second,) = map(promotion.scores_of, versions)
    assert first == known
    assert "12.3%" in said[0]
    assert second.evaluation_set == scored_clips(manifest, max_videos=TINY.evaluation.max_videos)[1]
    assert "| label-free | 12.3% |" in Path(versions[0].source, "README.md").read_text()


def test_a_checkpoint_that_is_gone_or_changed_is_said(manifest: Manifest, tracker_home: Path, tmp_path: Path) -> None:
    """Replaced files and missing files give a message, and nothing is registered."""
    tracked_run(tmp_path, manifest, steps=(10, 20))
    record = tmp_path / "a-run" / "step-00000010" / "state.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="is not the one that the run tracked"):
        publish_run("a-run", RegisterSettings(name="tested"), step=10)
    (tmp_path / "a-run" / "step-00000020" / "state.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"step-00000020 has no state.safetensors, although the run lists it: .* also kept 10"
    ):
        publish_run("a-run", RegisterSettings(name="tested"))
    assert registry.versions() == []


def test_which_encoders_saw_a_video(
    manifest: Manifest, other_manifest: Manifest, tracker_home: Path, tmp_path: Path
) -> None:
    """With two data sets and an import, the answers are: trained on it, held it out, and unknown."""
    for name, data in (("one", manifest), ("two", other_manifest)):
        tracked_run(tmp_path, data, name=name)
        publish_run(name, RegisterSettings(name=name, score=False))
    torch.save(torchvision_video.r3d_18().state_dict(), tmp_path / "theirs.pth")
    publish_file(tmp_path / "theirs.pth", RegisterSettings(name="theirs"))
    found = registry.encoders_that_saw("video-002")
    assert [(each.uri, each.held_out) for each in found.sightings] == [
        ("models:/one/1", False),
        ("models:/two/1", False),
    ]
    assert found.unknown == ("models:/theirs/1",)
    held_out = registry.encoders_that_saw("video-011")
    assert [(each.uri, each.held_out) for each in held_out.sightings] == [("models:/one/1", True)]
    assert registry.encoders_that_saw("none").sightings == ()
    printed = job("registry", "saw", "video-011").stdout
    assert f"models:/one/1  candidate  held out from in data {manifest.hash}" in printed
    assert "unknown for models:/theirs/1: they have no list of videos (imported weights)" in printed


def features_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The input of a torchvision ResNet's classifier."""
    model.fc = nn.Identity()
    with torch.no_grad():
        return torch.nn.functional.normalize(model.eval()(inputs), dim=1)


def test_weights_of_torchvision_by_one_command(tracker_home: Path, tmp_path: Path) -> None:
    """A file with torchvision's exact keys gives torchvision's features, with its preprocessing."""
    theirs = torchvision_video.r3d_18()
    torch.save(theirs.state_dict(), tmp_path / "r3d_18-b3b3357e.pth")
    ended = job("register", str(tmp_path / "r3d_18-b3b3357e.pth"), "--name", "kinetics")
    assert ended.stdout.endswith("registered version 1 as models:/kinetics@candidate\n"), ended.stderr
    encoder = load_encoder("models:/kinetics@candidate")
    frames = clips(num_frames=4, height=112, width=112)
    assert torch.equal(encoder.embed(frames), features_of(theirs, encoder.preprocess(frames)))
    assert (encoder.preprocessing.num_frames, encoder.preprocessing.fps) == (16, 15.0)
    assert encoder.card["imported"]["format"] == "torchvision"


def test_weights_of_the_released_code(tracker_home: Path, tmp_path: Path) -> None:
    """A checkpoint with the released code's exact keys gives the query encoder, normalised as for ImageNet."""
    query, key = (torchvision_video.r3d_18(num_classes=16) for _ in range(2))
    tensors = {"module.queue": torch.randn(16, 32), "module.queue_ptr": torch.zeros(1)}
    for side, encoder in (("encoder_q", query), ("encoder_k", key)):
        tensors |= {f"module.{side}.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"epoch": 200, "arch": "r3d_18", "state_dict": tensors}, tmp_path / "checkpoint.pth.tar")
    publish_file(tmp_path / "checkpoint.pth.tar", RegisterSettings(name="released", data_licence="ask them"))
    pulled = load_encoder("models:/released@candidate")
    frames = clips(num_frames=4, height=112, width=112)
    assert torch.equal(pulled.embed(frames), features_of(query, pulled.preprocess(frames)))
    assert pulled.preprocessing.mean == (0.485, 0.456, 0.406)
    assert pulled.card["data"]["licence"] == "ask them"


def test_weights_inside_something_else(tracker_home: Path, tmp_path: Path) -> None:
    """Of DDP: the features of the network alone. The card says what was removed, and claims no data and no licence."""
    theirs = torchvision_video.r3d_18()
    torch.save({"model": nn.DataParallel(theirs).state_dict(), "epoch": 9}, tmp_path / "mine.pth")
    lines: list[str] = []
    publish_file(tmp_path / "mine.pth", RegisterSettings(name="mine"), show=lines.append)
    pulled = load_encoder("models:/mine@candidate")
    frames = clips(num_frames=4, height=112, width=112)
    assert torch.equal(pulled.embed(frames), features_of(theirs, pulled.preprocess(frames)))
    assert lines == [pulled.card["imported"]["found"]]
    assert lines[0].startswith("weights of r3d_18, in the entry model; removed module. before each key; the file does")
    assert pulled.card["imported"]["format"] == "other"
    assert "not recorded" in pulled.card["data"]["licence"]
    assert "Kinetics" not in pulled.card["data"]["description"]
    page = Path(registry.versions()[0].source, "README.md").read_text()
    assert lines[0] in page


def test_a_file_that_is_no_such_weights_is_said(tracker_home: Path, tmp_path: Path) -> None:
    """Weights of another network, or a flag that does not apply: an error of one line, and nothing is registered."""
    torch.save(torchvision_video.mvit_v1_b().state_dict(), tmp_path / "mvit.pth")
    with pytest.raises(ValueError, match=r"of no network that is known, their first keys are .*torchvision's r3d_18"):
        publish_file(tmp_path / "mvit.pth", RegisterSettings(name="other"))
    ended = job("register", str(tmp_path / "mvit.pth"), "--name", "other", "--step", "3")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: --step 3 chooses a checkpoint of a run")
