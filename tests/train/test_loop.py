"""The loop logs and keeps when it is told to, stops when it is asked to, and its losses are those of before."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.dataset import make_data_set
from tests.train.test_step import CPU, changed
from vmoco.data.loader import Loader
from vmoco.presets import PRESETS
from vmoco.train.loop import _fingerprint, check_state, train
from vmoco.train.state import TrainState
from vmoco.train.step import NonFiniteError, TrainStep

SETTINGS = changed(PRESETS["tiny"][1], train={"steps": 12, "log_every": 3, "checkpoint_every": 5})


class Notes:
    """A host that writes down what it is asked for, and asks to stop after a step."""

    def __init__(self, stop_after: int | None = None, preempted_at: int | None = None) -> None:
        self.points: dict[int, dict[str, float]] = {}
        self.lines: list[str] = []
        self.kept: list[int] = []
        self.documents: dict[str, str | bytes] = {}
        self._stop_after = stop_after
        self._preempted_at = preempted_at
        self._asked = 0
        self.finished_at: int | None = None

    def stop_requested(self) -> bool:
        self._asked += 1
        return self._stop_after is not None and self._asked > self._stop_after

    def checkpoint_requested(self) -> bool:
        return self._asked == self._preempted_at

    def track(self, numbers: dict[str, float], *, step: int) -> None:
        self.points[step] = numbers

    def say(self, line: str) -> None:
        self.lines.append(line)

    def document(self, name: str, content: str | bytes) -> None:
        self.documents[name] = content

    def checkpoint(self, state: TrainState) -> None:
        self.kept.append(state.step)

    def finish(self, state: TrainState) -> None:
        self.finished_at = state.step


def run(folder: Path, host: Notes) -> tuple[bool, TrainState]:
    manifest = make_data_set(folder)
    state = TrainState(SETTINGS, manifest_hash=manifest.hash, device=CPU)
    return train(SETTINGS, manifest, state, device=CPU, host=host), state


def test_points_and_checkpoints_come_when_they_should(tmp_path: Path) -> None:
    """Every log_every and checkpoint_every steps, and once more at the end; each line says how far it is."""
    host = Notes()
    finished, state = run(tmp_path, host)
    assert (finished, state.step) == (True, 12)
    assert list(host.points) == [3, 6, 9, 12]
    assert host.kept == [5, 10, 12]
    assert host.lines[0].startswith("step 3/12  loss ")
    assert host.lines[0].endswith("queue 38% full, the loss rises until it is")
    assert host.lines[-1].endswith("0:00 left")


def test_a_request_stops_after_the_step_and_keeps_the_state(tmp_path: Path) -> None:
    """Asked during step 8, it takes that step, keeps it, and says that it has not finished."""
    host = Notes(stop_after=7)
    finished, state = run(tmp_path, host)
    assert (finished, state.step) == (False, 8)
    assert host.kept == [5, 8]


def test_what_the_generator_does_is_shown_at_each_checkpoint(tmp_path: Path) -> None:
    """From its start at step 6: entropy and overlap with the points, and a histogram and a sheet per checkpoint.

    The histogram covers all clips since the checkpoint before (4 steps of 8, then 2), 2 of 8 frames each.
    """
    host = Notes()
    run(tmp_path, host)
    assert [step for step, numbers in host.points.items() if "dropped_entropy" in numbers] == [9, 12]
    assert all(0 < host.points[step]["dropped_entropy"] <= 1 for step in (9, 12))
    assert all(0.1 < host.points[step]["dropped_overlap"] <= 1 for step in (9, 12))
    names = [f"generator/step-{step:08d}.{kind}" for step in (10, 12) for kind in ("json", "png")]
    assert list(host.documents) == names
    histograms = [json.loads(host.documents[name]) for name in names if name.endswith("json")]
    assert [found["clips"] for found in histograms] == [32, 16]
    assert [sum(found["dropped_share"]) for found in histograms] == pytest.approx([2, 2])
    assert all(Image.open(io.BytesIO(host.documents[name])).width > 800 for name in names if name.endswith("png"))


def test_looking_at_the_generator_changes_nothing(tmp_path: Path) -> None:
    """All tensors and torch's own random state are the same bits after a sheet as before."""
    manifest = make_data_set(tmp_path)
    state = TrainState(SETTINGS, manifest_hash=manifest.hash, device=CPU)
    step = TrainStep(SETTINGS, state, CPU)
    batch = Loader(manifest, SETTINGS, rank=0, world_size=1).batch(0)
    before = {name: tensor.detach().clone() for name, tensor in state.tensors().items()}
    random = torch.get_rng_state()
    frames, chosen = step.dropped_frames(batch, num_clips=3)
    assert (frames.shape, frames.dtype) == ((3, 8, 32, 32, 3), torch.uint8)
    assert chosen.sum(dim=1).tolist() == [2, 2, 2]
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in state.moco.generator.parameters())


