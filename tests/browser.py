"""A page as a browser shows it: its scripts run, and what they leave in its title is what a test reads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest


def dom_of(address: str, *, profile: Path, milliseconds: int = 5000) -> str:
    """A page as HTML after its scripts have run; the test is skipped where there is no browser, but not in CI.

    Args:
        address: of the page, such as file:///... or http://...
        profile: folder for the browser's own files.
        milliseconds: time that its scripts get, on the page's own clock, which stands still while it loads.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        assert not os.environ.get("CI"), "CI has to bring a browser"
        pytest.skip("no chromium here: apt-get install chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", "--window-size=1200,1400", f"--virtual-time-budget={milliseconds}"]
    command += ["--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def title_of(page: Path, *, profile: Path) -> str:
    """The title of an HTML file after its scripts have run; otherwise as `dom_of`."""
    dom = dom_of(page.as_uri(), profile=profile)
    found = re.search("<title>(.*?)</title>", dom)
    assert found is not None, dom
    return found[1]
