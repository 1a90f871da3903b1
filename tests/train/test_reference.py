"""The real step is VideoMoCo: step by step it equals the plain version of the method in `tests/reference.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests import reference
from tests.dataset import make_data_set
from tests.ranks import run_on_ranks
from tests.train.test_step import CPU, ExactStep, changed
from vmoco.config import PretrainSettings
from vmoco.data.augment import augment
from vmoco.data.loader import Loader, View
from vmoco.data.manifest import Manifest
from vmoco.presets import PRESETS
from vmoco.train import distributed
from vmoco.train.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_STEPS = 20
COMMON = changed(
    PRESETS["tiny"][1],
    augment={"size": 24},
    # A queue of 40 wraps round for the first time in the middle of the fourth batch of 12.
    moco={"queue_size": 40, "momentum": 0.9},
    train={"steps": NUM_STEPS, "global_batch": 12, "micro_batch": 4, "learning_rate": 0.02},
    generator={"start_percent": 40.0, "learning_rate": 1.0},
)
# The options of the paper. 0.75 ** age is exact in float32, in which the real step keeps the weights of keys.
PAPER = changed(COMMON, moco={"decay": 0.75, "decay_on": "logit", "age_unit": "step"})
# The other value of each option. Two ranks share three micro-batches: one has one, the other two.
OPTIONS = changed(
    COMMON,
    moco={"decay": 0.97, "decay_on": "exp", "age_unit": "key"},
    train={"schedule": "cosine", "warmup_steps": 4},
    generator={"fill": "zero", "before_start": "random", "relative": True},
)
# The options that no paper has.
LATER = changed(OPTIONS, generator={"select": "sample", "objective": "contrast", "every": 3})
EVERY_THIRD = changed(PAPER, generator={"every": 3})
# Of each micro-batch of 4 keys one or two are also played backwards.
REVERSED = changed(PAPER, moco={"reversed_negatives_percent": 25.0})
HALF_REVERSED = changed(LATER, moco={"reversed_negatives_percent": 50.0})


def exact_state(settings: PretrainSettings, manifest: Manifest) -> TrainState:
    """The state of a new run, in float64."""
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    for module in (state.moco.query, state.moco.key, state.moco.generator):
        module.double()
    state.moco.queue.keys = state.moco.queue.keys.double()
    return state


Outcome = tuple[list[dict[str, float]], dict[str, list[torch.Tensor]]]


def real_steps(folder: str, settings: PretrainSettings) -> Outcome:
    """All steps of a run on this rank: what each reports, and the tensors that it ends with."""
    manifest = Manifest.load(folder)
    state = exact_state(settings, manifest)
    step = ExactStep(settings, state, CPU)
    loader = Loader(manifest, settings, rank=distributed.rank(), world_size=distributed.world_size())
    numbers = [step(loader.batch(number)).numbers() for number in range(NUM_STEPS)]
    queue = state.moco.queue
    oldest_first = (queue.pointer + torch.arange(queue.length)) % queue.length
    ages = queue.ages(NUM_STEPS, unit=settings.moco.age_unit)
    tensors = network_tensors(state.moco.query, state.moco.key, state.moco.generator)
    return numbers, tensors | {
        "keys": [queue.keys[oldest_first]],
        "ages": [ages[oldest_first]],
        "videos": [queue.video_ids[oldest_first]],
    }


def reference_steps(folder: str, settings: PretrainSettings, *, num_ranks: int) -> Outcome:
    """The same by the reference, from the same initial weights."""
    manifest = Manifest.load(folder)
    moco = exact_state(settings, manifest).moco
    encoder = nn.Sequential(moco.query.backbone, moco.query.head)
    plain = reference.VideoMoco(encoder, moco.generator, recipe(settings, num_ranks=num_ranks))
    loader = Loader(manifest, settings, rank=0, world_size=1)
    numbers = [plain.take_step(global_batch(loader, step, settings)) for step in range(NUM_STEPS)]
    by_key = settings.moco.age_unit == "key"
    ages = [len(plain.queue) - place if by_key else plain.step - born for place, (_, _, born) in enumerate(plain.queue)]
    return numbers, network_tensors(plain.query, plain.key, plain.generator) | {
        "keys": [torch.stack([key for key, _, _ in plain.queue])],
        "ages": [torch.tensor(ages)],
        "videos": [torch.tensor([video for _, video, _ in plain.queue])],
    }


def network_tensors(query: nn.Module, key: nn.Module, generator: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Parameters and running statistics, in the order of the layers."""
    networks = {"query": query, "key": key, "generator": generator}
    tensors = {name: [each.detach().clone() for each in net.parameters()] for name, net in networks.items()}
    for name in ("query", "key"):
        # Not the count of batches, which is each rank's own and has no effect.
        tensors[f"{name} statistics"] = [each.clone() for each in networks[name].buffers() if each.is_floating_point()]
    return tensors


