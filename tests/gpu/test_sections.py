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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "compiled")) for name in SECTIONS]
)
def test_a_section_runs_without_a_gpu(name: str) -> None:
    """In a process of its own, as the program does it: it ends with its figures."""
    if name == "ranks" and torch.distributed.is_initialized():
        pytest.skip("this process is a rank already")
    command = [sys.executable, "-m", "tests.gpu", "--cpu", name]
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
