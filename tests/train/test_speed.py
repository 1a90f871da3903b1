"""Switches for speed change no number beyond rounding, and no rank compiles alone while the others wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import nn

from tests.dataset import make_data_set
from tests.train.test_step import ADVERSARIAL, CPU, changed
from vmoco.config import PretrainSettings, SpeedSwitch
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.model.generator import Generator
from vmoco.model.moco import MocoEncoder
from vmoco.train.speed import choose_kernels
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
    """What the networks compile goes to a backend that counts."""
    backend = Counted()

    def compile_with_it(module: nn.Module, **options: Any) -> None:
        nn.Module.compile(module, backend=backend, **options)  # type: ignore[no-untyped-call]

    torch.compiler.reset()
    for network in (MocoEncoder, Generator):
        monkeypatch.setattr(network, "compile", compile_with_it)
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


def states(manifest: Manifest, settings: PretrainSettings, num_steps: int = 3) -> dict[str, torch.Tensor]:
    """The whole state after some steps in one process."""
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=1)
    for number in range(num_steps):
        step(loader.batch(number))
    return {name: tensor.detach().clone() for name, tensor in state.tensors().items()}


def test_the_generator_is_compiled_if_asked_for(manifest: Manifest, counted: Counted) -> None:
    """Per micro-batch of a step in which G trains: G and the key encoder. The numbers are the same.

    What rank 0 looks at alone is still uncompiled, with its other number of clips.
    """
    settings = changed(COMPILED, train={"compile_generator": True})
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=1)
    for number in range(3):
        before = counted.calls
        step(loader.batch(number))
        assert counted.calls - before == 2 * settings.num_micro_batches
    seen = counted.graphs, counted.calls
    step.dropped_frames(loader.batch(0), num_clips=2)
    assert step.adversary_hardness(loader.batch(0)) is not None
    assert (counted.graphs, counted.calls) == seen
    for name, expected in states(manifest, ADVERSARIAL).items():
        torch.testing.assert_close(state.tensors()[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_both_embeddings_are_compiled_if_asked_for(manifest: Manifest, counted: Counted) -> None:
    """Key, q and q_real of each micro-batch; two backwards follow the forward of q, and the numbers are the same."""
    from torch._functorch import config

    settings = changed(COMPILED, train={"compile_generator_steps": True})
    with config.patch(donated_buffer=True):
        state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
        step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=1)
        assert not config.donated_buffer
        for number in range(3):
            before = counted.calls
            step(loader.batch(number))
            assert counted.calls - before == 3 * settings.num_micro_batches
    for name, expected in states(manifest, ADVERSARIAL).items():
        torch.testing.assert_close(state.tensors()[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_padded_channels_train_the_same_network(manifest: Manifest) -> None:
    """Three steps: the same names and shapes, and values equal up to rounding."""
    plain = changed(ADVERSARIAL, model={"backbone": "r2plus1d_nano"})
    found = states(manifest, changed(plain, train={"pad_channels": True}))
    expected = states(manifest, plain)
    assert found.keys() == expected.keys()
    assert any(not torch.equal(found[name], expected[name]) for name in found), "something is padded"
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_measures_only_where_it_is_asked_for_and_may(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, by its switch, and not in deterministic mode."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    train = changed(ADVERSARIAL, train={"cudnn_benchmark": True, "deterministic": deterministic}).train
    choose_kernels(train, CPU)
    choose_kernels(ADVERSARIAL.train, torch.device("cuda"))
    assert not torch.backends.cudnn.benchmark
    choose_kernels(train, torch.device("cuda"))
    assert torch.backends.cudnn.benchmark is not deterministic


def test_deterministic_mode_switches_all_of_them_off(manifest: Manifest, counted: Counted) -> None:
    """Nothing is compiled, no channel is padded: the bits are those of a run without switches."""
    plain = changed(ADVERSARIAL, model={"backbone": "r2plus1d_nano"}, train={"deterministic": True})
    switched = changed(plain, train=dict.fromkeys(get_args(SpeedSwitch), True))
    found, expected = states(manifest, switched, 1), states(manifest, plain, 1)
    assert counted.graphs == 0
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for switch in get_args(SpeedSwitch):
        assert not switched.train.speeds_up_by(switch)
        both = changed(ADVERSARIAL, train={"compile": True, switch: True}).train
        assert both.speeds_up_by(switch)
