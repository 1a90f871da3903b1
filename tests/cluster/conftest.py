"""One service for the whole session, started by the first test that needs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.cluster.service import Service, postgres_folder, running


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """Head, two workers and all services, on hosts of their own; CI may not go without."""
    able = os.geteuid() == 0 and shutil.which("ip") and postgres_folder()
    if not able and not os.environ.get("CI"):
        pytest.skip("several hosts need root, iproute2 and PostgreSQL")
    with running("one", "two") as started:
        yield started
