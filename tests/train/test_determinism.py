"""The deterministic mode holds for the process, and what cannot be had is said before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from vmoco.model.precision import require_determinism


@pytest.fixture
def process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The mode belongs to the process: it is turned off again."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("process_as_it_was")
def test_nondeterministic_work_becomes_an_error() -> None:
    """torch refuses from then on, and cuDNN and cuBLAS are asked for the same."""
    torch.backends.cudnn.benchmark = True
    require_determinism("r3d_18", torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


@pytest.mark.usefixtures("process_as_it_was")
def test_backbone_without_deterministic_gradient_is_refused() -> None:
    """On a GPU: on a CPU it has one."""
    with pytest.raises(ValueError, match=r"train\.deterministic, .* model\.backbone s3d .*: use another"):
        require_determinism("s3d", torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()
    require_determinism("s3d", torch.device("cpu"))
