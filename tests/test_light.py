"""The light install pulls and uses an encoder: without Ray, without a database, from an MLflow server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.videos import images, write_video
from tests.dataset import make_data_set
from tests.environments import installed_environment, light_environment
from tests.made import clips, save_checkpoint, settings_for
from vmoco import tracking
from vmoco.encoders import package, registry
from vmoco.train import publish

HEAVY = ("ray", "mlflow", "sqlalchemy", "scikit-learn", "pandas", "faiss-cpu", "matplotlib", "tensorboard")
USE = """
import sys
import numpy as np, torch, vmoco
encoder = vmoco.load_encoder(sys.argv[1])
clips = np.load(sys.argv[2])
np.savez(sys.argv[3], array=encoder.embed(clips), tensor=encoder.embed(torch.from_numpy(clips)),
         path=encoder.embed(sys.argv[4]))
assert encoder.preprocessing.num_frames == 8
assert not {"ray", "sqlalchemy", "pandas"} & set(sys.modules)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An MLflow server that hands the artifacts out itself; the tracker of this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [str(Path(sys.executable).with_name("mlflow")), "server", "--port", address.rpartition(":")[2]]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not answers(address):
            assert time.monotonic() < deadline, "the MLflow server did not start"
            time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2):
            return True
    except OSError:
        return False


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "make", [light_environment, pytest.param(installed_environment, marks=pytest.mark.slow)], ids=["linked", "by pip"]
)
def test_the_light_install_pulls_from_a_server(make: Callable[..., Path], server: str, tmp_path: Path) -> None:
    """A virtual environment with what `pip install vmoco` asks for and no more: a path, an array and a tensor.

    All give the features of the registered encoder; the default tracker, a database, is refused in a sentence.
    """
    python = make(tmp_path / "environment", "vmoco", without=HEAVY)
    manifest = make_data_set(tmp_path / "data")
    save_checkpoint(tmp_path / "checkpoint", manifest)
    publish.write_encoder(tmp_path / "checkpoint", tmp_path / "encoder", data=manifest)
    run_id = tracking.create_run(settings_for(manifest), tags={})
    registry.attach(tmp_path / "encoder", run_id=run_id)
    registry.register(run_id, name="tested", alias="candidate")
    video = write_video(tmp_path / "video.mp4", images(20))
    np.save(tmp_path / "clips.npy", clips().numpy())

    def use(tracker: str) -> subprocess.CompletedProcess[str]:
        words = ["models:/tested@candidate", tmp_path / "clips.npy", tmp_path / "features.npz", video]
        environment = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
        environment |= {"HOME": str(tmp_path), **({"MLFLOW_TRACKING_URI": tracker} if tracker else {})}
        command = [str(python), "-c", USE, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)

    used = use(server)
    assert used.returncode == 0, used.stderr
    found, encoder = np.load(tmp_path / "features.npz"), package.load_encoder(str(tmp_path / "encoder"))
    for name, source in (("array", clips()), ("tensor", clips()), ("path", video)):
        np.testing.assert_allclose(found[name], encoder.embed(source).numpy(), atol=1e-6)
    refused = use("")
    assert "which the light install of vmoco cannot read: set MLFLOW_TRACKING_URI" in refused.stderr
