"""A local cluster starts on free ports, runs jobs, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import processes
from vmoco.cluster.local import LocalCluster
from vmoco.own_folder import make_folder

STOPPABLE_JOB = """
import signal, sys, time
def stop(signum, frame):
    print("checkpointing", flush=True)
    time.sleep(2)
    print("checkpointed", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("at work", flush=True)
time.sleep(100)
"""

OWNER = """
import sys
from vmoco.job import run_job
from vmoco.cluster.local import LocalCluster
def main():
    with LocalCluster(num_cpus=1, object_store_memory=128 * 2**20) as cluster:
        print("folder", cluster.environment["RAY_AUTH_TOKEN_PATH"].rpartition("/")[0], flush=True)
        cluster.submit(["python", "job.py"], sys.argv[1])
run_job(main)
"""


def test_a_taken_port_is_named_before_anything_starts() -> None:
    """A dashboard port that another process holds gives an error with the port and what to do."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--dashboard-port {port} is taken on 127.0.0.1 .* choose another"):
            LocalCluster(dashboard_port=port)


@pytest.mark.parametrize("port", [0, 80, 65536])
def test_a_port_that_is_not_allowed_is_refused(port: int) -> None:
    """A port outside 1024..65535 is refused with the allowed range."""
    with pytest.raises(ValueError, match=f"--dashboard-port {port} is not allowed: choose one from 1024 to 65535"):
        LocalCluster(dashboard_port=port)


@pytest.mark.cluster
def test_a_head_that_dies_shows_its_last_lines() -> None:
    """A head that cannot start gives a ValueError with Ray's own reason, and leaves nothing."""
    cluster = LocalCluster(num_cpus=1, object_store_memory=1)  # Ray wants 78 MB or more
    with pytest.raises(ValueError, match=r"(?s)local Ray cluster ended with exit code .*object store"), cluster:
        pass
    folder = cluster.environment["RAY_AUTH_TOKEN_PATH"].rpartition("/")[0]
    assert not Path(folder).exists()
    assert processes.with_mark(folder) == []


@pytest.mark.cluster
def test_the_token_is_private_and_needed(local_cluster: LocalCluster) -> None:
    """Only the owner may read the token, and the job server answers no request without it."""
    import urllib.error
    import urllib.request

    token = Path(local_cluster.environment["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(local_cluster.address + "/api/jobs/", timeout=10)


@pytest.mark.cluster
def test_a_job_runs_this_python_and_the_submitted_folder(
    local_cluster: LocalCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`python` in a job is this interpreter, its modules are those of the working dir, and its output comes through."""
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent/vmoco.py").write_text("where = 'the working dir'\n")
    (tmp_path / "sent/job.py").write_text("import sys, vmoco\nprint(vmoco.where, 'of', sys.prefix)\nsys.exit(7)\n")
    assert local_cluster.submit(["python", "job.py"], tmp_path / "sent") == 7
    assert f"the working dir of {sys.prefix}" in capfd.readouterr().out


@pytest.mark.cluster
def test_ctrl_c_stops_the_job_and_leaves_nothing(tmp_path: Path) -> None:
    """After Ctrl-C during a job, the job has checkpointed and no process and no file of the cluster is left."""
    (tmp_path / "job.py").write_text(STOPPABLE_JOB)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said, folder = [], ""
    try:
        assert owner.stdout is not None
        for line in owner.stdout:
            said.append(line)
            if line.startswith("folder "):
                folder = line.split()[1]
            if line == "at work\n":
                assert len(processes.with_mark(folder)) > 10, "the list of processes does not have them"
                os.killpg(owner.pid, signal.SIGINT)
        assert owner.wait(timeout=60) == 130
    finally:
        if owner.poll() is None:
            os.killpg(owner.pid, signal.SIGKILL)
    assert "checkpointed\n" in said, "".join(said)
    assert said[-1] == "stopped\n"
    assert processes.with_mark(folder) == []
    assert not Path(folder).exists()


@pytest.mark.slow
@pytest.mark.cluster
def test_ctrl_c_while_submitting_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C before the job server knows the job ends the submission too."""
    (tmp_path / "job.py").write_text(STOPPABLE_JOB)
    for seconds in (0.2, 1.5, 2.5):
        with LocalCluster(num_cpus=1, object_store_memory=128 * 2**20) as cluster:
            folder = cluster.environment["RAY_AUTH_TOKEN_PATH"].rpartition("/")[0]
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                cluster.submit(["python", "job.py"], tmp_path)
        assert processes.with_mark(folder) == []


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_owner_takes_the_cluster_along(tmp_path: Path) -> None:
    """kill -9 of the owner ends every process of its cluster, and the next start removes its folder."""
    (tmp_path / "job.py").write_text(STOPPABLE_JOB)
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = owner.stdout.readline().split()[1]
        for line in owner.stdout:
            if line == "at work\n":
                break
        owner.kill()
    deadline = time.monotonic() + 30
    while processes.with_mark(folder) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert processes.with_mark(folder) == []
    assert Path(folder).exists()
    shutil.rmtree(make_folder(Path(folder).parent))
    assert not Path(folder).exists()
