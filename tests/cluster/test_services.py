"""A new store gets its buckets once; a place that cannot be reached is named."""

from __future__ import annotations

import pytest

from tests.store import BUCKET, Store
from vmoco import storage
from vmoco.cluster import services


def test_buckets_are_made_once(store: Store) -> None:
    """The missing ones are made and can be written; a second time there is nothing to do."""
    with pytest.raises(ValueError, match="s3://one/x cannot be written"):
        storage.check_writable("s3://one/x")
    assert services.make_buckets(["one", BUCKET, "two"]) == ["one", "two"]
    storage.check_writable("s3://one/x")
    assert services.make_buckets(["one", "three"]) == ["three"]


def test_a_store_that_is_not_there_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the bucket, the address, and what to check."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"bucket 'one' cannot be made in http://127.0.0.1:1: .*Check the address"):
        services.make_buckets(["one"])


def test_a_tracker_that_is_not_there_is_named() -> None:
    """No password is in the message."""
    with pytest.raises(ValueError, match=r"the tracker http://127.0.0.1:1 cannot be reached .*check its") as raised:
        services.make_tracker_user("http://127.0.0.1:1", admin_password="hidden-1", user="vmoco", password="hidden-2")
    assert "hidden" not in str(raised.value)
