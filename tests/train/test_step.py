"""One step on several ranks is the step of one process, and what must be equal on all ranks is equal bit for bit."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dataset import make_data_set
from tests.ranks import run_on_ranks
from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader, View
from vmoco.data.manifest import Manifest
from vmoco.model.generator import drop_frames, keep_mask
from vmoco.model.moco import Contrast
from vmoco.presets import PRESETS
from vmoco.seed import hash64, uniform
from vmoco.train import distributed
from vmoco.train.metrics import StepMetrics
from vmoco.train.state import TrainState
from vmoco.train.step import NonFiniteError, TrainStep

CPU = torch.device("cpu")


def changed(settings: PretrainSettings, **groups: dict[str, object]) -> PretrainSettings:
    """The settings with some fields of some groups replaced."""
    values = settings.model_dump()
    for group, fields in groups.items():
        values[group] |= fields
    return PretrainSettings.model_validate(values)


# From its first step on: the generator trains, momentum is off so that one step shows the gradient itself.
ADVERSARIAL = changed(
    PRESETS["tiny"][1],
    generator={"start_percent": 0.0},
    train={"steps": 8, "global_batch": 12, "sgd_momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"},
    moco={"queue_size": 20},
)


class ExactStep(TrainStep):
    """In float64, so that only the order of sums is left as a difference."""

    def _augmented(self, view: View, micro: slice) -> torch.Tensor:
        return super()._augmented(view, micro).double()


def exact_state(settings: PretrainSettings, manifest: Manifest) -> TrainState:
    """A float64 state with frozen batch normalisation and a queue that is not empty."""
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    moco = state.moco
    for module in (moco.query, moco.key, moco.generator):
        module.double()
    for module in [*moco.query.modules(), *moco.key.modules()]:
        if isinstance(module, nn.BatchNorm3d):
            module.eval()
    moco.queue.keys = moco.queue.keys.double()
    keys = torch.nn.functional.normalize(
        torch.randn(15, 32, dtype=torch.float64, generator=torch.manual_seed(3)), dim=1
    )
    moco.queue.enqueue(keys, torch.arange(15), step=0)
    return state


def gradients_of_one_step(folder: str, settings: PretrainSettings) -> dict[str, torch.Tensor]:
    """Gradients, divided by nothing: change of each parameter in one step of plain SGD, over the learning rate."""
    manifest = Manifest.load(folder)
    state = exact_state(settings, manifest)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    loader = Loader(manifest, settings, rank=distributed.rank(), world_size=distributed.world_size())
    ExactStep(settings, state, CPU)(loader.batch(0))
    lr = {
        "query": state.query_optimizer.param_groups[0]["lr"],
        "generator": state.generator_optimizer.param_groups[0]["lr"],
    }
    names = {f"query.{name}" for name, _ in state.moco.query.named_parameters()}
    names |= {f"generator.{name}" for name, _ in state.moco.generator.named_parameters()}
    after = state.tensors()
    return {name: (before[name] - after[name]) / lr[name.split(".")[0]] for name in sorted(names)}


SAMPLED = changed(ADVERSARIAL, generator={"select": "sample", "relative": True})
CONTRAST = changed(ADVERSARIAL, generator={"objective": "contrast"})
SOME = changed(ADVERSARIAL, generator={"clips_percent": 50.0})
REVERSED = changed(ADVERSARIAL, moco={"reversed_negatives_percent": 50.0})


# Layer normalisation, and branches that are left out. At 40 pixels the last stage has 2x2 tokens, so its table counts.
TRANSFORMER = changed(
    ADVERSARIAL,
    model={"backbone": "swin3d_nano", "drop_path": 0.4},
    augment={"size": 40},
    train={"clip_gradient_norm": 0.01},
)


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        *((2, ADVERSARIAL), (3, ADVERSARIAL), (2, SAMPLED), (2, CONTRAST), (2, SOME), (2, REVERSED), (3, REVERSED)),
        (2, TRANSFORMER),
    ],
)
def test_gradients_on_ranks_equal_those_of_one_process(
    tmp_path: Path, num_ranks: int, settings: PretrainSettings
) -> None:
    """Both losses: every parameter of D and of G moves as in one process on the joined batch (float64, 1e-9).

    Batch normalisation is frozen. On 2 ranks one has 1 micro-batch and the other 2: gradients add up before they are
    averaged.
    """
    make_data_set(tmp_path)
    alone = gradients_of_one_step(str(tmp_path), settings)
    together = run_on_ranks(num_ranks, gradients_of_one_step, str(tmp_path), settings)
    for name, expected in alone.items():
        assert expected.abs().max() > 0, f"{name} receives no gradient"
        for rank, found in enumerate(together):
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
            assert torch.equal(found[name], together[0][name]), f"{name} on rank {rank} is not that of rank 0"


def test_clipping_is_that_of_the_joined_gradient(tmp_path: Path) -> None:
    """On 2 ranks each parameter of D moves by what torch's own clipping leaves of the gradient of one process.

    The norm is over all parameters of D together; those of G are not clipped. The metrics have the norm before.
    """
    manifest = make_data_set(tmp_path)
    free = changed(TRANSFORMER, train={"clip_gradient_norm": 0.0})
    joined = gradients_of_one_step(str(tmp_path), free)
    names = [name for name in joined if name.startswith("query.")]
    parameters = [nn.Parameter(torch.zeros_like(joined[name])) for name in names]
    for parameter, name in zip(parameters, names, strict=True):
        parameter.grad = joined[name].clone()
    norm = float(nn.utils.clip_grad_norm_(parameters, 0.01))
    assert norm > 0.02, "there is something to clip"
    for found in run_on_ranks(2, gradients_of_one_step, str(tmp_path), TRANSFORMER):
        for parameter, name in zip(parameters, names, strict=True):
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
        for name in joined.keys() - set(names):
            torch.testing.assert_close(found[name], joined[name], rtol=1e-9, atol=1e-12)
    for settings, clipped in ((TRANSFORMER, True), (changed(TRANSFORMER, train={"clip_gradient_norm": 1e3}), False)):
        state = exact_state(settings, manifest)
        metrics = ExactStep(settings, state, CPU)(Loader(manifest, settings, rank=0, world_size=1).batch(0))
        assert metrics.clipped is not None
        assert bool(metrics.clipped) == clipped
        assert metrics.numbers()["gradient_norm"] == pytest.approx(norm)


@pytest.mark.parametrize(
    "name",
    ["swin3d_nano", *(pytest.param(name, marks=pytest.mark.slow) for name in ("swin3d_t", "swin3d_s", "mvit_v2_s"))],
)
def test_transformers_train(tmp_path: Path, name: str) -> None:
    """Two adversarial steps as their papers train: both losses are finite, and every layer of D has moved.

    Torch's global generator is where it was: nothing is drawn from it.
    """
    manifest = make_data_set(tmp_path)
    settings = changed(
        ADVERSARIAL,
        model={"backbone": name, "drop_path": 0.2},
        train={
            **{"optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 0.05, "weight_decay_on": "weights"},
            **{"clip_gradient_norm": 1.0, "global_batch": 4, "micro_batch": 2},
        },
    )
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    before = {name: parameter.detach().clone() for name, parameter in state.moco.query.named_parameters()}
    step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=1)
    batches = [loader.batch(number) for number in range(2)]
    drawn = torch.get_rng_state()
    numbers = [step(batch).numbers() for batch in batches]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(math.isfinite(value) for each in numbers for value in each.values())
    assert numbers[1]["generator_loss"] < 0
    still = {name for name, parameter in state.moco.query.named_parameters() if torch.equal(parameter, before[name])}
    # The class token sees no positions, so those of the last block have no effect on it.
    assert all(name.startswith("backbone.trunk.blocks.15.attn.rel_pos") for name in still), still


class PathsStep(TrainStep):
    """Notes the factors that each query encoder's forward gets."""

    def __init__(self, settings: PretrainSettings, state: TrainState) -> None:
        super().__init__(settings, state, CPU)
        self.found: list[torch.Tensor | None] = []
        state.moco.query.register_forward_pre_hook(lambda _, args: self.found.append(args[1] if args[1:] else None))


