"""Sets up a new store and a new tracker before the first job: buckets, and a user for the nodes.

Secrets come from the environment and never from a flag: everybody on a machine sees flags, and Ray keeps those of a
submitted job.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import pyarrow.fs as pafs


def make_buckets(names: Sequence[str]) -> list[str]:
    """Makes the missing S3 buckets, at AWS_ENDPOINT_URL or in AWS.

    Returns:
        The names of the buckets that it made.

    Raises:
        ValueError: the store cannot be reached, or this key may not make buckets.
    """
    made = []
    for name in names:
        try:
            # By URI, because otherwise Arrow does not read AWS_ENDPOINT_URL.
            store, _ = pafs.FileSystem.from_uri(f"s3://{name}?allow_bucket_creation=true")
            if store.get_file_info(name).type == pafs.FileType.NotFound:
                store.create_dir(name)
                made.append(name)
        except OSError as error:
            where = os.environ.get("AWS_ENDPOINT_URL", "AWS")
            raise ValueError(
                f"bucket {name!r} cannot be made in {where}: {error}. Check the address, and that AWS_ACCESS_KEY_ID is "
                "a key that may make buckets"
            ) from error
    return made


def make_tracker_user(tracker: str, *, admin_password: str, user: str, password: str) -> None:
    """Makes a user of an MLflow server with authentication, or sets the password of an existing one.

    The user is not an administrator: it reads everything, and changes only what it made.

    Args:
        tracker: URL of the server.
        admin_password: of the user `admin`.
        user: name of the user.
        password: MLflow wants at least 12 characters.

    Raises:
        ValueError: the server cannot be reached, or refuses.
    """
    body = {"username": user, "password": password}
    try:
        _ask(tracker, "POST", "users/create", body, admin_password)
    except urllib.error.HTTPError as error:
        answer = error.read().decode(errors="replace")
        if "RESOURCE_ALREADY_EXISTS" not in answer:
            raise ValueError(_refused(tracker, user, error, answer)) from error
        try:
            _ask(tracker, "PATCH", "users/update-password", body, admin_password)
        except OSError as again:
            raise ValueError(_refused(tracker, user, again, "")) from again
    except OSError as error:
        raise ValueError(f"the tracker {tracker} cannot be reached ({error}): check its address") from error


def _refused(tracker: str, user: str, error: OSError, answer: str) -> str:
    if isinstance(error, urllib.error.HTTPError) and error.code == 401:
        return f"the tracker {tracker} refuses the password of its user admin: check TRACKER_ADMIN_PASSWORD"
    return f"the tracker {tracker} cannot make user {user!r}: {error} {' '.join(answer.split())[:300]}".rstrip()


def _ask(tracker: str, method: str, path: str, body: dict[str, str], admin_password: str) -> Any:
    word = base64.b64encode(f"admin:{admin_password}".encode()).decode()
    request = urllib.request.Request(
        f"{tracker.rstrip('/')}/api/2.0/mlflow/{path}",
        method=method,
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Basic {word}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer) if answer.headers.get_content_type() == "application/json" else None
