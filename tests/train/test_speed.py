"""Switches for speed change no number beyond rounding, and no rank compiles alone while the others wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.dataset import make_data_set
from tests.train.test_step import ADVERSARIAL, CPU, changed
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.model.moco import MocoEncoder
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep
from vmoco.train.system_metrics import oldest_key_similarity

COMPILED = changed(ADVERSARIAL, train={"compile": True})


class Counted:
    """A backend of torch.compile that compiles nothing, and counts.

    Attributes:
        graphs: how often something was compiled.
        calls: how often something compiled ran.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*values: torch.Tensor) -> Any:
            self.calls += 1
            return graph(*values)

        return run


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """What the encoders compile goes to a backend that counts."""
    backend = Counted()

    def compile_with_it(module: nn.Module, **options: Any) -> None:
        nn.Module.compile(module, backend=backend, **options)  # type: ignore[no-untyped-call]

    torch.compiler.reset()
    monkeypatch.setattr(MocoEncoder, "compile", compile_with_it)
    yield backend
    torch.compiler.reset()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("set"))


def test_what_the_first_rank_looks_at_alone_compiles_nothing(manifest: Manifest, counted: Counted) -> None:
    """Age of the oldest keys and hardness of the drops: the others wait 2 minutes at most for the next step."""
    state = TrainState(COMPILED, manifest_hash=manifest.hash, device=CPU)
    step, loader = TrainStep(COMPILED, state, CPU), Loader(manifest, COMPILED, rank=0, world_size=1)
    step(loader.batch(0))
    before = counted.graphs, counted.calls
    assert before[0] > 0
    assert oldest_key_similarity(step, state, loader) is not None
    assert step.adversary_hardness(loader.batch(0)) is not None
    assert (counted.graphs, counted.calls) == before


def test_both_embeddings_that_the_generator_compares_come_from_the_same_kernels(
    manifest: Manifest, counted: Counted
) -> None:
    """In a step in which G trains, neither q nor q_real is compiled; keys are, and q is in other steps."""
    settings = changed(COMPILED, generator={"every": 2})
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=1)
    calls = []
    for number in range(2):
        before = counted.calls
        step(loader.batch(number))
        calls.append((counted.calls - before) / settings.num_micro_batches)
    assert calls == [1, 2]