def factors_of_one_step(folder: str, settings: PretrainSettings) -> list[torch.Tensor | None]:
    """The factors of each forward of D in the second step on this rank, in order."""
    manifest = Manifest.load(folder)
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step = PathsStep(settings, state)
    loader = Loader(manifest, settings, rank=distributed.rank(), world_size=distributed.world_size())
    state.step = 1
    step(loader.batch(1))
    return step.found


def test_the_branches_that_are_left_out_follow_from_clip_and_seed(tmp_path: Path) -> None:
    """On 1 and 3 ranks alike, another seed gives others; x~ and x have the same ones, and keys lose none.

    The same function of the same draws in plain Python: below the rate of its block a branch is left out.
    """
    manifest = make_data_set(tmp_path)
    alone = factors_of_one_step(str(tmp_path), TRANSFORMER)
    assert len(alone) == 6, "x~ and x of 3 micro-batches"
    pairs = [each for each in alone if each is not None]
    for dropped, whole in zip(pairs[::2], pairs[1::2], strict=True):
        assert torch.equal(dropped, whole)
    assert len(pairs) == 6
    together = run_on_ranks(3, factors_of_one_step, str(tmp_path), TRANSFORMER)
    assert all(torch.equal(found, mine) for found, mine in zip(itertools.chain(*together), alone, strict=True))
    loader = Loader(manifest, TRANSFORMER, rank=0, world_size=1)
    expected = [
        [
            0.0 if float(uniform(np.array([seed]), hash64("drop path", n))[0]) < rate else 1 / (1 - rate)
            for n, rate in enumerate(TRANSFORMER.drop_rates)
        ]
        for seed in loader.plan.batch(1).seed
    ]
    torch.testing.assert_close(torch.cat(pairs[::2]), torch.tensor(expected))
    assert {0.0, 1.0} < set(torch.cat(pairs).flatten().tolist())
    other = changed(TRANSFORMER, run={"seed": 1})
    assert not torch.equal(torch.cat(pairs[::2]), Loader(manifest, other, rank=0, world_size=1).batch(1).branch_factors)
    assert Loader(manifest, ADVERSARIAL, rank=0, world_size=1).batch(1).branch_factors is None
    some = changed(TRANSFORMER, generator={"clips_percent": 50.0})
    found = factors_of_one_step(str(tmp_path), some)
    sizes = [None if each is None else len(each) for each in found]
    assert sizes == [2, 2, 4] * 3, "G's clips are encoded twice, then all"
    assert all(torch.equal(part, pairs[2 * n][:2]) for n in range(3) for part in found[3 * n : 3 * n + 2])


