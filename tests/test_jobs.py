"""Every job explains its flags quickly, and answers a wrong value with one line that names the flag."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HELP = """
import runpy, sys, time
sys.argv = sys.argv[1:] + ["--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    heavy = {"torch", "ray", "mlflow", "sklearn", "faiss"} & set(sys.modules)
    print("heavy:", *heavy)
    print("seconds:", time.process_time())
    sys.exit(ended.code)
"""
SHOWN = {
    "check": "cluster",
    "check cluster paper": "--moco.queue-size",
    "demo": "--dashboard-port",
    "embed": "--videos-per-part",
    "evaluate": "--finetune.batch-size",
    "ingest": "--held-out-percent",
    "nearest": "--queries",
    "pretrain": "recommended",
    "pretrain paper": "--train.global-batch",
    "register": "--data-licence",
    "registry": "rollback",
    "setup": "--buckets",
    "sweep": "recommended",
    "sweep demo": "--max-concurrent",
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )


def test_every_job_is_asked() -> None:
    """A new job gets a line in the table of this file."""
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == {words.split()[0] for words in SHOWN}


@pytest.mark.parametrize(("words", "flag"), SHOWN.items(), ids=list(SHOWN))
def test_help_names_the_flags(words: str, flag: str) -> None:
    """The help comes within 15 seconds of CPU time, without any library that is slow to load."""
    name, *preset = words.split()
    shown = run("-c", HELP, f"jobs/{name}.py", *preset)
    assert shown.returncode == 0, shown.stderr
    assert flag in shown.stdout
    *_, heavy, seconds = shown.stdout.splitlines()
    assert heavy.split() == ["heavy:"], "imported before the flags were read"
    assert float(seconds.split()[1]) < 15


@pytest.mark.parametrize("name", ["pretrain", "sweep"])
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--moco.momentum", "4"], "error: --moco.momentum 4.0 is not allowed: it must be less than 1"),
        (
            ["--moco.queue-size", "4"],
            "error: --moco.queue-size 4 is below --train.global-batch 8: lower the batch or raise the queue",
        ),
    ],
)
def test_a_wrong_value_is_answered_with_its_flag(name: str, flags: list[str], line: str) -> None:
    """The same line for a value that is wrong alone and for two that do not fit, and nothing else."""
    ended = run(f"jobs/{name}.py", "tiny", "--data.uri", "a", *flags)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", line + "\n")
