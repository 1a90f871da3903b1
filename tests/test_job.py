"""A job ends with one clear line and its exit code, obeys signals, and leaves no process."""

from __future__ import annotations

import builtins
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pydantic
import pytest

from tests import processes
from vmoco import job
from vmoco.cluster.local import LocalCluster
from vmoco.config import TrainSettings

FAILING_JOB = """
import sys
from vmoco import job
def main():
    url = job.connect()
    import ray
    print("submitted:", job.in_submitted_job(), "stop:", job.stop_command(url))
    @ray.remote
    def task():
        print("a worker says something")
        raise ValueError("queue_size 8 is below 16:\\n raise it")
    ray.get(task.remote())
job.run_job(main)
"""

SLEEPING_JOB = """
import time
from vmoco import job
def main():
    job.connect()
    import os, ray
    print("folder", os.environ["RAY_AUTH_TOKEN_PATH"].rpartition("/")[0], flush=True)
    time.sleep(100)
job.run_job(main)
"""


# Waits where Ray does, in C++: for tasks to end, and for anything to happen.
WAITING_JOB = """
import time
from vmoco import job
def main():
    job.connect()
    import ray
    task = ray.remote(num_cpus=0)(lambda: time.sleep(100)).remote()
    print("waiting", flush=True)
    ray.WAY
job.run_job(main)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def ray_error(cause: Exception) -> Exception:
    from ray.exceptions import RayTaskError

    try:
        raise cause
    except Exception:
        import traceback

        return RayTaskError("task", traceback.format_exc(), cause, pid=1, ip="::1").as_instanceof_cause()


def test_a_message_of_ours_is_the_whole_last_line() -> None:
    """A ValueError, also one of several lines, becomes one line without a traceback; the exit code is 1."""
    ended = run_python("from vmoco.job import run_job\ndef f(): raise ValueError('bad 3:\\n do 4')\nrun_job(f)")
    assert (ended.returncode, ended.stderr) == (1, "error: bad 3: do 4\n")


def test_a_bug_keeps_its_traceback_above_the_last_line() -> None:
    """Any other exception prints its traceback, then one line with its type; what was printed before stays above."""
    ended = run_python("from vmoco.job import run_job\ndef f(): print('first'); {}['key']\nrun_job(f)")
    assert ended.returncode == 1
    assert ended.stdout == "first\n"
    assert ended.stderr.startswith("Traceback")
    assert ended.stderr.endswith("\nerror: KeyError: 'key'\n")


@pytest.mark.parametrize(
    ("line", "code", "last"),
    [
        ("pass", 0, ""),
        ("raise KeyboardInterrupt", 130, "stopped\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "stopped\n"),
        ("sys.exit(2)", 2, ""),
    ],
)
def test_exit_codes(line: str, code: int, last: str) -> None:
    """0 after the end, 130 after Ctrl-C, 143 after SIGTERM, and a code that the job chose stays."""
    ended = run_python(f"import os, signal, sys\nfrom vmoco.job import run_job\ndef f(): {line}\nrun_job(f)")
    assert (ended.returncode, ended.stderr) == (code, last)


def test_the_cause_is_found_in_what_ray_wraps_around_it() -> None:
    """A task's error keeps its own message, however often Ray wrapped it, and an unexpected error its type."""
    assert job.describe(ray_error(ray_error(ValueError("raise the queue")))) == "error: raise the queue"
    assert job.describe(ray_error(ZeroDivisionError("by 0"))) == "error: ZeroDivisionError: by 0"


def test_the_rank_with_the_user_error_is_named() -> None:
    """Of several failed ranks, the one with a user error counts, not those that lost their connection to it."""
    from ray.train import ControllerError, WorkerGroupError

    failures: dict[int, Exception] = {
        0: RuntimeError("connection closed by peer"),
        2: ray_error(ValueError("bad clip")),
    }
    assert job.describe(WorkerGroupError("long text", failures)) == "error: bad clip (on rank 2)"
    del failures[2]
    described = job.describe(WorkerGroupError("long text", failures))
    assert described == "error: RuntimeError: connection closed by peer (on rank 0)"
    assert job.describe(ControllerError(ray_error(ValueError("no CPU")))) == "error: no CPU"


