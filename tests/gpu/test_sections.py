"""Each section of `python -m tests.gpu`: in full size on a GPU, and tiny on the CPU, so that it never breaks.

Where CI has a GPU, `VMOCO_NEEDS_GPU=1` makes a test that finds none fail, in place of being skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.scale import REAL, TINY
from tests.gpu.sections import SECTIONS

ROOT = Path(__file__).parents[2]


_ALL = """
import json, pathlib, sys
from tests.gpu.scale import TINY
from tests.gpu.sections import SECTIONS

for name, (section, _) in SECTIONS.items():
    if name != "compiled":
        print(json.dumps({name: section(TINY, pathlib.Path(sys.argv[1], name))}))
"""


def test_every_section_runs_without_a_gpu(tmp_path: Path) -> None:
    """All in one process, because to start one takes longer than a tiny section: each ends with its figures."""
    done = subprocess.run(
        [sys.executable, "-c", _ALL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: figures for line in done.stdout.splitlines() for name, figures in json.loads(line).items()}
    assert {*found, "compiled"} == set(SECTIONS)
    assert all(found.values())


@pytest.mark.slow
def test_a_section_runs_in_a_process_of_its_own() -> None:
    """As the program does it; this one compiles, which takes a minute."""
    command = [sys.executable, "-m", "tests.gpu", "--cpu", "compiled"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1]).values()
    assert "failed" not in found
    assert len(found) > 1, "more than its seconds"


def test_a_section_that_fails_is_told(tmp_path: Path) -> None:
    """An unknown section, and a real run without a GPU, are refused by name; the file has what was found."""
    command = [sys.executable, "-m", "tests.gpu"]
    unknown = subprocess.run([*command, "--cpu", "numbers"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "numbers is no section: give some of environment, numerics" in unknown.stderr
    if not torch.cuda.is_available():
        without = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert without.returncode == 2
        assert "torch sees no GPU here" in without.stderr
    flags = ["--cpu", "environment", "--output", str(tmp_path / "new" / "found.json")]
    subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, check=True)
    assert json.loads((tmp_path / "new" / "found.json").read_text())["environment"]["torch"] == torch.__version__


def test_all_sections_fit_the_time_of_a_machine() -> None:
    """The limits are generous, and together below a quarter of an hour."""
    assert sum(seconds for _, seconds in SECTIONS.values()) < 15 * 60
    assert TINY.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_holds_on_a_gpu(name: str, tmp_path: Path) -> None:
    """Its figures are right, and the assertions in it hold."""
    if not torch.cuda.is_available():
        if os.environ.get("VMOCO_NEEDS_GPU"):
            pytest.fail("VMOCO_NEEDS_GPU is set, and torch sees no GPU")
        pytest.skip("torch sees no GPU")
    section, _ = SECTIONS[name]
    assert section(REAL, tmp_path)