def take_steps(folder: str, num_steps: int, settings: PretrainSettings = ADVERSARIAL) -> dict[str, torch.Tensor]:
    """The whole state of this rank after some steps."""
    manifest = Manifest.load(folder)
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step = TrainStep(settings, state, CPU)
    loader = Loader(manifest, settings, rank=distributed.rank(), world_size=distributed.world_size())
    for number in range(num_steps):
        step(loader.batch(number))
    return {name: tensor.detach().clone() for name, tensor in state.tensors().items()}


def test_all_ranks_hold_the_same_state_and_queue_order_is_that_of_one_process(tmp_path: Path) -> None:
    """After 4 steps, with the queue of 20 wrapped twice by batches of 12: bitwise equal keys, ages, videos and weights.

    On another number of ranks the order of the queue (videos, ages) is the same bit for bit.
    """
    make_data_set(tmp_path)
    first, second = run_on_ranks(2, take_steps, str(tmp_path), 4)
    assert set(first) == set(second)
    # The count of batches is each rank's own: normalisation does not use it.
    differing = [n for n in first if not torch.equal(first[n], second[n]) and "num_batches_tracked" not in n]
    assert differing == []
    alone = take_steps(str(tmp_path), 4)
    for name in ("queue.video_ids", "queue.born", "queue.pointer"):
        assert torch.equal(first[name], alone[name]), name
    assert len(set(first["queue.born"].tolist())) == 2  # 12 keys of the last step, 8 of the one before


def exact_keys(folder: str) -> torch.Tensor:
    """The queue after one step in float64, batch normalisation by the micro-batches as in training."""
    manifest = Manifest.load(folder)
    state = exact_state(ADVERSARIAL, manifest)
    for encoder in (state.moco.query, state.moco.key):
        encoder.train()
    loader = Loader(manifest, ADVERSARIAL, rank=distributed.rank(), world_size=distributed.world_size())
    ExactStep(ADVERSARIAL, state, CPU)(loader.batch(0))
    return state.moco.queue.keys.clone()


