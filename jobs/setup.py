"""Prepares a new store and a new tracker for the first job: buckets, and a user for the nodes. Needs no Ray:

    python jobs/setup.py --buckets vmoco mlflow --tracker http://tracker:5000

Keys and passwords come from the environment: those of the store from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and
AWS_ENDPOINT_URL; the administrator's of the tracker from TRACKER_ADMIN_PASSWORD; the name and password of the new user
from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. Running it again changes nothing.
"""

from __future__ import annotations

import os

import tyro

from vmoco.cluster import services
from vmoco.job import run_job


def setup(*, buckets: tuple[str, ...] = (), tracker: str | None = None) -> None:
    """Makes what is missing.

    Args:
        buckets: S3 buckets to make.
        tracker: URL of the MLflow server.
    """
    if buckets:
        made = services.make_buckets(buckets)
        print(f"buckets made: {', '.join(made) or 'none, all were there'}", flush=True)
    if tracker:
        user = _required("MLFLOW_TRACKING_USERNAME")
        services.make_tracker_user(
            tracker,
            admin_password=_required("TRACKER_ADMIN_PASSWORD"),
            user=user,
            password=_required("MLFLOW_TRACKING_PASSWORD"),
        )
        print(f"tracker {tracker} has user {user}", flush=True)


def _required(variable: str) -> str:
    if not os.environ.get(variable):
        raise ValueError(f"{variable} is not set: docker/secrets.sh makes it; pass it in the environment")
    return os.environ[variable]


if __name__ == "__main__":
    run_job(lambda: tyro.cli(setup, description=__doc__))
