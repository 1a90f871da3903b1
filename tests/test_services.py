"""A new store gets its buckets, once; what cannot be reached is named."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmoco import services, storage


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """An empty S3 store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=2)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    return endpoint


def test_buckets_are_made_once(store: str) -> None:
    """The missing ones are made and can be written; a second time there is nothing to do."""
    with pytest.raises(ValueError, match="s3://one/x cannot be written"):
        storage.check_writable("s3://one/x")
    assert services.make_buckets(["one", "two"]) == ["one", "two"]
    storage.check_writable("s3://one/x")
    assert services.make_buckets(["one", "three"]) == ["three"]


def test_a_store_that_is_not_there_is_named(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence has the bucket, the address, and what to check."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"bucket 'one' cannot be made in http://127.0.0.1:1: .*Check the address"):
        services.make_buckets(["one"])


def test_a_tracker_that_is_not_there_is_named() -> None:
    """No password is in the sentence."""
    with pytest.raises(ValueError, match=r"the tracker http://127.0.0.1:1 cannot be reached .*check its") as raised:
        services.make_tracker_user("http://127.0.0.1:1", admin_password="hidden-1", user="vmoco", password="hidden-2")
    assert "hidden" not in str(raised.value)
