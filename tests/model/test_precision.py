"""The arithmetic of the encoders and its reason, and the deterministic mode; what cannot be had is refused first."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from vmoco.model.precision import autocast_dtype, require_determinism

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU by name only; the parameter says whether it computes in bf16."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    # Emulated bf16 is there on any GPU: who asks for it as well gets yes.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or request.param
    )


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_cpu_computes_in_float32(precision: str) -> None:
    """No autocast, with a reason for the log."""
    dtype, reason = autocast_dtype(precision, CPU)
    assert dtype is None
    assert reason.startswith("fp32 ")


def test_bf16_on_a_cpu_is_refused() -> None:
    """The sentence has the setting, why, and what is allowed."""
    with pytest.raises(ValueError, match=r"^--train\.precision bf16 is not allowed on a CPU, because .*: use auto or"):
        autocast_dtype("bf16", CPU)


@pytest.mark.parametrize("gpu", [True], indirect=True)
@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", None)]
)
@pytest.mark.usefixtures("gpu")
def test_gpu_with_bf16_uses_it(precision: str, expected: torch.dtype | None) -> None:
    """Unless fp32 is asked for."""
    assert autocast_dtype(precision, CUDA)[0] is expected


@pytest.mark.parametrize("gpu", [False], indirect=True)
@pytest.mark.usefixtures("gpu")
def test_gpu_without_bf16_computes_in_float32() -> None:
    """`auto` says which GPU it is; asking for bf16 is refused, although it could be emulated slowly."""
    assert autocast_dtype("auto", CUDA) == (None, "fp32 because a GPU has no bf16 arithmetic")
    with pytest.raises(
        ValueError, match=r"^--train\.precision bf16, but a GPU does not compute in it: use auto or fp32$"
    ):
        autocast_dtype("bf16", CUDA)


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
    with pytest.raises(ValueError, match=r"--train\.deterministic, .* --model\.backbone s3d .*: use another"):
        require_determinism("s3d", torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()
    require_determinism("s3d", torch.device("cpu"))
