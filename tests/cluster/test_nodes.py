"""Each problem that nodes report about places and versions becomes one message; if they agree there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.cluster.test_check import GOOD, OTHER, VERSIONS
from vmoco.cluster.check import ask_places, place_problems, tracker_problems, version_problems


def test_a_shared_folder_has_no_problem_and_keeps_nothing(tmp_path: Path) -> None:
    """A node that sees the driver's file and the data has no problem, and writes nothing."""
    places = {"run.storage": str(tmp_path / "runs"), "data.uri": str(tmp_path / "data")}
    mark = tmp_path / "runs/.check/driver"
    for path in (mark, tmp_path / "data/manifest"):
        path.parent.mkdir(parents=True)
        path.touch()
    seen = ask_places("192.0.2.10", places=places, writes="run.storage", mark=str(mark))
    assert seen.problems == {}
    assert sorted(path.name for path in (tmp_path / "runs").rglob("*")) == [".check", "driver"]


def test_another_disk_at_the_same_path_is_a_problem_and_not_touched(tmp_path: Path) -> None:
    """A node that sees neither names both settings and what to give, and makes no folder on its own disk."""
    places = {"run.storage": str(tmp_path / "runs"), "data.uri": str(tmp_path / "data")}
    own = ask_places("192.0.2.11", places=places, writes="run.storage", mark=str(tmp_path / "runs/.check/driver"))
    assert list(tmp_path.iterdir()) == []
    first, second = place_problems([GOOD, own])
    assert first.startswith("node 192.0.2.11: run.storage: this node does not see what the driver's node")
    assert second.startswith(f"node 192.0.2.11: data.uri: there is no {tmp_path}/data; a path on one machine's own")
    assert "give a folder that all share, or s3:// or gs://" in first
    (alone,) = place_problems([replace(own, problems={"data.uri": "there is no /data"})])
    assert "own disk" not in alone


def test_builds_of_one_version_are_one_version() -> None:
    """A head with torch for CPUs and workers with torch for GPUs agree; another version is named with both nodes."""
    builds = [replace(GOOD, versions=VERSIONS | {"torch": "2.14.1+cpu"}), OTHER]
    assert version_problems(builds) == []
    (problem,) = version_problems([GOOD, replace(OTHER, versions=VERSIONS | {"ray": "2.61.0"})])
    assert problem.startswith("node 192.0.2.11 has ray 2.61.0, node 192.0.2.10 has 2.60.0: install requirements.lock")


def test_a_database_file_is_for_one_machine() -> None:
    """Several nodes of one machine may share a database file; several machines may not."""
    assert tracker_problems("sqlite:////home/mlflow.db", {"192.0.2.10"}) == []
    assert tracker_problems("https://gateway:5443", {"192.0.2.10", "192.0.2.11"}) == []
    (problem,) = tracker_problems("sqlite:////home/mlflow.db", {"192.0.2.10", "192.0.2.11"})
    assert "is a file of one machine, and the cluster has 2 nodes: set MLFLOW_TRACKING_URI" in problem
