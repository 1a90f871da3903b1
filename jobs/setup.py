"""Prepares a new store and a new tracker for the first job: creates buckets, and a user for the nodes. Needs no Ray.

    python jobs/setup.py --buckets vmoco mlflow --tracker http://tracker:5000

Keys and passwords are read from the environment:

- the store: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL;
- the administrator of the tracker: TRACKER_ADMIN_PASSWORD;
- the new user of the tracker: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.

You can run it again: existing buckets stay as they are, and the user gets the password that is set.
"""

from __future__ import annotations

import os

import tyro

from vmoco.cluster import services
from vmoco.job import run_job


def setup(*, buckets: tuple[str, ...] = (), tracker: str | None = None) -> None:
    """Creates the missing buckets, and the user of the tracker.

    Args:
        buckets: Names of the S3 buckets to create, for example vmoco mlflow.
        tracker: URL of the MLflow server, for example http://tracker:5000.
    """
    if buckets:
        made = services.make_buckets(buckets)
        print(f"buckets created: {', '.join(made) or 'none, all exist already'}", flush=True)
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
        raise ValueError(f"{variable} is not set: docker/secrets.sh generates its value; set it in the environment")
    return os.environ[variable]


if __name__ == "__main__":
    run_job(lambda: tyro.cli(setup, description=__doc__))
