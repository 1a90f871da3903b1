"""Dashboard and alerts ask for metrics that exist, and Prometheus finds the port that shows them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.train.test_loop import Notes, run
from vmoco.train.system_metrics import RUNNING, Gauges, metric_name

METRICS = Path(__file__).parents[2] / "cluster/metrics"
ADDED = (RUNNING, "restarts", "checkpoints_failed", "checkpoints_damaged")
"""What the driver and the workers show beside the numbers of the loop."""
NODES = {"object_store_memory"}
"""Metrics of Ray's core, beside those of its reporter."""


def named() -> set[str]:
    """Every metric that a panel of the dashboard asks for, without Ray's prefix."""
    dashboard: dict[str, Any] = json.loads((METRICS / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return set(re.findall(r"(?<!\")\bray_(\w+)", " ".join(asked)))


def test_every_panel_asks_for_a_number_that_training_tracks(tmp_path: Path) -> None:
    """Names of a run in the dashboard are names that the loop really tracks, once the generator trains too."""
    host = Notes()
    run(tmp_path, host)
    tracked = {metric_name(name) for numbers in host.points.values() for name in numbers} | {metric_name("step")}
    tracked |= {metric_name(name) for name in ADDED}
    ours = {name for name in named() if name.startswith("vmoco_")}
    assert len(ours) > 15
    assert ours <= tracked, f"nothing tracks {sorted(ours - tracked)}"
    alerted = {name for name in alerted_metrics() if name.startswith("vmoco_")}
    assert len(alerted) >= 8
    assert alerted <= tracked, f"nothing tracks {sorted(alerted - tracked)}"


def test_the_names_that_workers_and_driver_add_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`RayHost` counts faults under these names, beside the numbers of the loop; the driver shows that it runs."""
    sources = METRICS.parents[1] / "vmoco/train"
    worker = (sources / "worker.py").read_text()  # as text, because Ray must not be imported here
    assert all(f'["{name}"] = ' in worker for name in ADDED if name != RUNNING)
    shown: dict[str, tuple[float, dict[str, str]]] = {}
    gauges = Gauges("a")
    monkeypatch.setattr(
        gauges,
        "_gauge",
        lambda name: SimpleNamespace(set=lambda value, tags: shown.update({name: (value, tags)})),
    )
    gauges.running(True)
    assert shown == {RUNNING: (1.0, {"run": "a"})}
    assert "gauges.running(True)" in (sources / "launch.py").read_text()


def test_prometheus_reads_the_alerts_and_each_is_complete() -> None:
    """Each has a name of its own, an expression, a severity and one sentence, and the page says what to do about it."""
    config = yaml.safe_load((METRICS / "prometheus.yaml").read_text())
    assert config["rule_files"] == ["alerts.yaml"]
    rules = alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 6
    page = (METRICS.parent / "README.md").read_text()
    for rule in rules:
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert f"`{rule['alert']}`" in page


@pytest.mark.skipif(
    shutil.which("promtool") is None and not os.environ.get("CI"),
    reason="promtool, of Debian's package prometheus, is missing",
)
def test_alerts_fire_when_they_should() -> None:
    """On made-up series, by Prometheus itself: runs that go on, stand still, lose their workers or have ended."""
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts-test.yaml"]):
        ended = subprocess.run(["promtool", *command], cwd=METRICS, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr


def alerts() -> list[dict[str, Any]]:
    """The rules of all groups."""
    content = yaml.safe_load((METRICS / "alerts.yaml").read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def alerted_metrics() -> set[str]:
    """Every metric that an alert reads, without Ray's prefix."""
    return set(re.findall(r"\bray_(\w+)", " ".join(rule["expr"] for rule in alerts())))


def test_every_other_panel_asks_for_a_metric_of_ray() -> None:
    """Ray's own reporter defines the metrics of nodes, and its core that of the object store."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    others = {name for name in named() if not name.startswith("vmoco_")}
    assert others <= METRICS_GAUGES.keys() | NODES
    assert len(others) > 5
    alerted = {name for name in alerted_metrics() if not name.startswith("vmoco_")}
    assert alerted == {"node_disk_utilization_percentage"} <= METRICS_GAUGES.keys()


def test_prometheus_looks_where_the_manifests_open_the_port() -> None:
    """The port is the one that nodes are started with, the label and the name of the port those of the pods."""
    jobs = {job["job_name"]: job for job in yaml.safe_load((METRICS / "prometheus.yaml").read_text())["scrape_configs"]}
    (by_name,) = jobs["ray-by-name"]["dns_sd_configs"]
    services = yaml.safe_load((METRICS.parents[1] / "docker/compose.yaml").read_text())["services"]
    for name in by_name["names"]:
        assert f"--metrics-export-port={by_name['port']}" in services[name]["command"]
    (cluster,) = yaml.safe_load_all((METRICS.parent / "kubernetes/raycluster-cpu.yaml").read_text())
    pod = cluster["spec"]["headGroupSpec"]["template"]
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "ray"
    assert {"name": "metrics", "containerPort": by_name["port"]} in pod["spec"]["containers"][0]["ports"]
