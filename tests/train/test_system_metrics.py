"""The gauges at Ray's metrics port, the MFU and the staleness of the oldest keys."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import pytest
import torch
from torchvision.models import video

from tests.dataset import make_data_set
from tests.train.test_step import CPU, changed
from vmoco.cluster.local import LocalCluster
from vmoco.data.loader import Loader
from vmoco.model.cost import step_cost
from vmoco.presets import PRESETS
from vmoco.train import system_metrics
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep
from vmoco.train.system_metrics import Utilisation, oldest_key_similarity


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
            self.gauges.show({"loss": 6.5, "score/knn": 0.25, "step": 7.0})

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


SETTINGS = changed(PRESETS["paper"][1], data={"num_frames": 16}, scaling={"num_workers": 1})


@pytest.mark.parametrize(
    ("backbone", "weights"),
    [
        ("r3d_18", video.R3D_18_Weights.KINETICS400_V1),
        ("r2plus1d_18", video.R2Plus1D_18_Weights.KINETICS400_V1),
        ("mc3_18", video.MC3_18_Weights.KINETICS400_V1),
    ],
)
def test_a_forward_costs_what_torchvision_says(backbone: str, weights: video.R3D_18_Weights) -> None:
    """Torchvision lists billions of multiply-adds of a clip of 16x112x112; one is two operations here."""
    counted = step_cost(changed(SETTINGS, model={"backbone": backbone}), bf16=False).forward_flops
    assert counted == pytest.approx(2e9 * weights.meta["_ops"], rel=0.01)


def test_the_share_is_operations_over_time_and_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 forwards of each clip before the generator starts and 6 after, on a device of 1e12 operations a second."""
    monkeypatch.setattr(system_metrics, "_peak_flops", lambda device, dtype: 1e12)
    found = Utilisation(SETTINGS, CPU, None)
    one = step_cost(SETTINGS, bf16=False).forward_flops * SETTINGS.train.global_batch / 1e12
    start = SETTINGS.generator_start
    assert found.share(start - 1, seconds=8.0) == pytest.approx(4 * one / 8)
    assert found.share(start, seconds=8.0) == pytest.approx(6 * one / 8)


def test_the_peak_is_measured() -> None:
    """Some billions of operations a second, on any CPU."""
    assert 1e8 < system_metrics._peak_flops(CPU, torch.float32) < 1e14


@pytest.mark.parametrize(
    ("steps", "positives", "percent"),
    [
        *((steps, positives, 0.0) for steps in (1, 2, 3, 7) for positives in ("same_clip", "two_clips")),
        (3, "same_clip", 50.0),
    ],
)
def test_keys_of_an_encoder_that_stands_still_are_their_own_encodings(
    tmp_path: Path, steps: int, positives: str, percent: float
) -> None:
    """To the last digits, wherever in the ring of 20 slots the oldest whole batch of 8 is; another clip would show.

    Also where some clips are encoded backwards beside them. An encoder that has moved since gives less, and looking
    changes no tensor of the state.
    """
    settings = changed(
        PRESETS["tiny"][1],
        moco={"queue_size": 20, "momentum": 0.0, "reversed_negatives_percent": percent},
        train={"learning_rate": 1e-20, "weight_decay": 0.0},
        generator={"learning_rate": 1e-20},
        data={"positives": positives},
    )
    manifest = make_data_set(tmp_path)
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=1)
    assert oldest_key_similarity(step, state, loader) is None
    for number in range(steps):
        step(loader.batch(number))
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    assert oldest_key_similarity(step, state, loader) == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
    with torch.no_grad():
        _disturb(state)
    moved = oldest_key_similarity(step, state, loader)
    assert moved is not None
    assert moved < 0.999


def _disturb(state: TrainState) -> None:
    """Moves every weight of the key encoder by half of its size, in directions of a fixed draw."""
    random = torch.Generator().manual_seed(0)
    for parameter in state.moco.key.parameters():
        parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=random))
