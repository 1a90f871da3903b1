"""A page as a browser shows it: its scripts run, and what they leave in its title is what a test reads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest


def title_of(page: Path, *, profile: Path) -> str:
    """The title of a page after its scripts have run; the test is skipped where there is no browser, but not in CI.

    Args:
        page: HTML file.
        profile: folder for the browser's own files.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        assert not os.environ.get("CI"), "CI has to bring a browser"
        pytest.skip("no chromium here: apt-get install chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", "--window-size=1200,1400", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search("<title>(.*?)</title>", done.stdout)
    assert found is not None, done.stderr
    return found[1]