def test_ranks_draw_the_same_batches_whatever_their_number(tmp_path: Path) -> None:
    """Promise 2 seen from the weights: before the first update, 1 and 3 ranks make the same keys (float64, 1e-9)."""
    make_data_set(tmp_path)
    alone = exact_keys(str(tmp_path))
    for together in run_on_ranks(3, exact_keys, str(tmp_path)):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_generator_sees_its_own_loss_alone(tmp_path: Path) -> None:
    """With lambda near 0 the generator's gradient vanishes, although the contrastive loss does not."""
    manifest = make_data_set(tmp_path)
    norms = {}
    for strength in (1e-12, 100.0):
        settings = changed(ADVERSARIAL, generator={"strength": strength})
        state = exact_state(settings, manifest)
        metrics = ExactStep(settings, state, CPU)(Loader(manifest, settings, rank=0, world_size=1).batch(0))
        norms[strength] = metrics.numbers()
    assert norms[100.0]["generator_gradient_norm"] > 1e-4
    assert norms[1e-12]["generator_gradient_norm"] < 1e-9
    assert norms[1e-12]["gradient_norm"] == pytest.approx(norms[100.0]["gradient_norm"])


def test_reversed_negatives_change_the_loss_of_their_own_clips_alone(tmp_path: Path) -> None:
    """With half of them, 2 of each 4 clips have one more negative, which is the key encoder's view of x' backwards.

    Batch normalisation is frozen, so each clip is encoded by itself here. The queue gets the keys that it gets without
    the option.
    """
    manifest = make_data_set(tmp_path)
    batch = Loader(manifest, REVERSED, rank=0, world_size=1).batch(0)
    chosen = sorted(batch.key_order[batch.reversed_keys].tolist())
    assert len(chosen) == 6
    found: dict[PretrainSettings, tuple[torch.Tensor, torch.Tensor]] = {}
    for settings in (ADVERSARIAL, REVERSED):
        state = exact_state(settings, manifest)
        losses: list[Contrast] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepMetrics, "add", lambda _, compared, losses=losses: losses.append(compared))
            ExactStep(settings, state, CPU)(Loader(manifest, settings, rank=0, world_size=1).batch(0))
        found[settings] = torch.cat([each.loss for each in losses]).detach(), state.moco.queue.keys
    (plain, keys), (loss, keys_with) = found[ADVERSARIAL], found[REVERSED]
    torch.testing.assert_close(keys_with, keys, rtol=0, atol=1e-12)
    differing = [clip for clip in range(12) if abs(loss[clip] - plain[clip]) > 1e-9]
    assert differing == chosen

    # e^loss = 1 + sum of negatives over the positive: a reversed key adds e^((q.r - q.k) / tau).
    state = exact_state(REVERSED, manifest)
    step, moco = ExactStep(REVERSED, state, CPU), state.moco
    views = step._augmented(batch.key, slice(None))[torch.argsort(batch.key_order)]
    queries = step._augmented(batch.query, slice(None))
    with torch.no_grad():
        for clip in chosen:
            mask = keep_mask(moco.generator(queries[clip : clip + 1]), REVERSED.num_dropped)
            fill = queries[clip : clip + 1].mean(dim=(3, 4), keepdim=True)
            query = moco.query(drop_frames(queries[clip : clip + 1], mask, fill))
            backwards = views[clip : clip + 1][:, :, list(reversed(range(8)))]
            gap = float((query * (moco.key(backwards) - moco.key(views[clip : clip + 1]))).sum())
            more = math.exp(gap / REVERSED.moco.temperature)
            assert math.exp(loss[clip]) - math.exp(plain[clip]) == pytest.approx(more, rel=1e-6)


