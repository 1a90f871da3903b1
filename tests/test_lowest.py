"""vmoco works at the lowest versions that pyproject.toml allows: the light install, and everything."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.data.videos import images, write_video
from tests.dataset import make_data_set
from tests.lowest import ROOT, lowest, lowest_environment, named
from tests.made import clips, save_checkpoint
from vmoco.encoders import package
from vmoco.train import publish

HEAVY = ("ray", "mlflow", "sqlalchemy", "scikit-learn", "pandas", "faiss-cpu", "matplotlib")
USE = """
import sys
import mlflow, numpy as np, vmoco
encoder = vmoco.load_encoder(sys.argv[1])
np.savez(sys.argv[4], clips=encoder.embed(np.load(sys.argv[2])), video=encoder.embed(sys.argv[3]))
mlflow.MlflowClient("http://127.0.0.1")  # the client of servers, which the light install has; it does not connect yet
print(*(module.__version__ for module in (sys.modules[name] for name in ("av", "mlflow", "numpy", "pyarrow"))))
"""
EXTRAS = "cluster,dev,onnx,services"
# A file or test for each package and each use of it; the last one submits an ingest and a pretraining to Ray.
TESTS = (
    "tests/cluster/test_image.py::test_the_dockerfile_is_clean",
    "tests/cluster/test_manifests.py",
    "tests/cluster/test_services.py",
    "tests/data/test_annotations.py",
    "tests/data/test_frames.py",
    "tests/data/test_google_store.py",
    "tests/data/test_manifest.py",
    "tests/data/test_pixels.py",
    "tests/data/test_shard.py",
    "tests/data/test_video.py",
    "tests/encoders/test_encoder.py",
    "tests/encoders/test_portable.py",
    "tests/encoders/test_registry.py",
    "tests/evaluate/test_gallery.py",
    "tests/evaluate/test_knn.py",
    "tests/evaluate/test_probe.py",
    "tests/model/test_backbone.py",
    "tests/sweep/test_report.py",
    "tests/sweep/test_space.py",
    "tests/test_config.py",
    "tests/test_jobs.py",
    "tests/test_mlflow_internals.py",
    "tests/test_ray_internals.py",
    "tests/test_storage.py",
    "tests/test_tracking.py",
    "tests/train/test_loop.py",
    "tests/test_pretrain.py::test_a_job_says_how_to_stop_it_then_how_far_it_is",
)


def test_every_requirement_has_a_lowest_version() -> None:
    """pyproject.toml gives a lower bound for each package, and the lock file has a version within each range."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert lowest(named(f"vmoco[{','.join(extras)}]"))
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in named(f"vmoco[{EXTRAS}]"):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_a_requirement_without_a_lowest_version_is_refused() -> None:
    """The message names it as it is written; of two bounds the higher one counts."""
    with pytest.raises(ValueError, match=r"pyproject\.toml has numpy<3 without a lower bound: write numpy>=VERSION"):
        lowest([Requirement("numpy<3")])
    assert str(lowest([Requirement("matplotlib>=3.9"), Requirement("Matplotlib>=3.10,<4")])["matplotlib"]) == "3.10"


@pytest.mark.timeout(1200)
def test_the_light_install_works_at_its_lowest_versions(tmp_path: Path) -> None:
    """An encoder of a folder gives the features that it gives here, for clips and for a video that PyAV decodes."""
    python = lowest_environment(tmp_path / "environment", "vmoco", without=HEAVY)
    manifest = make_data_set(tmp_path / "data")
    save_checkpoint(tmp_path / "checkpoint", manifest)
    publish.write_encoder(tmp_path / "checkpoint", tmp_path / "encoder", data=manifest)
    np.save(tmp_path / "clips.npy", clips().numpy())
    video = write_video(tmp_path / "video.mp4", images(20))

    words = [tmp_path / "encoder", tmp_path / "clips.npy", video, tmp_path / "features.npz"]
    environment = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    command = [str(python), "-c", USE, *map(str, words)]
    used = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert used.returncode == 0, used.stderr
    versions = lowest(named("vmoco"))
    for name, version in zip(("av", "mlflow-skinny", "numpy", "pyarrow"), used.stdout.split(), strict=True):
        assert Version(version) == versions[name], name
    found, encoder = np.load(tmp_path / "features.npz"), package.load_encoder(str(tmp_path / "encoder"))
    np.testing.assert_allclose(found["clips"], encoder.embed(clips()).numpy(), atol=1e-6)
    np.testing.assert_allclose(found["video"], encoder.embed(video).numpy(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("extras", "tests"),
    [("cluster,dev,onnx", TESTS), ("cluster,dev,services", ("tests/cluster/test_gateway.py",))],
    ids=["all", "services"],
)
def test_everything_works_at_its_lowest_version(extras: str, tests: tuple[str, ...], tmp_path: Path) -> None:
    """Tests of each package, an ingest, a pretraining and the services pass with the lowest versions."""
    python = lowest_environment(tmp_path / "environment", f"vmoco[{extras}]")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow or cluster", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
    assert done.returncode == 0, "see the output of the tests"
