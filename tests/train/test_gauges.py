"""What a run shows is read at Ray's metrics port, under its name and the run's."""

from __future__ import annotations

import time
import urllib.request

import pytest

from vmoco.cluster.local import LocalCluster


@pytest.mark.cluster
@pytest.mark.slow
def test_numbers_are_seen_at_the_metrics_port(ray_cluster: LocalCluster) -> None:
    """A number set in a worker is there within seconds, with a name that Prometheus takes and the run as its label."""
    import ray

    from vmoco.train.system_metrics import Gauges

    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self) -> None:
            self.gauges = Gauges("one run")

        def show(self) -> None:
            self.gauges.show({"loss": 6.5, "score/knn": 0.25}, step=7)

    worker = Worker.remote()  # type: ignore[attr-defined]
    (node,) = ray.nodes()
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    wanted = {"ray_vmoco_loss": 6.5, "ray_vmoco_score_knn": 0.25, "ray_vmoco_step": 7.0}
    seen: dict[str, float] = {}
    while seen != wanted:
        assert time.monotonic() < deadline, seen
        ray.get(worker.show.remote())
        time.sleep(1)
        lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
        shown = [line for line in lines if line.startswith("ray_vmoco_") and 'run="one run"' in line]
        seen = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in shown}