def test_losses_are_golden(tmp_path: Path) -> None:
    """The numbers of a fixed run on a CPU: a change that is not meant to alter them shows here.

    CPUs add up in different orders. Until the generator starts that costs less than 1e-3; then a frame may be chosen
    differently, and the numbers are only near. Change them only together with the method, and say so in the commit.
    """
    host = Notes()
    run(tmp_path, host)
    losses = {step: numbers["loss"] for step, numbers in host.points.items()}
    assert [losses[3], losses[6]] == pytest.approx([3.742975, 4.227665], rel=1e-3)
    assert [losses[9], losses[12]] == pytest.approx([4.0427, 3.7280], rel=0.03)
    assert [host.points[step]["generator_loss"] for step in (9, 12)] == pytest.approx([-2.56, -2.65], rel=0.1)


def test_a_machine_that_goes_away_is_answered_with_a_checkpoint(tmp_path: Path) -> None:
    """Told during step 3, it keeps that step besides the usual ones, once, and trains on to the end."""
    host = Notes(preempted_at=3)
    finished, _ = run(tmp_path, host)
    assert (finished, host.kept, host.finished_at) == (True, [3, 5, 10, 12], 12)


def test_what_is_tracked(tmp_path: Path) -> None:
    """Every number that the method and the machine are judged by is there from the first point to the last."""
    host = Notes()
    run(tmp_path, host)
    always = {"loss", "accuracy", "positive_similarity", "negative_similarity", "oldest_key_weight", "decay"}
    always |= {"oldest_key_similarity", "embedding_std", "effective_rank", "gradient_norm", "learning_rate", "epoch"}
    always |= {"clips_per_second", "data_wait_share", "checkpoint_stall_share", "checkpoint_stall_seconds"}
    always |= {"memory_gib", "mfu", "queue_filled"}
    assert all(always <= set(numbers) for numbers in host.points.values())
    assert {"generator_loss", "generator_gradient_norm"} <= set(host.points[12])
    assert all(0 < numbers["mfu"] < 1 for numbers in host.points.values())
    assert host.points[3]["checkpoint_stall_seconds"] == 0 < host.points[6]["checkpoint_stall_seconds"]


@pytest.mark.parametrize("shape", [(7,), (3, 2**18 + 5), (4, 3, 2, 5, 5)])
def test_a_fingerprint_sees_a_value_and_a_swap(shape: tuple[int, ...]) -> None:
    """One value among many, or two that change places, near or far, in either memory layout; equal ones give equal."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for layout in (tensor, tensor.to(memory_format=torch.channels_last_3d) if tensor.ndim == 5 else tensor):
        before = float(_fingerprint(layout))
        assert before == float(_fingerprint(layout.clone()))
        changed_one = layout.clone()
        changed_one[(0,) * layout.ndim] += 1e-3
        assert float(_fingerprint(changed_one)) != before
        swapped = layout.clone()
        first, last = (0,) * layout.ndim, tuple(size - 1 for size in shape)
        swapped[first], swapped[last] = layout[last], layout[first]
        assert float(_fingerprint(swapped)) != before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_not_kept(tmp_path: Path, value: float) -> None:
    """Finite losses and gradients may still lead to weights that are not, with one rank too."""
    manifest = make_data_set(tmp_path)
    state = TrainState(SETTINGS, manifest_hash=manifest.hash, device=CPU)
    step = TrainStep(SETTINGS, state, CPU)
    step(Loader(manifest, SETTINGS, rank=0, world_size=1).batch(0))
    check_state(state)
    next(iter(state.moco.query.parameters())).data[0, 0, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"the state after step 1 is not finite \(query\.backbone"):
        check_state(state)
