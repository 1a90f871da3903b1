"""The tables in cluster/README.md equal those that the program computes from today's presets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.benchmarks.sizing import tables

README = Path(__file__).parents[2] / "cluster/README.md"


@pytest.mark.parametrize("name", ["sets", "scales"])
def test_the_readme_shows_what_is_computed(name: str) -> None:
    """If a preset or the method's cost changes, the table changes, and the README must change too."""
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", README.read_text(), flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == tables()[name], (
        "run `python -m tests.benchmarks.sizing` and copy its tables into cluster/README.md"
    )
