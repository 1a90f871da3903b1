"""Ranks wait long for each other in a step that may be slow, and notice soon when one is lost later."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.dataset import make_data_set
from tests.ranks import run_on_ranks
from tests.train.test_loop import SETTINGS, Notes
from tests.train.test_step import CPU, changed
from vmoco.data.manifest import Manifest
from vmoco.train import distributed
from vmoco.train.loop import Requests, train
from vmoco.train.state import TrainState

STEP_SECONDS = 4.0


class SlowHost(Notes):
    """A host that sleeps before some steps.

    Args:
        seconds: how long, by the number of the step, counted from 1.
    """

    def __init__(self, seconds: dict[int, float]) -> None:
        super().__init__()
        self._seconds = seconds
        self.last_step_began = 0.0

    def requests(self) -> Requests:
        found = super().requests()
        time.sleep(self._seconds.get(self._asked, 0.0))
        self.last_step_began = time.monotonic()
        return found


def train_with_a_slow_rank(uri: str, seconds: dict[int, float], limit: float) -> tuple[int, str, float]:
    """On a rank: the steps that it took, the error that ended it, and how long the last step waited."""
    distributed.STEP_SECONDS = STEP_SECONDS
    distributed.wait_at_most(limit)  # Ray makes its group with this limit
    manifest = Manifest.load(uri)
    settings = changed(SETTINGS, scaling={"num_workers": 2}, train={"steps": 6})
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    host = SlowHost(seconds if distributed.rank() == 1 else {})
    try:
        train(settings, manifest, state, device=CPU, host=host)
    except RuntimeError as error:
        return state.step, str(error), time.monotonic() - host.last_step_began
    return state.step, "", 0.0


def test_a_slow_first_step_is_waited_for_and_a_lost_rank_is_not(tmp_path: Path) -> None:
    """A rank that is late by twice the limit of a step does no harm in step 1, and ends the run in step 4."""
    from vmoco.train.launch import torch_config

    make_data_set(tmp_path)
    late = {1: 2 * STEP_SECONDS, 4: 4 * STEP_SECONDS}
    limit = float(torch_config(use_gpu=False).timeout_s)
    steps, error, waited = run_on_ranks(2, train_with_a_slow_rank, str(tmp_path), late, limit)[0]
    assert steps == 3, error
    assert "Timed out waiting" in error
    assert STEP_SECONDS - 1 < waited < 2 * STEP_SECONDS


def test_ranks_send_texts_without_a_gpu() -> None:
    """With GPUs there is gloo for what is on the host beside nccl, and Ray takes the pair as nccl."""
    from ray.train.torch.config import _is_backend_nccl

    from vmoco.train.launch import torch_config

    assert torch_config(use_gpu=True).backend == "cpu:gloo,cuda:nccl"
    assert _is_backend_nccl("cpu:gloo,cuda:nccl")
    assert torch_config(use_gpu=False).backend == "gloo"


def test_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has both ranks, the GPU and what to do; a GPU of its own is fine, and CPUs are shared."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(distributed, "gather_text", lambda text: [text, "GPU-2", "GPU-1"])
    with pytest.raises(ValueError, match=r"ranks 0, 2 have the same GPU GPU-1, .*: lower --scaling\.num-workers 3, or"):
        distributed.require_own_gpu(cuda)
    distributed.require_own_gpu(CPU)
    monkeypatch.setattr(distributed, "gather_text", lambda text: [text, "GPU-2", "GPU-3"])
    distributed.require_own_gpu(cuda)
