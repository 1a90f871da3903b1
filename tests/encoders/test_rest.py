"""MLflow's REST server serves a registered encoder: clips as JSON give the features of the encoder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.dataset import make_data_set
from tests.made import clips, save_checkpoint, settings_for
from vmoco import tracking
from vmoco.encoders import package, registry
from vmoco.train import publish


@pytest.fixture
def address(tmp_path: Path, tracker_home: Path) -> Iterator[str]:
    """Of `mlflow models serve` with a registered encoder; the environment is that of the tests."""
    manifest = make_data_set(tmp_path / "data")
    save_checkpoint(tmp_path / "checkpoint", manifest)
    publish.write_encoder(tmp_path / "checkpoint", tmp_path / "encoder", data=manifest)
    run_id = tracking.create_run(settings_for(manifest), tags={})
    registry.attach(tmp_path / "encoder", run_id=run_id)
    registry.register(run_id, name="served", alias="candidate")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("mlflow")), "models", "serve", "-m", "models:/served@candidate"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn by its name
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking.tracking_uri(), "PATH": path}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                log_text = (tmp_path / "log").read_text()
                assert process.poll() is None, log_text
                assert time.monotonic() < end, log_text
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def ask(address: str, body: object) -> tuple[int, str]:
    """Status and body of the answer to a request with JSON."""
    content = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/invocations", content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_mlflows_server_answers_with_the_features(address: str) -> None:
    """Within the rounding of JSON, for one clip and several; clips of another length are refused with their shape."""
    encoder = package.load_encoder("models:/served@candidate")
    for count in (1, 3):
        frames = clips(count)
        status, body = ask(address, {"inputs": frames.tolist()})
        assert status == 200, body
        found = np.array(json.loads(body)["predictions"], np.float32)
        np.testing.assert_allclose(found, encoder.embed(frames).numpy(), atol=1e-6)
    status, body = ask(address, {"inputs": clips(1, num_frames=5).tolist()})
    assert status == 400, body
    assert "(1, 5, 40, 48, 3)" in body