def test_a_refused_setting_is_one_line() -> None:
    """Settings refuse with one line, and an error of pydantic becomes one line."""

    class Plain(pydantic.BaseModel):
        steps: int

    with pytest.raises(ValueError, match=r"--train\.steps -3 is not allowed") as ours:
        TrainSettings(steps=-3)
    assert job.describe(ours.value).startswith("error: --train.steps -3 is not allowed: ")
    with pytest.raises(pydantic.ValidationError) as theirs:
        Plain.model_validate({"steps": "x"})
    assert job.describe(theirs.value).startswith("error: steps: Input should be a valid integer")
    assert "\n" not in job.describe(theirs.value)


def test_errors_of_other_libraries_are_no_messages_for_users() -> None:
    """A subclass of ValueError from another library is an unexpected error, whose traceback is needed."""
    assert not job.is_user_error(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"))
    assert job.is_user_error(ValueError("x"))


def test_the_stop_command_has_an_address_that_the_user_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address comes from the head's environment, else from a dashboard on the loopback, and from no other."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert job.stop_command("127.0.0.1:8265") is None
    assert not job.in_submitted_job()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    assert job.in_submitted_job()
    assert job.stop_command("127.0.0.1:8265") == "ray job stop raysubmit_1 --address http://127.0.0.1:8265"
    assert job.stop_command("10.0.0.7:8265") == "ray job stop raysubmit_1 --address <the one you submitted to>"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:80")
    assert job.stop_command() == "ray job stop raysubmit_1 --address http://head:80"


def test_a_signal_requests_a_stop_from_a_normal_thread() -> None:
    """The first signal sets the flag and runs the callback once, outside the main thread; the old handlers return."""
    called: list[str] = []
    done = threading.Event()

    def on_stop() -> None:
        called.append(threading.current_thread().name)
        done.set()

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with job.StopRequest(on_stop) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert done.wait(5)
        assert stop.requested
        assert stop.signal_name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # a machine that repeats the signal changes nothing
    assert called == ["stop-request"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_interrupts() -> None:
    """The first Ctrl-C asks, the second one raises."""
    with job.StopRequest(lambda: None) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.cluster
def test_a_failing_submitted_job_ends_with_our_line(
    local_cluster: LocalCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the log of a submitted job our line is the last, below the output of workers; the exit code is 1."""
    (tmp_path / "fail.py").write_text(FAILING_JOB)
    assert local_cluster.submit(["python", "fail.py"], tmp_path) == 1
    log = capfd.readouterr().out
    said, _, repeated = log.partition("last available logs")
    assert "a worker says something" in said
    assert f"--address {local_cluster.address}\n" in said
    assert "submitted: True" in said
    assert repeated.strip().splitlines()[-1] == "error: queue_size 8 is below 16: raise it"
    assert "Traceback" not in said


@pytest.mark.cluster
def test_ctrl_c_in_a_direct_run_leaves_nothing() -> None:
    """A job without a cluster starts a Ray of its own; after Ctrl-C none of its processes and files are left."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", SLEEPING_JOB]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as direct:
        assert direct.stdout is not None
        folder = direct.stdout.readline().split()[1]
        assert len(processes.of_session(direct.pid)) > 5, "the list of processes does not have them"
        os.killpg(direct.pid, signal.SIGINT)
        _, errors = direct.communicate(timeout=60)
    assert direct.returncode == 130
    assert errors.splitlines()[-1] == "stopped"
    assert processes.of_session(direct.pid) == []
    assert not Path(folder).exists()


@pytest.mark.cluster
@pytest.mark.parametrize("way", ["get(task)", "wait([task])"])
def test_sigterm_while_waiting_for_ray_is_a_stop(local_cluster: LocalCluster, way: str) -> None:
    """Ray replaces a SystemExit that is raised while it waits by another one, with code 1."""
    environment = os.environ | local_cluster.environment | {"RAY_ADDRESS": local_cluster.gcs_address}
    command = [sys.executable, "-c", WAITING_JOB.replace("WAY", way)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waiting\n"
        time.sleep(2)
        waiting.terminate()
        _, errors = waiting.communicate(timeout=60)
    assert waiting.returncode == 143
    assert errors.splitlines()[-1] == "stopped"


def test_a_line_can_be_shown_from_a_pickled_callback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray Tune pickles what it calls back, at a time when Ray may have put a function of its own in print's place."""
    honest = print
    monkeypatch.setattr(builtins, "print", lambda *words, **options: honest(*words, **options))
    pickle.loads(pickle.dumps(job.show))("a line")
    assert capfd.readouterr().out == "a line\n"
