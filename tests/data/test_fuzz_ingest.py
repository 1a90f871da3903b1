"""Broken videos through the whole of ingest: nothing crashes, hangs, or goes missing, and what is taken is exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.fuzz_ingest import run


@pytest.mark.cluster
@pytest.mark.parametrize("files", [168, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_file_is_accounted_for(tmp_path: Path, ray_cluster: object, files: int) -> None:
    """Seeds of all codecs and containers, all mutations, and all that is hostile: compared with a plain decoder."""
    report = run(tmp_path, files)
    numbers = {name: report[name] for name in ("crashes", "hangs", "unaccounted", "wrong")}
    assert numbers == {"crashes": 0, "hangs": 0, "unaccounted": 0, "wrong": 0}
    assert int(str(report["files"])) >= files + 25
    # Damage is found, and not everything is damaged: both sides of the comparison have members.
    assert 0.15 * files < int(str(report["accepted"])) < 0.85 * files
