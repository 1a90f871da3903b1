"""The wheel of this project has the right files, and an environment with only the wheel loads an encoder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

import vmoco
from tests.dataset import make_data_set
from tests.made import clips, save_checkpoint
from vmoco.encoders import package
from vmoco.train import publish

ROOT = Path(__file__).parents[1]
USE = """
import sys
import numpy as np, vmoco
encoder = vmoco.load_encoder(sys.argv[1])
np.save(sys.argv[3], encoder.embed(np.load(sys.argv[2])))
print(vmoco.__version__, vmoco.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, because a build leaves files beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "vmoco", folder / "vmoco", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", folder, folder], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_version_is_the_same_everywhere(wheel: Path) -> None:
    """pyproject.toml, `vmoco.__version__`, the wheel's name and the newest entry of CHANGELOG.md agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == vmoco.__version__
    assert wheel.name.startswith(f"vmoco-{vmoco.__version__}-")
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest.split()[1] == vmoco.__version__


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    """It has every module of vmoco and METHOD.md, but no jobs, tests or pictures."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {str(path.relative_to(ROOT)) for path in ROOT.glob("vmoco/**/*.py")} | {"vmoco/METHOD.md"}


def test_an_installed_wheel_loads_an_encoder(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment, with the test environment's packages but not its vmoco, gives the same features."""
    manifest = make_data_set(tmp_path / "data")
    save_checkpoint(tmp_path / "checkpoint", manifest)
    publish.write_encoder(tmp_path / "checkpoint", tmp_path / "encoder", data=manifest)
    np.save(tmp_path / "clips.npy", clips().numpy())

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment"], check=True)
    python = tmp_path / "environment" / "bin" / "python"
    (packages,) = (tmp_path / "environment").glob("lib/*/site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", packages, wheel], check=True)
    # A path file, and not --system-site-packages: the tests themselves may run in a virtual environment.
    (packages / "shared.pth").write_text(f"{Path(np.__file__).parents[1]}\n")
    environment = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    command = [python, "-c", USE, tmp_path / "encoder", tmp_path / "clips.npy", tmp_path / "features.npy"]
    used = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False, cwd=tmp_path
    )
    assert used.returncode == 0, used.stderr
    assert used.stdout.split() == [vmoco.__version__, str(packages / "vmoco" / "__init__.py")]
    expected = package.load_encoder(str(tmp_path / "encoder")).embed(clips())
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), expected.numpy())