class StemGradients(TorchDispatchMode):
    """Counts how often a loss is differentiated by the pixels of clips."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            clips, wanted = args[1], args[-1]
            self.count += int(clips.dim() == 5 and clips.shape[1] == 3 and wanted[0])
        return func(*args, **(kwargs or {}))


def test_pixels_are_differentiated_once(tmp_path: Path) -> None:
    """Once per micro-batch, for G alone: of the small network that gradient costs as much as a whole backward."""
    manifest = make_data_set(tmp_path)
    step = TrainStep(ADVERSARIAL, TrainState(ADVERSARIAL, manifest_hash=manifest.hash, device=CPU), CPU)
    with StemGradients() as counter:
        step(Loader(manifest, ADVERSARIAL, rank=0, world_size=1).batch(0))
    assert counter.count == ADVERSARIAL.num_micro_batches


def test_clips_that_are_always_grey_are_augmented_as_one_channel(tmp_path: Path) -> None:
    """With grey_probability 1 the three channels have the same bits; they do not where a clip may have colours."""
    manifest = make_data_set(tmp_path)
    equal = {}
    for probability in (0.5, 1.0):
        settings = changed(ADVERSARIAL, augment={"grey_probability": probability, "standardise": True})
        step = TrainStep(settings, TrainState(settings, manifest_hash=manifest.hash, device=CPU), CPU)
        clips = step._augmented(Loader(manifest, settings, rank=0, world_size=1).batch(0).query, slice(None))
        equal[probability] = torch.equal(clips, clips[:, :1].expand_as(clips))
        assert clips.is_contiguous(memory_format=torch.channels_last_3d)
    assert equal == {0.5: False, 1.0: True}


def test_running_statistics_follow_the_query_alone(tmp_path: Path) -> None:
    """q_real leaves the running statistics alone: each layer counts one batch per micro-batch, and not two."""
    make_data_set(tmp_path)
    state = take_steps(str(tmp_path), 2)
    counts = {int(value) for name, value in state.items() if "num_batches_tracked" in name}
    assert counts == {2 * ADVERSARIAL.num_micro_batches}


def step_with_a_bad_clip(folder: str) -> tuple[str, bool]:
    """Makes the second rank's frames produce a NaN; returns the error and whether the state is untouched."""
    manifest = Manifest.load(folder)
    state = TrainState(ADVERSARIAL, manifest_hash=manifest.hash, device=CPU)
    before = {name: tensor.clone() for name, tensor in state.moco.query.named_parameters()}
    step = TrainStep(ADVERSARIAL, state, CPU)
    batch = Loader(manifest, ADVERSARIAL, rank=distributed.rank(), world_size=2).batch(0)
    if distributed.rank() == 1:
        batch.query.draws[0] = float("nan")
    try:
        step(batch)
    except NonFiniteError as error:
        same = all(torch.equal(before[name], tensor) for name, tensor in state.moco.query.named_parameters())
        return str(error), same and batch.clip_ids[0] in str(error) if distributed.rank() == 1 else same
    return "", False


def test_a_nan_on_one_rank_stops_all_before_the_optimizer(tmp_path: Path) -> None:
    """Both ranks raise the same sentence, naming step, rank and clips, and no weight has changed."""
    make_data_set(tmp_path)
    (first, first_same), (second, second_same) = run_on_ranks(2, step_with_a_bad_clip, str(tmp_path))
    assert first == second
    assert "step 0" in first
    assert "rank 1, clips" in first
    assert "rank 0" not in first
    assert first_same
    assert second_same


