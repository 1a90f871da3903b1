"""One service for the whole session, started by the first test that needs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import NoReturn

import pytest

from tests.cluster.service import BIN, ROOT, Service, postgres_folder, running
from tests.cluster.survivor import Survivor, survive
from tests.data.videos import images, write_video


def need_hosts() -> None:
    """Skips where this machine cannot make hosts; in CI that is an error, because nobody would see the skip."""
    if os.geteuid() != 0:
        lacking("root")
    if shutil.which("ip") is None:
        lacking("iproute2")


def lacking(what: str) -> NoReturn:
    """Skips, or fails in CI."""
    said = f"several hosts on one machine need {what}, which is missing here"
    if os.environ.get("CI"):
        pytest.fail(said)
    pytest.skip(said)


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """Head, two workers and all services, each on its own host; CI must not skip it."""
    need_hosts()
    if postgres_folder() is None:
        lacking("initdb of PostgreSQL")
    with running("one", "two") as started:
        yield started


@pytest.fixture(scope="session")
def ingested(service: Service) -> str:
    """Output of the job that made the data set s3://vmoco/data/first from twelve videos in the store."""
    outside = service.hosts["outside"]
    videos = outside.folder / "videos"
    videos.mkdir()
    for number in range(12):
        write_video(videos / f"{number}.mp4", images(24 + number)[number:])
    upload = (
        "import pathlib; from vmoco import storage; "
        f"files = pathlib.Path('{videos}').iterdir(); "
        "[storage.write_atomic('s3://vmoco/videos/' + file.name, file.read_bytes()) for file in files]"
    )
    outside.run(f'cd {ROOT}; {BIN}/python -c "{upload}"', environment=service.store_keys["nodes"])
    flags = "--num-frames 8 --height 40 --width 48 --held-out-percent 30"
    code, said = service.submit(
        f"python jobs/ingest.py --videos s3://vmoco/videos --output s3://vmoco/data/first {flags}"
    )
    assert code == 0, said
    return said


@pytest.fixture(scope="session")
def survivor(service: Service, ingested: str) -> Survivor:
    """A run that has lost a host, continued, got another host, and ended."""
    return survive(service, data="s3://vmoco/data/first")


@pytest.fixture(scope="module")
def ray_hosts() -> Iterator[Service]:
    """A head and one worker, with a gateway and nothing else; ready in half a minute."""
    need_hosts()
    with running("one", only_ray=True) as started:
        yield started
