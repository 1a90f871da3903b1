"""The arithmetic of a step is that of its forwards, and of a forward what others have counted."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import video

from tests.train.test_step import CPU, changed
from vmoco.model.cost import step_cost
from vmoco.presets import PRESETS
from vmoco.train import system_metrics
from vmoco.train.system_metrics import Utilisation

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