def recipe(settings: PretrainSettings, *, num_ranks: int) -> reference.Recipe:
    """The settings under the names of the reference."""
    moco, train, generator = settings.moco, settings.train, settings.generator
    return reference.Recipe(
        num_steps=train.steps,
        generator_start=round(train.steps * generator.start_percent / 100),
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        num_ranks=num_ranks,
        queue_size=moco.queue_size,
        momentum=moco.momentum,
        temperature=moco.temperature,
        decay=moco.decay,
        decay_on=moco.decay_on,
        age_unit=moco.age_unit,
        num_dropped=round(settings.data.num_frames * generator.drop_ratio),
        fill=generator.fill,
        strength=generator.strength,
        learning_rate=train.learning_rate,
        generator_learning_rate=generator.learning_rate,
        schedule=train.schedule,
        warmup_steps=train.warmup_steps,
        sgd_momentum=train.sgd_momentum,
        weight_decay=train.weight_decay,
        objective=generator.objective,
        sampled=generator.select == "sample",
        every=generator.every,
    )


def global_batch(loader: Loader, step: int, settings: PretrainSettings) -> reference.Batch:
    """What all ranks together work on in a step, augmented; the keys back in the order of their queries."""
    batch, size = loader.batch(step), settings.train.micro_batch

    def augmented(view: View) -> torch.Tensor:
        # By micro-batches, as the step does it: augmentation is in float32, and its rounding may depend on the batch.
        pairs = zip(view.frames.split(size), view.draws.split(size), strict=True)
        return torch.cat([augment(frames, draws, size=settings.augment.size).double() for frames, draws in pairs])

    place_in_shuffle = torch.argsort(batch.key_order)
    assert torch.equal(batch.key.frames[place_in_shuffle], batch.query.frames), "both views show the same frames"
    random_importance = batch.random_importance.double() if settings.generator.before_start == "random" else None
    return reference.Batch(
        clips=augmented(batch.query),
        key_clips=augmented(batch.key)[place_in_shuffle],
        video_ids=batch.video_ids.tolist(),
        key_order=batch.key_order,
        random_importance=random_importance,
        noise=batch.random_importance.double(),
        reversed_clips=frozenset(batch.key_order[batch.reversed_keys].tolist()),
    )


@pytest.mark.parametrize(
    ("settings", "num_ranks", "tolerance"),
    [
        pytest.param(PAPER, 1, 1e-9, id="paper-1-rank"),
        # The real step takes the logarithm of the weights of keys in float32.
        pytest.param(OPTIONS, 2, 1e-6, id="options-2-ranks"),
        pytest.param(LATER, 1, 1e-6, id="later-1-rank"),
        pytest.param(LATER, 2, 1e-6, id="later-2-ranks"),
        pytest.param(EVERY_THIRD, 1, 1e-9, id="every-third-1-rank"),
        pytest.param(REVERSED, 1, 1e-9, id="reversed-1-rank"),
        pytest.param(HALF_REVERSED, 2, 1e-6, id="half-reversed-2-ranks"),
    ],
)
def test_steps_equal_the_reference(
    tmp_path: Path, settings: PretrainSettings, num_ranks: int, tolerance: float
) -> None:
    """Losses and gradients of each of 20 steps, and networks and queue after the last, are those of the reference.

    G starts at the ninth step, and trains in every n-th from there. Both run in float64, with batch normalisation by
    micro-batches as in training. Means are summed up in float32, so they agree to 1e-6. Norms of gradients and all
    tensors agree to the tolerance, a tensor relative to its largest entry; ages and video ids are equal. Every rank is
    compared.
    """
    make_data_set(tmp_path, num_videos=10)  # fewer than a batch, so the queue holds keys of each query's own video
    expected_numbers, expected_tensors = reference_steps(str(tmp_path), settings, num_ranks=num_ranks)
    if num_ranks == 1:
        outcomes = [real_steps(str(tmp_path), settings)]
    else:
        outcomes = run_on_ranks(num_ranks, real_steps, str(tmp_path), settings)
    for numbers, tensors in outcomes:
        for step, (found, expected) in enumerate(zip(numbers, expected_numbers, strict=True)):
            trains = step >= 8 and (step - 8) % settings.generator.every == 0
            assert ("generator_loss" in found) == ("generator_gradient_norm" in expected) == trains
            for name, value in expected.items():
                limit = tolerance if name.endswith("norm") else 1e-6
                assert found.get(name, 0) == pytest.approx(value, rel=limit, abs=limit), f"{name} of step {step}"
        assert set(tensors) == set(expected_tensors)
        for name, pairs in expected_tensors.items():
            for place, (tensor, truth) in enumerate(zip(tensors[name], pairs, strict=True)):
                error, limit = float((tensor - truth).abs().max()), tolerance * float(truth.abs().max())
                assert error <= (limit if truth.is_floating_point() else 0), f"{name}, tensor {place}"
