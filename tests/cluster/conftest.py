"""One service for the whole session, started by the first test that needs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.cluster.service import BIN, ROOT, Service, postgres_folder, running
from tests.data.videos import images, write_video


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """Head, two workers and all services, on hosts of their own; CI may not go without."""
    able = os.geteuid() == 0 and shutil.which("ip") and postgres_folder()
    if not able and not os.environ.get("CI"):
        pytest.skip("several hosts need root, iproute2 and PostgreSQL")
    with running("one", "two") as started:
        yield started


@pytest.fixture(scope="session")
def ingested(service: Service) -> str:
    """What the job printed that made the data set s3://vmoco/data/first of six videos in the store."""
    outside = service.hosts["outside"]
    videos = outside.folder / "videos"
    videos.mkdir()
    for number in range(6):
        write_video(videos / f"{number}.mp4", images(24))
    upload = (
        "import pathlib; from vmoco import storage; "
        f"files = pathlib.Path('{videos}').iterdir(); "
        "[storage.write_atomic('s3://vmoco/videos/' + file.name, file.read_bytes()) for file in files]"
    )
    outside.run(f'cd {ROOT}; {BIN}/python -c "{upload}"', environment=service.store_keys["nodes"])
    flags = "--num-frames 8 --height 40 --width 48 --held-out-percent 0"
    code, said = service.submit(
        f"python jobs/ingest.py --videos s3://vmoco/videos --output s3://vmoco/data/first {flags}"
    )
    assert code == 0, said
    return said
