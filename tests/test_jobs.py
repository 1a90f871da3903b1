"""Every job explains its flags at once, without importing what only its work needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    heavy = {"torch", "ray", "mlflow", "sklearn", "faiss"} & set(sys.modules)
    sys.exit(ended.code or (f"imported {heavy}" if heavy else 0))
"""


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("evaluate", "--finetune.batch-size"),
        ("embed", "--videos-per-part"),
        ("register", "--data-licence"),
        ("registry", "rollback"),
        ("sweep", "recommended"),
    ],
)
def test_help_names_the_flags(name: str, flag: str) -> None:
    """Flags of one job never clash, and the answer takes no library that is slow to load."""
    command = [sys.executable, "-c", HELP, f"jobs/{name}.py"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert shown.returncode == 0, shown.stderr
    assert flag in shown.stdout
