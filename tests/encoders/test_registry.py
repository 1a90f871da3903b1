"""A registered encoder is pulled by name, by MLflow without vmoco too, and nothing that was changed is opened."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dataset import make_data_set
from tests.environments import light_environment
from tests.made import clips, save_checkpoint, settings_for
from tests.tracking_server import TrackingServer
from vmoco import storage, tracking
from vmoco.data.manifest import Manifest
from vmoco.encoders import package, registry
from vmoco.train import publish


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    place = tmp_path_factory.mktemp("written")
    save_checkpoint(place / "checkpoint", manifest)
    publish.write_encoder(place / "checkpoint", place / "encoder", data=manifest)
    return place / "encoder"


def register(folder: Path, manifest: Manifest, name: str = "tested") -> tuple[str, registry.Registered]:
    run_id = tracking.create_run(settings_for(manifest), tags={})
    registry.attach(folder, run_id=run_id)
    return run_id, registry.register(run_id, name=name, alias="candidate")


def stored(name: str = "tested") -> Path:
    """Folder in which MLflow keeps the files of the candidate."""
    client = tracking.client()
    return Path(client.get_model_version_by_alias(name, "candidate").source)


def test_encoders_are_pulled_by_alias_and_version(folder: Path, manifest: Manifest, tracker_home: Path) -> None:
    """A second version gets the alias, the first keeps its number; both give the exported features.

    An unknown name, and an unknown alias, list what there is.
    """
    with pytest.raises(ValueError, match=r"nothing is registered there yet"):
        package.load_encoder("models:/tested@candidate")
    run_id, first = register(folder, manifest)
    second = registry.register(run_id, name="tested", alias="staging")
    assert (first.version, second.version, second.uri) == ("1", "2", "models:/tested@staging")
    assert registry.find_version("models:/tested@candidate").version == 2, "every new version is the candidate"
    expected = package.load_encoder(str(folder)).embed(clips())
    for uri in ("models:/tested@candidate", "models:/tested/1", f"runs:/{run_id}/encoder"):
        assert torch.equal(package.load_encoder(uri).embed(clips()), expected)
    with pytest.raises(ValueError, match=r"there are tested \(candidate, staging\)"):
        package.load_encoder("models:/tested@champion")
    with pytest.raises(ValueError, match=r"cannot be fetched .*"):
        package.load_encoder("runs:/0123456789abcdef0123456789abcdef/encoder")
    code = (
        "import sys, vmoco; vmoco.load_encoder('models:/tested@candidate'); "
        "assert not {'ray', 'av', 'sklearn'} & set(sys.modules), 'a pull needs none of them'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_the_champion_is_not_given_away(folder: Path, manifest: Manifest, tracker_home: Path) -> None:
    """Registration refuses the alias and says which command sets it."""
    with pytest.raises(
        ValueError, match=r"alias 'champion' cannot be set when an encoder is registered.*jobs/registry.py promote"
    ):
        registry.register("no run", name="tested", alias="champion")


def test_a_changed_registered_encoder_is_refused(folder: Path, manifest: Manifest, tracker_home: Path) -> None:
    """Also if weights and card were changed together, because the registry's database records the card's hash."""
    register(folder, manifest)
    place = stored()
    (place / package.WEIGHTS).write_bytes(b"other weights")
    card = json.loads((place / package.CARD).read_text())
    card["files"][package.WEIGHTS] = storage.file_sha256(str(place / package.WEIGHTS))
    (place / package.CARD).write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"its encoder.json is not the one that was registered"):
        package.load_encoder("models:/tested@candidate")
    (place / package.CARD).unlink()
    with pytest.raises(ValueError, match=r"models:/tested@candidate cannot be fetched"):
        package.load_encoder("models:/tested@candidate")


def test_lists_are_read_page_by_page(
    folder: Path, manifest: Manifest, tracker_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two entries a page, it finds all five names, all four versions, and each encoder that saw a video."""
    monkeypatch.setattr(registry, "_PAGE", 2)
    run_id, _ = register(folder, manifest, "a")
    for name in ("a", "a", "a", "b", "c", "d", "e"):
        registry.register(run_id, name=name, alias="candidate")
    found = [f"{version.name}/{version.version}" for version in registry.versions()]
    assert found == ["a/4", "a/3", "a/2", "a/1", "b/1", "c/1", "d/1", "e/1"]
    video = manifest.table["video_id"][0].as_py()
    assert {seen.uri for seen in registry.encoders_that_saw(video).sightings} == {f"models:/{each}" for each in found}
    with pytest.raises(ValueError, match=r"there is a, b, c, d, e$"):
        registry.find_model("none")


def test_more_names_than_one_page_are_all_listed(tracker_home: Path) -> None:
    """The registry answers with 100 names at most, and here there are 101."""
    for number in range(101):
        tracking.client().create_registered_model(f"encoder-{number:03}")
    with pytest.raises(ValueError, match=r"encoder-000, .*encoder-099, encoder-100$"):
        registry.find_model("none")


