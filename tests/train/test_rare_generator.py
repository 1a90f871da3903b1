"""A generator that learns in few steps, or from few clips, learns the same there, and D does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.dataset import make_data_set
from tests.train.test_step import ADVERSARIAL, CPU, SOME, ExactStep, StemGradients, changed, exact_state, take_steps
from vmoco.data.loader import Loader
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep


def test_steps_in_which_the_generator_trains_are_the_same_however_rarely_it_does(tmp_path: Path) -> None:
    """After the first step, in which it trains, the whole state has the same bits with every 4 as with every 1."""
    make_data_set(tmp_path)
    one, four = (take_steps(str(tmp_path), 1, changed(ADVERSARIAL, generator={"every": n})) for n in (1, 4))
    assert one.keys() == four.keys()
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_a_generator_may_learn_from_some_clips(tmp_path: Path) -> None:
    """With 50 % of 4: 2 clips with dropped frames, the same 2 complete, and D's 4; D moves as with all.

    In float64 with frozen batch normalisation G's gradient is the mean over the clips from which it learns, so that of
    the first and that of the last half of each micro-batch have that of all as their mean.
    """
    manifest = make_data_set(tmp_path)
    sizes: list[int] = []
    state = TrainState(SOME, manifest_hash=manifest.hash, device=CPU)
    state.moco.query.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    with StemGradients() as counter:
        metrics = TrainStep(SOME, state, CPU)(Loader(manifest, SOME, rank=0, world_size=1).batch(0))
    assert sizes == [2, 2, 4] * SOME.num_micro_batches
    assert counter.count == SOME.num_micro_batches
    assert metrics.dropped().sum() == 2 * 12
    assert all(parameter.requires_grad for parameter in state.moco.query.parameters())
    whole = take_steps(str(tmp_path), 1)
    for name, tensor in state.tensors().items():
        if name.startswith(("query.", "key.", "queue.")):
            assert torch.equal(tensor, whole[name]), name

    class LastHalf(ExactStep):
        """Shows each micro-batch in the opposite order, so that G learns from the other half."""

        def _learn_from_some(self, clips: torch.Tensor, dropped: torch.Tensor, **rest: Any) -> None:
            flipped = {name: rest[name].flip(0) for name in ("fill", "importance")}
            super()._learn_from_some(clips.flip(0), dropped.flip(0), metrics=rest["metrics"], **flipped)

    moved = []
    for settings, kind in ((ADVERSARIAL, ExactStep), (SOME, ExactStep), (SOME, LastHalf)):
        exact = exact_state(settings, manifest)
        before = exact.moco.generator.score.weight.detach().clone()
        kind(settings, exact, CPU)(Loader(manifest, settings, rank=0, world_size=1).batch(0))
        moved.append(exact.moco.generator.score.weight.detach() - before)
    assert not torch.allclose(moved[1], moved[0], rtol=1e-3, atol=0)
    torch.testing.assert_close((moved[1] + moved[2]) / 2, moved[0], rtol=1e-9, atol=0)
