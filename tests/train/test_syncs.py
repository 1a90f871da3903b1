"""Between two log steps the host never waits for the device, apart from one look at the step before.

A meta tensor has no numbers, so it stands for one on a GPU: whatever would make the host wait for a GPU is noticed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.dataset import make_data_set
from tests.train.test_step import ADVERSARIAL, CONTRAST, CPU, REVERSED, SAMPLED, changed
from vmoco.config import PretrainSettings
from vmoco.data.loader import BatchMemory, Loader
from vmoco.data.manifest import Manifest
from vmoco.train.metrics import DroppedFrames, Interval
from vmoco.train.state import TrainState
from vmoco.train.step import NonFiniteError, TrainStep

META = torch.device("meta")
_WAITING = {"nonzero", "unique_dim", "_unique2", "masked_select", "_local_scalar_dense", "repeat_interleave"}


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for the device.

    Attributes:
        found: one line for each.
        numbers_sent: how many numbers each copy to the host has that does not wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.numbers_sent: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = any(each.device == META for each in tensors)
        if name in _WAITING and here:
            self.found.append(name)
            return 0.0 if name == "_local_scalar_dense" else func(*args, **kwargs)
        if name in ("index", "index_put_") and here:
            masks = [each for each in args[1] if each is not None and each.dtype == torch.bool]
            self.found += [f"{name} by a mask of {tuple(mask.shape)}" for mask in masks]
        if name in ("index", "index_put_") and here:
            elsewhere = [each for each in args[1] if each is not None and each.device != args[0].device]
            self.found += [f"{name} by an index of {tuple(each.shape)} on the host" for each in elsewhere]
        if name == "_to_copy" and kwargs.get("device") not in (None, args[0].device):
            shape = tuple(args[0].shape)
            if not kwargs.get("non_blocking"):
                self.found.append(f"copy of {shape} from {args[0].device} to {kwargs['device']}")
            if args[0].device == META:
                self.numbers_sent.append(args[0].numel())
                return torch.zeros(shape, dtype=kwargs.get("dtype", args[0].dtype))
        if name == "copy_" and args[0].device != args[1].device:
            self.found.append(f"copy into {tuple(args[0].shape)}")
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("set"))


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is made on the device from a list of Python numbers, which is copied and waited for."""
    made: list[str] = []
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        original = getattr(owner, name)

        def noted(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> torch.Tensor:
            result: torch.Tensor = original(*args, **kwargs)
            made.extend([f"{name} of {tuple(result.shape)}"] if result.device == META else [])
            return result

        monkeypatch.setattr(owner, name, noted)
    # The meta device has no autocast; the encoders run in float32 here.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return made


WHOLE = changed(ADVERSARIAL, generator={"start_percent": 100.0})
RANDOM = changed(WHOLE, generator={"before_start": "random"})
DECAYED = changed(ADVERSARIAL, moco={"decay_schedule": "adversarial", "age_unit": "key", "decay_on": "exp"})
ALL = changed(ADVERSARIAL, augment={"blur_probability": 0.5, "standardise": True, "hue": 0.1}, model={"head": "mlp"})
GREY = changed(ADVERSARIAL, augment={"grey_probability": 1.0}, data={"positives": "two_clips"})
EVERY = changed(ADVERSARIAL, generator={"every": 2, "fill": "zero"})
CLIPPED = {"clip_gradient_norm": 0.1, "weight_decay": 0.05, "weight_decay_on": "weights"}
SWIN = changed(ADVERSARIAL, model={"backbone": "swin3d_nano", "drop_path": 0.2}, train=CLIPPED)
MVIT = changed(
    SWIN,
    model={"backbone": "mvit_v2_s"},
    generator={"clips_percent": 50.0},
    train={"global_batch": 4},  # one micro-batch
)


@pytest.mark.parametrize(
    "settings",
    [
        ADVERSARIAL,
        SAMPLED,
        CONTRAST,
        REVERSED,
        WHOLE,
        RANDOM,
        DECAYED,
        ALL,
        GREY,
        EVERY,
        SWIN,
        pytest.param(MVIT, marks=pytest.mark.slow),
    ],
    ids=[
        *("difference", "sample", "contrast", "reversed", "whole", "random", "decay", "augment", "grey", "every"),
        *("swin", "mvit"),
    ],
)
def test_the_host_waits_for_nothing_but_the_flags_of_the_step_before(
    manifest: Manifest, lists: list[str], settings: PretrainSettings
) -> None:
    """Three steps with what the loop adds up: one copy to the host in each, of 4 numbers, which is not waited for.

    The first step may wait: it makes the constants.
    """
    state = TrainState(settings, manifest_hash=manifest.hash, device=META)
    step, loader = TrainStep(settings, state, META), Loader(manifest, settings, rank=0, world_size=1)
    interval = Interval(settings, state, loader, None)
    dropped = DroppedFrames(settings.data.num_frames, settings.num_dropped)
    with Waits():
        step(loader.batch(0))
    lists.clear()
    with Waits() as waits:
        for number in range(1, 4):
            metrics = step(loader.batch(number))
            assert step.requested(now=False) == (False, False)
            interval.add(metrics)
            dropped.add(metrics.dropped())
            assert [each[0] for each in step._unread] == [number], "the flags of the last step are not read yet"
    assert waits.found == []
    assert lists == []
    assert waits.numbers_sent == [4, 4, 4]


def test_waits_are_noticed() -> None:
    """The test above would see each kind of wait."""
    with Waits() as waits:
        one = torch.zeros(3, device=META)
        float(one[0])
        bool((one > 0).any())
        torch.zeros(3).to(META)
        torch.zeros(3).to(META, non_blocking=True)
        one.cpu()
        one.copy_(torch.zeros(3))
        one[one > 0] = 1
        one[torch.zeros(2, dtype=torch.int64)]
    assert len(waits.found) == 7, waits.found


def one_step_late(manifest: Manifest) -> tuple[TrainStep, Loader]:
    """A step that reads its flags as on a GPU, on a CPU."""
    state = TrainState(ADVERSARIAL, manifest_hash=manifest.hash, device=CPU)
    step = TrainStep(ADVERSARIAL, state, CPU)
    step._num_late = 1
    return step, Loader(manifest, ADVERSARIAL, rank=0, world_size=1)


@pytest.mark.parametrize("now", [False, True])
def test_a_bad_step_is_noticed_one_step_later_or_when_the_state_is_kept(manifest: Manifest, now: bool) -> None:
    """With its own number and clips, whichever comes first: the next step, or a log line or checkpoint."""
    step, loader = one_step_late(manifest)
    bad = loader.batch(0)
    bad.query.draws[0] = float("nan")
    step(bad)
    assert step.requested(now=False) == (False, False)
    with pytest.raises(NonFiniteError, match=rf"gradient of step 0 is not finite \(rank 0, clips {bad.clip_ids[0]}, "):
        step.requested(now=True) if now else step(loader.batch(1))


def test_a_request_is_answered_one_step_later_and_once(manifest: Manifest) -> None:
    """To keep the state: after the next step, once. To stop: likewise, and from then on. At a checkpoint at once.

    Before the state is kept the last step is read too, so a bad one is not kept.
    """
    step, loader = one_step_late(manifest)
    answers = []
    for number in range(4):
        step(loader.batch(number), checkpoint_requested=number == 0, stop_requested=number == 2)
        answers.append(step.requested(now=False))
    assert answers == [(False, False), (False, True), (False, False), (True, False)]
    step, loader = one_step_late(manifest)
    step(loader.batch(0), checkpoint_requested=True)
    assert step.requested(now=True) == (False, True)
    bad = loader.batch(1)
    step, loader = one_step_late(manifest)
    step(loader.batch(0), stop_requested=True)
    bad.query.draws[0] = float("nan")
    step(bad)
    with pytest.raises(NonFiniteError, match="step 1"):
        step.requested(now=False)


def test_all_that_a_gpu_reads_is_page_locked(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor of a batch that the step copies to the device; from other memory a copy would wait."""
    locked: set[int] = set()

    def lock(tensor: torch.Tensor) -> torch.Tensor:
        locked.add(tensor.data_ptr())
        return tensor

    def take(memory: BatchMemory, shape: tuple[int, ...]) -> torch.Tensor:
        assert memory.pin_memory
        return lock(torch.empty(shape, dtype=torch.uint8))

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    monkeypatch.setattr(BatchMemory, "take", take)
    batch = Loader(manifest, SWIN, rank=0, world_size=1, pin_memory=True).batch(0)
    read = [batch.query.frames, batch.query.draws, batch.key.frames, batch.key.draws]
    read += [batch.random_importance, batch.key_order, batch.video_ids, batch.branch_factors]
    assert {tensor.data_ptr() for tensor in read} <= locked
