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
    "compare": "--page",
    "demo": "--dashboard-port",
    "embed": "--videos-per-part",
    "evaluate": "--finetune.batch-size",
    "export": "--to",
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


WRONG = {
    "pretrain tiny --data.uri a --moco.momentum 4": "--moco.momentum 4.0 is not allowed: it must be less than 1",
    "sweep tiny --data.uri a --moco.queue-size 4": "--moco.queue-size 4 is below --train.global-batch 8: lower the "
    "batch or raise the queue",
    "sweep tiny --data.uri a --samples 0": "--samples 0 is not allowed: it must be greater than or equal to 1",
    "check cluster tiny --moco.momentum 4": "--moco.momentum 4.0 is not allowed: it must be less than 1",
    "ingest --videos a --output b --height 3": "--height 3 is not allowed: it must be greater than or equal to 16",
    "embed a --videos a --output b --batch-size 0": "--batch-size 0 is not allowed: it must be greater than or equal "
    "to 1",
    "embed a --videos a --output b --dense --every-seconds 0.5": "--dense and --every-seconds 0.5 both tell when the "
    "next clip begins: give one of them",
    "export a --to onnx --out .": "--out . is not empty: give a new folder, because an export replaces nothing",
    "evaluate a --data a --finetune.epochs 0": "--finetune.epochs 0 is not allowed: it must be greater than or equal "
    "to 1",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items(), ids=list(WRONG))
def test_a_wrong_value_is_answered_with_its_flag(words: str, message: str) -> None:
    """The job prints only one line, with the flag as typed, if the value is wrong alone or beside another flag."""
    name, *flags = words.split()
    ended = run(f"jobs/{name}.py", *flags)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"error: {message}\n")