@pytest.fixture
def pulled(
    folder: Path, manifest: Manifest, tmp_path: Path, vmoco_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TrackingServer]:
    """A real server with one registered encoder; temporary files of this process go to `tmp_path / "tmp"`."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "server").mkdir()
    with TrackingServer(tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        register(folder, manifest)
        yield server


def test_pulled_encoders_are_cached(
    pulled: TrackingServer, folder: Path, tmp_path: Path, vmoco_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first load leaves no temporary file, later loads download nothing, and a changed file is downloaded again.

    An entry of the cache that was changed is never opened, and a bound below the weights only costs another download.
    """
    expected = package.load_encoder(str(folder)).embed(clips())
    downloads: list[str] = []
    download = registry._download
    monkeypatch.setattr(registry, "_download", lambda at, name, sha: downloads.append(name) or download(at, name, sha))

    def load() -> list[str]:
        downloads.clear()
        assert torch.equal(package.load_encoder("models:/tested@candidate").embed(clips()), expected)
        return list(downloads)

    assert load() == [package.CARD, package.WEIGHTS]
    assert list((tmp_path / "tmp").rglob("*")) == []
    assert load() == []
    weights = storage.file_sha256(str(folder / package.WEIGHTS))
    entry = vmoco_home / "encoders" / weights[:2] / weights
    entry.write_bytes(entry.read_bytes()[:-1] + b"x")
    assert load() == [package.WEIGHTS]
    assert load() == [package.WEIGHTS], "the entry was removed, so it is fetched once more and kept"
    assert load() == []
    entry.unlink()
    monkeypatch.setenv("VMOCO_ENCODER_CACHE_GIB", str(1000 / 2**30))
    assert load() == [package.WEIGHTS]
    assert not entry.exists()


def test_a_version_holds_a_model_card_with_plots(folder: Path, manifest: Manifest, tracker_home: Path) -> None:
    """The card is Markdown with origin, use, data and licence, and has a plot of each tracked metric."""
    run_id = tracking.create_run(settings_for(manifest), tags={})
    spool = tracking.spool(tracking.tracking_uri(), run_id)
    for step in range(4):
        spool.points({"loss": 4.0 - step, "score/retrieval": 0.2 * step}, step=step)
    assert spool.close() == ""
    copied = Path(shutil.copytree(folder, tracker_home / "copy"))
    registry.attach(copied, run_id=run_id)
    registry.register(run_id, name="tested", alias="candidate")
    text = (stored() / "README.md").read_text()
    for said in ("12 videos", manifest.hash, "Licence of the videos: not recorded", "loss 1, score/retrieval 0.6"):
        assert said in text
    for name in ("loss", "scores"):
        assert f"(plots/{name}.png)" in text
        assert (stored() / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


PULL = """
import json, sys
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("models:/tested@candidate")
clips = np.load(sys.argv[1])
np.save(sys.argv[2], model.predict(clips))
assert not {"vmoco", "ray", "torchvision"} & set(sys.modules), "torch and MLflow are enough"
folder, answers = sys.argv[3:]
served = folder + "/serving_input_example.json"
mlflow.models.predict(folder, input_path=served, content_type="json", output_path=answers, env_manager="local")
found = np.array(json.load(open(answers))["predictions"], dtype=np.float32)
np.testing.assert_allclose(found, model.predict(model.input_example), atol=1e-6)
try:
    model.predict(clips[:, :4])
except Exception as error:
    print("refused", error)
"""


@pytest.mark.timeout(300)
def test_mlflow_alone_gives_the_same_features(
    folder: Path, manifest: Manifest, tracker_home: Path, tmp_path: Path
) -> None:
    """With torch and MLflow, but without vmoco and Ray, raw clips give the same features bit for bit.

    The version has a signature and an input example, and MLflow's own server takes the example as JSON.
    """
    register(folder, manifest)
    python = light_environment(tmp_path / "environment", "torch", "mlflow", without=("ray", "vmoco", "torchvision"))
    frames = clips()
    np.save(tmp_path / "clips.npy", frames.numpy())
    command = [str(python), "-c", PULL, str(tmp_path / "clips.npy"), str(tmp_path / "features.npy")]
    command += [str(stored()), str(tmp_path / "answers.json")]
    threads = str(torch.get_num_threads())  # another number may add up in another order
    environment = {"MLFLOW_TRACKING_URI": tracking.tracking_uri(), "OMP_NUM_THREADS": threads}
    environment["PATH"] = f"{python.parent}:/usr/bin:/bin"
    pulled = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert pulled.returncode == 0, pulled.stderr
    assert "refused" in pulled.stdout
    assert np.array_equal(np.load(tmp_path / "features.npy"), package.load_encoder(str(folder)).embed(frames).numpy())
    inputs, outputs = (side.inputs[0] for side in signature_of(stored()))
    assert (inputs.type, inputs.shape) == (np.uint8, (-1, 8, -1, -1, 3))
    assert (outputs.type, outputs.shape) == (np.float32, (-1, 128))


def signature_of(folder: Path) -> tuple[Any, Any]:
    """Inputs and outputs of the signature that MLflow reads from a folder."""
    from mlflow.models import Model

    signature = Model.load(str(folder)).signature
    assert signature is not None
    return signature.inputs, signature.outputs


@pytest.mark.parametrize("num_frames", [2, 16])
def test_the_input_example_is_a_clip_that_moves(num_frames: int) -> None:
    """Uint8, of the number of frames that the encoder takes; no two frames that follow each other are equal."""
    clip = registry.example_clip(num_frames)
    assert (clip.dtype, clip.shape[:2], clip.shape[-1]) == (np.uint8, (1, num_frames), 3)
    assert all((before != after).any() for before, after in itertools.pairwise(clip[0]))
