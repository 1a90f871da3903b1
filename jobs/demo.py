"""Shows the complete service on this machine, from videos to an encoder pulled by name. `make demo` runs it:

    python jobs/demo.py
    python jobs/demo.py --videos FOLDER_OR_URI

It starts a Ray cluster on this machine, submits the other jobs to it, and stops it at the end.
"""

from __future__ import annotations

import sys

import tyro

from vmoco import demo
from vmoco.job import run_job


def main() -> None:
    """Parses the flags and runs the demo; a failed step gives its own exit code."""
    try:
        tyro.cli(demo.run, description=__doc__)
    except demo.StepFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    run_job(main)
