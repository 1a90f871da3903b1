"""The dashboard shows metrics that exist, and Prometheus finds the port that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tests.train.test_loop import Notes, run
from vmoco.train.system_metrics import metric_name

METRICS = Path(__file__).parents[2] / "cluster/metrics"


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
    ours = {name for name in named() if name.startswith("vmoco_")}
    assert len(ours) > 15
    assert ours <= tracked, f"nothing tracks {sorted(ours - tracked)}"


def test_every_other_panel_asks_for_a_metric_of_ray() -> None:
    """Ray's own reporter defines the metrics of nodes, and its core that of the object store."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    others = {name for name in named() if not name.startswith("vmoco_")}
    assert others <= METRICS_GAUGES.keys() | {"object_store_memory"}
    assert len(others) > 5


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
