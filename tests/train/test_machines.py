"""Every node of a run is measured, by one reporter, and each sample arrives once, whatever tracker and run do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_spool import Notebook
from tests.waiting import wait_until
from vmoco import spool as spool_module
from vmoco.spool import Spool
from vmoco.train import machines
from vmoco.train.machines import Collector, Reporter, Sample, Samples, SystemMetrics, metric_of, node_name


def test_the_machine_is_watched() -> None:
    """Processor, memory, disk and network have numbers, by the names of MLflow's system metrics."""
    system = SystemMetrics()
    system.numbers()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # this process has a processor for itself
        pass
    numbers = system.numbers()
    names = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"}
    assert names <= set(numbers)
    assert {"network_receive_megabytes", "network_transmit_megabytes"} <= set(numbers)
    assert numbers["cpu_utilization_percentage"] > 1
    assert numbers["system_memory_usage_megabytes"] > 0


def node(node_id: str, host: str, *, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": node_id, "NodeManagerHostname": host, "Alive": alive}


@pytest.mark.parametrize(
    ("nodes", "name"),
    [
        ([node("aaaaaaaaaa", "laptop")], ""),
        ([node("aaaaaaaaaa", "one"), node("b", "lost", alive=False)], ""),
        ([node("aaaaaaaaaa", "gpu-1.lan"), node("b", "gpu-2.lan")], "gpu-1.lan"),
        ([node("aaaaaaaaaa", "same"), node("b", "same")], "same-aaaaaaaa"),
        ([node("aaaaaaaaaa", "odd/name:1"), node("b", "two")], "odd_name_1"),
    ],
)
def test_a_node_is_named_by_its_host(nodes: list[dict[str, Any]], name: str) -> None:
    """Where the cluster has several; what MLflow allows in the name of a metric is kept of it."""
    assert node_name(nodes, "aaaaaaaaaa") == name
    assert metric_of(name, "x") == (f"system/{name}/x" if name else "system/x")


def test_samples_are_fewer_in_large_clusters() -> None:
    """Each 10 s up to 20 nodes; with 128 nodes two a second from all of them."""
    assert [machines.seconds_between(number) for number in (1, 20, 128)] == [10, 10, 64]


def test_a_worker_comes_before_an_evaluation_of_its_node() -> None:
    """The samples of an evaluation count on other nodes, and five minutes after the last one of a worker."""
    samples = Samples()
    rows = [("a", 0, True), ("a", 30, False), ("b", 30, False), ("a", 299, False), ("a", 301, False), ("a", 310, True)]
    for name, second, by_worker in rows:
        samples.add(Sample(name, 10**12 + 1000 * second, {"cpu": float(second)}), by_worker=by_worker)
    assert [(name, numbers["cpu"]) for name, _, numbers in samples.take()] == [
        ("a", 0),
        ("b", 30),
        ("a", 301),
        ("a", 310),
    ]
    assert samples.take() == []


def test_no_sample_is_lost_or_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes report while the tracker is away, the run starts again from an earlier step: all samples arrive once.

    A node reports about once in its interval, and once more at its end.
    """
    monkeypatch.setattr(spool_module, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(machines, "_TAKE_SECONDS", 0.02)
    samples, tracker, file = Samples(), Notebook(), str(tmp_path / "spool.json")
    sent: list[tuple[str, float]] = []
    clock = iter(range(10**6))

    def report(name: str) -> Reporter:
        def send(numbers: dict[str, float]) -> None:
            value = numbers["system_memory_usage_megabytes"]
            sent.append((metric_of(name, "memory"), value))
            samples.add(Sample(name, next(clock), {"memory": value}), by_worker=True)

        return Reporter(send, seconds=0.1, warn=lambda line: pytest.fail(line))

    for step, down in ((40, False), (32, True), (48, False)):
        tracker.down = down
        spool = Spool(tracker, name="t", uri=file)
        collector = Collector(samples.take, spool)
        collector.step = step
        reporters, before = [report("one"), report("two")], len(sent)
        wait_until(lambda before=before: len(sent) >= before + 4, "both have reported", seconds=30)  # type: ignore[misc]
        for reporter in reporters:
            reporter.close()
        collector.close()
        spool.close(timeout=0.2 if down else 30.0)
    assert sorted((name, value) for name, _, value, _ in tracker.rows) == sorted(sent)
    assert {step for _, step, *_ in tracker.rows} == {32, 40, 48}
    assert {name for name, *_ in tracker.rows} == {"system/one/memory", "system/two/memory"}


def test_a_machine_that_cannot_be_measured_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, and training goes on."""

    class Broken:
        def collect_metrics(self) -> None:
            raise OSError("the GPU is lost")

    monkeypatch.setattr(machines, "machine_monitors", lambda: [Broken()])
    warnings: list[str] = []
    reporter = Reporter(lambda numbers: None, seconds=0.01, warn=warnings.append)
    wait_until(lambda: bool(warnings), "it warns", seconds=10)
    reporter.close()
    assert warnings == ["warning: this machine is no longer measured: OSError: the GPU is lost"]