def test_a_generator_that_does_not_train_still_chooses(tmp_path: Path) -> None:
    """With every 3, G changes in the steps 0 and 3 alone, drops 2 of 8 frames in all, and leaves D its own gradient.

    D of the first two steps is the same as with every 1, because G's first choice is the same; q_real is encoded in
    the steps in which G trains.
    """
    manifest = make_data_set(tmp_path)
    settings = changed(ADVERSARIAL, generator={"every": 3})
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=1)
    encoded = 0

    def count(*_: object) -> None:
        nonlocal encoded
        encoded += 1

    state.moco.query.register_forward_hook(count)
    changes, forwards = [], []
    for number in range(5):
        before, encoded = state.moco.generator.score.weight.detach().clone(), 0
        metrics = step(loader.batch(number))
        changes.append(not torch.equal(before, state.moco.generator.score.weight))
        forwards.append(encoded // settings.num_micro_batches)
        assert float(metrics.dropped().sum()) == 2 * 12
        assert ("generator_loss" in metrics.numbers()) == metrics.generator_trained == changes[-1]
    assert changes == [True, False, False, True, False]
    assert forwards == [2, 1, 1, 2, 1]


def test_contrast_encodes_the_query_once(tmp_path: Path) -> None:
    """L_G is -L_D, q_real is not encoded, the difference stays unknown, and D moves as under the other objective."""
    manifest = make_data_set(tmp_path)
    outcomes = {}
    for settings in (ADVERSARIAL, CONTRAST):
        state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
        forwards: list[int] = []
        state.moco.query.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        numbers = TrainStep(settings, state, CPU)(Loader(manifest, settings, rank=0, world_size=1).batch(0)).numbers()
        outcomes[settings] = numbers, state, len(forwards) // settings.num_micro_batches
    numbers, state, forwards_of_contrast = outcomes[CONTRAST]
    assert (forwards_of_contrast, outcomes[ADVERSARIAL][2]) == (1, 2)
    assert numbers["generator_loss"] == pytest.approx(-numbers["loss"])
    assert float(state.difference) == 0
    for name, weight in state.moco.query.named_parameters():
        torch.testing.assert_close(weight, outcomes[ADVERSARIAL][1].moco.query.get_parameter(name))


def test_hardness_compares_the_generators_frames_with_random_ones(tmp_path: Path) -> None:
    """(1 - cosine) of each clip with the complete one, in evaluation mode: clip by clip, one encoder call each.

    G that finds all frames equally important, and samples, drops what random dropping does: exactly 1. Looking changes
    no tensor, no mode and no random state. Before G starts there is nothing to measure.
    """
    manifest = make_data_set(tmp_path)
    state = TrainState(SAMPLED, manifest_hash=manifest.hash, device=CPU)
    step, batch = TrainStep(SAMPLED, state, CPU), Loader(manifest, SAMPLED, rank=0, world_size=1).batch(0)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    random = torch.get_rng_state()
    found = step.adversary_hardness(batch)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in state.moco.query.modules())

    moco, size = state.moco, SAMPLED.train.micro_batch
    clips = step._augmented(batch.query, slice(0, size))
    noise = batch.random_importance[:size]
    sums = [0.0, 0.0]
    moco.query.eval()
    with torch.no_grad():
        scores = moco.generator(clips).log() - torch.log(-torch.log(noise))
        for clip in range(size):
            whole = moco.query(clips[clip : clip + 1])
            for place, order in enumerate((scores[clip], noise[clip])):
                less = clips[clip : clip + 1].clone()
                for frame in order.topk(2).indices.tolist():
                    less[:, :, frame] = less[:, :, frame].mean(dim=(2, 3), keepdim=True)
                sums[place] += 1 - float((moco.query(less) * whole).sum())
        moco.query.train()
        assert found == pytest.approx(sums[0] / sums[1], rel=1e-3)
        moco.generator.score.weight.zero_()
    assert step.adversary_hardness(batch) == 1
    late = changed(SAMPLED, generator={"start_percent": 50.0})
    assert TrainStep(late, state, CPU).adversary_hardness(batch) is None


@pytest.mark.slow  # a minute of a C++ compiler
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_compiled_steps_are_the_steps(tmp_path: Path, num_ranks: int) -> None:
    """Four steps, the generator starting at the third: the same names, and values equal up to rounding.

    Running statistics included, so q_real leaves them alone in compiled encoders too.
    """
    make_data_set(tmp_path)
    settings = changed(ADVERSARIAL, generator={"start_percent": 25.0})
    plain = take_steps(str(tmp_path), 4, settings)
    for found in run_on_ranks(num_ranks, take_steps, str(tmp_path), 4, changed(settings, train={"compile": True})):
        assert found.keys() == plain.keys()
        for name, expected in plain.items():
            if num_ranks > 1 and ("running" in name or "num_batches" in name):
                continue  # each rank's own batches
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4, msg=name)


def adversarial_decays(folder: str) -> list[tuple[float, float]]:
    """Of four steps, the generator starting at the third: t, and the unscaled mean |q - q_real|."""
    settings = changed(
        ADVERSARIAL, moco={"decay_schedule": "adversarial"}, generator={"start_percent": 25.0, "strength": 100.0}
    )
    manifest = Manifest.load(folder)
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step = TrainStep(settings, state, CPU)
    loader = Loader(manifest, settings, rank=distributed.rank(), world_size=distributed.world_size())
    numbers = [step(loader.batch(number)).numbers() for number in range(4)]
    return [(each["decay"], -each.get("generator_loss", 0.0) / 100) for each in numbers]


def test_adversarial_decay_follows_the_generators_loss_of_the_step_before(tmp_path: Path) -> None:
    """t = e^(-mean |q - q_real|) of the previous step, 1 until there is one; the same bits on both of 2 ranks."""
    make_data_set(tmp_path)
    alone = adversarial_decays(str(tmp_path))
    decays, differences = zip(*alone, strict=True)
    assert decays[:3] == (1, 1, 1)
    assert decays[3] == pytest.approx(math.exp(-differences[2]), rel=1e-6)
    assert decays[3] < 1
    first, second = run_on_ranks(2, adversarial_decays, str(tmp_path))
    assert first == second
    # Only rounding apart: ranks with unequal shares of the clips still take the mean over clips.
    assert [t for t, _ in first] == pytest.approx(decays, rel=1e-4)
