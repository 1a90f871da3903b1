"""Runs the sections, each in a process of its own with its own limit: `python -m tests.gpu [--cpu] [SECTION ...]`.

Prints one JSON line a section, and one of all at the end; `--output FILE` keeps it. The exit code is the number of
sections that failed. Needs torch, torchvision, numpy, pyarrow, safetensors, pydantic and tyro, and no Ray. `--cpu`
goes through tiny ones without a GPU, which tests this program.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


def run_here(name: str, *, cpu: bool) -> int:
    """Runs one section in this process; prints its figures as the last line."""
    from tests.gpu.scale import REAL, TINY
    from tests.gpu.sections import SECTIONS

    section, _ = SECTIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = section(TINY if cpu else REAL, Path(folder))
        except AssertionError as error:
            print(json.dumps({"failed": f"{error}"[:2000]}))
            return 1
        except Exception:
            print(json.dumps({"failed": traceback.format_exc()[-2000:]}))
            return 1
    print(json.dumps(found))
    return 0


def run_all(names: list[str], *, cpu: bool) -> dict[str, dict[str, object]]:
    """Runs sections one after the other; the figures of each, or `failed` with the reason."""
    from tests.gpu.sections import SECTIONS

    results: dict[str, dict[str, object]] = {}
    for name in names:
        limit = 300 if cpu else SECTIONS[name][1]
        command = [sys.executable, "-m", "tests.gpu", "--here", name, *(["--cpu"] if cpu else [])]
        started = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            last = (done.stdout.strip().splitlines() or [""])[-1]
            try:
                found = json.loads(last)
            except json.JSONDecodeError:
                found = {"failed": f"exit code {done.returncode}: {done.stderr[-2000:]}"}
        except subprocess.TimeoutExpired:
            found = {"failed": f"took more than {limit} s"}
        results[name] = {"seconds": round(time.monotonic() - started, 1), **found}
        print(json.dumps({name: results[name]}), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="one of them, or several; all when left out")
    parser.add_argument("--cpu", action="store_true", help="tiny sections on the CPU, to test this program")
    parser.add_argument("--output", type=Path, help="file for the figures of all sections")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.here:
        sys.exit(run_here(flags.here, cpu=flags.cpu))
    from tests.gpu.sections import SECTIONS

    if unknown := set(flags.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))} is no section: give some of {', '.join(SECTIONS)}")
    if not flags.cpu:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no GPU here: run it where there is one, or give --cpu to test this program")
    results = run_all(flags.sections or list(SECTIONS), cpu=flags.cpu)
    if flags.output:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        flags.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
    sys.exit(sum("failed" in found for found in results.values()))


if __name__ == "__main__":
    main()
