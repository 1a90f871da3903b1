"""Ingest whose job or node is killed: real jobs on real nodes, and the bytes of a run that nobody disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data import videos
from tests.data.test_ingest import ROOT, flags, quiet, shards
from tests.data.test_ingest_tasks import settings
from tests.nodes import Nodes
from vmoco.data.ingest import ingest
from vmoco.data.manifest import NAME, Manifest

pytestmark = pytest.mark.cluster


def eight_videos(folder: Path) -> None:
    """Videos that take a while to cut."""
    video = videos.write_video(folder / "0.mp4", videos.images(200, height=240, width=320))
    for number in range(1, 8):
        # Something behind the end, so that no two files are the same.
        (folder / f"{number}.mp4").write_bytes(video.read_bytes() + bytes([0, 0, 0, 9, *b"free", number]))


def wait_for_a_shard(output: Path, job: subprocess.Popen[Any]) -> None:
    """Waits for the first shard of a job that still runs."""
    end = time.monotonic() + 90
    while not list((output / "shards").glob("*.arrow")):
        assert job.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_job_is_finished_by_the_next(tmp_path: Path, ray_cluster: Any) -> None:
    """kill -9 of the job in the middle leaves no data set; the same command then gives an undisturbed run's bytes."""
    eight_videos(tmp_path / "in")
    chosen = settings(tmp_path, videos_per_shard=1, num_frames=16)
    command = [sys.executable, "jobs/ingest.py", *flags(chosen)]
    environment = {**os.environ, **ray_cluster.environment, "RAY_ADDRESS": ray_cluster.gcs_address}
    run = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_a_shard(tmp_path / "out", run)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    left = shards(tmp_path / "out")
    assert 1 <= len(left) < 8
    assert not (tmp_path / "out" / NAME).exists()
    with pytest.raises(ValueError, match="is not a data set"):
        Manifest.load(str(tmp_path / "out"))

    finished = ingest(chosen, progress=quiet)
    undisturbed = ingest(chosen.model_copy(update={"output": str(tmp_path / "other")}), progress=quiet)
    assert shards(tmp_path / "out") == shards(tmp_path / "other")
    assert finished.table == undisturbed.table
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "other" / NAME).read_bytes()


@pytest.mark.slow
def test_a_lost_node_changes_nothing(tmp_path: Path, ray_cluster: object) -> None:
    """kill -9 of the raylet of one of two nodes while both cut: the job ends with an undisturbed run's bytes."""
    eight_videos(tmp_path / "in")
    chosen = settings(tmp_path, videos_per_shard=1, num_frames=16)
    command = [sys.executable, "jobs/ingest.py", *flags(chosen)]
    with Nodes(cpus=[1, 1]) as nodes:
        job = subprocess.Popen(
            command, env=nodes.environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        wait_for_a_shard(tmp_path / "out", job)
        nodes.kill(0)
        said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    undisturbed = ingest(chosen.model_copy(update={"output": str(tmp_path / "other")}), progress=quiet)
    assert shards(tmp_path / "out") == shards(tmp_path / "other")
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "other" / NAME).read_bytes()
    assert undisturbed.counts["rejected"] == 0
