"""How long does a pull take, and is what was pulled what was registered? `python -m tests.benchmarks.load_encoder`.

An r2plus1d_18 is registered in a fresh tracker (a database file). Then, each time in a new process with nothing
imported: the seconds of `vmoco.load_encoder(models:/...)`, and of the whole process with its imports. The file cache is
warm: what is cold is the process. The features of the pulled encoder, and of the program that MLflow runs, are compared
with those of the checkpoint's own query encoder, on the same device and in the same type. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tests.dataset import make_data_set
from tests.made import TINY, clips
from vmoco import tracking
from vmoco.encoders import package, registry
from vmoco.train import publish
from vmoco.train.state import TrainState

PULL = """
import time
started = time.perf_counter()
import vmoco
vmoco.load_encoder("models:/measured@candidate")
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as place:
        os.environ["VMOCO_HOME"] = place
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        folder = Path(place)
        manifest = make_data_set(folder / "data")
        model = TINY.model.model_copy(update={"backbone": "r2plus1d_18"})
        settings = TINY.model_copy(update={"model": model})
        state = TrainState(settings, manifest_hash=manifest.hash, device=torch.device("cpu"))
        (folder / "checkpoint").mkdir()
        state.save(folder / "checkpoint")
        publish.write_encoder(folder / "checkpoint", folder / "encoder", data=manifest)
        run_id = tracking.create_run(settings, tags={})
        registry.attach(folder / "encoder", run_id=run_id)
        registry.register(run_id, name="measured", alias="candidate")

        calls, processes = [], []
        for _ in range(rounds):
            started = time.perf_counter()
            pulled = subprocess.run([sys.executable, "-c", PULL], capture_output=True, text=True, check=True)
            processes.append(time.perf_counter() - started)
            calls.append(float(pulled.stdout))

        encoder, frames = (
            package.load_encoder("models:/measured@candidate"),
            clips(4, num_frames=8, height=64, width=80),
        )
        with torch.inference_mode():
            backbone = state.moco.query.backbone.eval()
            registered = torch.nn.functional.normalize(backbone(encoder.preprocess(frames)), dim=1).numpy()
        import mlflow

        mlflow.set_tracking_uri(tracking.tracking_uri())
        program = mlflow.pyfunc.load_model("models:/measured@candidate")
        report = {
            "load_encoder_seconds": round(statistics.median(calls), 2),
            "process_seconds": round(statistics.median(processes), 2),
            "max_difference": float(np.abs(encoder.embed(frames).numpy() - registered).max()),
            "program_max_difference": float(np.abs(program.predict(frames.numpy()) - registered).max()),
            "backbone": "r2plus1d_18",
            "rounds": rounds,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
