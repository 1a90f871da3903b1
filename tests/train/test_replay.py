"""A run that stops at a value that is not finite leaves a file, from which that very step is redone and explained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.dataset import make_data_set
from tests.ranks import run_on_ranks
from tests.train.test_loop import Notes
from tests.train.test_step import ADVERSARIAL, CPU, changed
from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader, RankBatch
from vmoco.data.manifest import Manifest
from vmoco.presets import PRESETS
from vmoco.spool import Document
from vmoco.train import distributed, replay_file
from vmoco.train.first_non_finite import Finding, WatchedStep
from vmoco.train.loop import train
from vmoco.train.replay import replay
from vmoco.train.run_folder import Checkpoint, RunFolder
from vmoco.train.state import TrainState
from vmoco.train.step import NonFiniteError, TrainStep

ROOT = Path(__file__).parents[2]
# An L2 penalty that multiplies the weights by about -10,000 in each step, until float32 cannot hold what they compute.
EXPLODES = changed(
    PRESETS["tiny"][1], train={"learning_rate": 0.4, "weight_decay": 1e5, "steps": 20, "checkpoint_every": 5}
)
# From step 4 on the generator trains, by a loss whose gradients have squares that float32 cannot hold.
OVERFLOWS = changed(PRESETS["tiny"][1], train={"steps": 8, "checkpoint_every": 3}, generator={"strength": 3e38})


class Keeper(Notes):
    """A host that writes checkpoints into a run's folder, from its first rank."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self._folder = folder
        self.newest: Checkpoint | None = None

    def checkpoint(self, state: TrainState, documents: Mapping[str, Document]) -> None:
        if distributed.rank() == 0:
            uri = self._folder.checkpoint_uri(state.step)
            Path(uri).mkdir(parents=True)
            self.newest = Checkpoint(state.step, uri, state.save(Path(uri)).sha256)


def run_until_it_stops(data: str, folder: str, settings: PretrainSettings) -> str:
    """Trains on this rank; on the first one the URI of the replay file."""
    manifest, place = Manifest.load(data), RunFolder(folder)
    settings = changed(settings, data={"uri": data})
    state, host = TrainState(settings, manifest_hash=manifest.hash, device=CPU), Keeper(place)
    with pytest.raises(NonFiniteError) as raised:
        train(settings, manifest, state, device=CPU, host=host)
    if distributed.rank():
        return ""
    ranks = distributed.world_size()
    return replay_file.write(raised.value, state, place, newest=host.newest, ranks=ranks)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The replay file of a run of two ranks."""
    folder = tmp_path_factory.mktemp("stopped")
    make_data_set(folder / "data")
    found: str = run_on_ranks(2, run_until_it_stops, str(folder / "data"), str(folder / "run"), OVERFLOWS)[0]
    return found


def test_the_step_of_a_run_of_two_ranks_is_redone_with_its_bits(stopped: str) -> None:
    """From the checkpoint of step 3, by two processes: the state before step 4 has the bits of the run, and that step
    raises the same message. Both ranks find that each gradient is finite and their norm is not.
    """
    written = replay_file.read(stopped)
    assert (written.start_step, written.step) == (3, 4)
    assert [len(clips) for clips in written.clip_ids] == [4, 4]
    lines: list[str] = []
    outcome = replay(stopped, show=lines.append)
    assert outcome.is_exact is True
    assert outcome.error == written.message
    assert outcome.step == written.step
    assert lines[0].startswith(
        f"replays step {written.step} of {written.run_folder}: 2 processes on CPUs, from checkpoint"
    )
    assert [finding.rank for finding in outcome.findings] == [0, 1]
    assert {finding.name for finding in outcome.findings} == {"the norm of the gradient of generator"}


def test_the_job_prints_what_is_found_and_one_process_finds_it_too(stopped: str) -> None:
    """`jobs/replay.py FILE --ranks 1` warns that the rounding differs, and names the first value in a line."""
    command = [sys.executable, "jobs/replay.py", stopped, "--ranks", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    step = replay_file.read(stopped).step
    assert "warning: the run had 2 ranks: the math is the same, and the rounding is not" in ended.stdout
    assert f"step {step} is not finite here either: a loss or gradient of step {step}" in ended.stdout
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("first: ")]
    assert line.startswith("first: rank 0: the norm of the gradient of generator is infinite; the largest gradient is")


def test_a_run_without_a_checkpoint_is_redone_from_its_beginning(tmp_path: Path) -> None:
    """A temperature that no float32 can be divided by: step 0, from the initial weights, and the loss is the first."""
    make_data_set(tmp_path / "data")
    settings = changed(PRESETS["tiny"][1], moco={"temperature": 1e-43})
    uri = run_until_it_stops(str(tmp_path / "data"), str(tmp_path / "run"), settings)
    assert (replay_file.read(uri).checkpoint, replay_file.read(uri).step) == (None, 0)
    outcome = replay(uri)
    assert outcome.is_exact is True
    assert outcome.findings[0].name == "the contrastive loss"
    assert len(outcome.findings[0].clip_ids) == 4


def test_an_update_that_makes_the_state_not_finite_is_found_at_its_own_step(tmp_path: Path) -> None:
    """Running variances overflow while the losses, which do not see them, are finite: seen at the next checkpoint."""
    make_data_set(tmp_path / "data")
    uri = run_until_it_stops(str(tmp_path / "data"), str(tmp_path / "run"), EXPLODES)
    written = replay_file.read(uri)
    assert "the state after step 5 is not finite" in written.message
    outcome = replay(uri)
    assert outcome.error == ""
    assert outcome.step < written.step == 4
    assert outcome.findings[0].name.endswith("running_var after the update")
    assert outcome.findings[0].num_infinite > 0


@pytest.mark.parametrize("harm", ["rewritten", "data", "ranks", "other", "missing", "version"])
def test_what_cannot_be_replayed_is_refused_with_a_reason(stopped: str, tmp_path: Path, harm: str) -> None:
    """Before any process starts: a checkpoint that is another one now, other data, too many ranks, other files."""
    values: dict[str, Any] = json.loads(Path(stopped).read_text())
    ranks, data, uri = None, tuple[str, ...](), str(tmp_path / "file.json")
    expected = "is not a replay file of vmoco: give the file that the error message"
    if harm == "rewritten":
        shutil.copytree(values["checkpoint"], tmp_path / "again")
        record = json.loads((tmp_path / "again" / "state.json").read_text())
        (tmp_path / "again" / "state.json").write_text(json.dumps(record | {"sha256": "0" * 64}))
        values["checkpoint"] = str(tmp_path / "again")
        expected = "was written again since the step was not finite"
    elif harm == "data":
        data = (make_data_set(tmp_path / "data", num_videos=9).uri,)
        expected = "give the place of that data set by --data"
    elif harm == "ranks":
        ranks, expected = 3, "--ranks 3 is not allowed: a step has 2 micro-batches"
    elif harm == "other":
        values = {"run_id": "a"}
    elif harm == "version":
        values["version"], expected = 7, "has version 7, this vmoco reads 1: use vmoco"
    if harm == "missing":
        expected = "does not exist: give the file that the error message"
    else:
        Path(uri).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=expected):
        replay(uri, ranks=ranks, data_uri=data)


class BreaksBackward(torch.autograd.Function):
    """The identity, whose gradient is infinite for the second clip."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        broken = gradient.clone()
        broken[1] = float("inf")
        return broken


def watched(manifest: Manifest, harm: Callable[[TrainState, RankBatch], None]) -> tuple[list[Finding], RankBatch]:
    """Findings of one step to which something was done."""
    state = TrainState(ADVERSARIAL, manifest_hash=manifest.hash, device=CPU)
    step = WatchedStep(ADVERSARIAL, state, CPU, rank=0)
    batch = Loader(manifest, ADVERSARIAL, rank=0, world_size=1).batch(0)
    harm(state, batch)
    step.watch(batch, key_clip_ids=[batch.clip_ids[place] for place in batch.key_order.tolist()])
    with pytest.raises(NonFiniteError):
        step(batch)
    step.unwatch()
    return step.findings, batch


def layer(state: TrainState) -> nn.Module:
    """The second convolution of the query encoder."""
    found = [module for module in state.moco.query.modules() if isinstance(module, nn.Conv3d)]
    return found[1]


def name_of(module: nn.Module, state: TrainState) -> str:
    return next(f"query.{name}" for name, each in state.moco.query.named_modules() if each is module)


def test_the_first_value_is_named_by_where_it_appears(tmp_path: Path) -> None:
    """A clip, a weight, the output of a layer, the gradient of a layer: each is the first finding, with its clips."""
    manifest = make_data_set(tmp_path)
    names: dict[str, str] = {}

    def bad_clip(state: TrainState, batch: RankBatch) -> None:
        batch.query.draws[5] = float("nan")

    def bad_key(state: TrainState, batch: RankBatch) -> None:
        batch.key.draws[9] = float("nan")

    def bad_weight(state: TrainState, batch: RankBatch) -> None:
        layer(state).weight.data[0, 0, 0, 0, 0] = float("inf")  # type: ignore[index,union-attr,operator]

    def bad_output(state: TrainState, batch: RankBatch) -> None:
        names["output"] = name_of(layer(state), state)
        layer(state).register_forward_hook(lambda module, given, output: output / 0)

    def bad_gradient(state: TrainState, batch: RankBatch) -> None:
        names["gradient"] = name_of(layer(state), state)
        layer(state).register_forward_hook(lambda module, given, output: BreaksBackward.apply(output))

    found, batch = watched(manifest, bad_clip)
    assert found[0].name == "the numbers that augment the query clips"
    assert found[0].clip_ids == [batch.clip_ids[5]]
    found, batch = watched(manifest, bad_key)
    assert found[0].name == "the numbers that augment the key clips"
    assert found[0].clip_ids == [batch.clip_ids[batch.key_order[9]]]
    found, _ = watched(manifest, bad_weight)
    assert found[0].name.startswith("query.backbone.")
    assert found[0].name.endswith("weight before the step")
    assert (found[0].num_infinite, found[0].clip_ids) == (1, [])
    found, _ = watched(manifest, bad_output)
    assert found[0].name == f"the output of {names['output']}"
    found, batch = watched(manifest, bad_gradient)
    # In the backward the layer spoils the gradient of what it reads, and of its weight.
    assert found[0].name.startswith("the gradient of the output of query.backbone.")
    assert names["gradient"] in found[0].note.removeprefix("it comes from ").split(" and ")
    assert found[0].clip_ids == [batch.clip_ids[1]]
    assert f"the gradient of {names['gradient']}.weight" in [finding.name for finding in found]
    assert all("the gradient of" in finding.name for finding in found)


def test_watching_changes_no_bit(tmp_path: Path) -> None:
    """The state after a watched step is that after a plain one, and nothing is found."""
    manifest = make_data_set(tmp_path)
    states = []
    for watches in (False, True):
        state = TrainState(ADVERSARIAL, manifest_hash=manifest.hash, device=CPU)
        step = WatchedStep(ADVERSARIAL, state, CPU, rank=0) if watches else TrainStep(ADVERSARIAL, state, CPU)
        batch = Loader(manifest, ADVERSARIAL, rank=0, world_size=1).batch(0)
        if isinstance(step, WatchedStep):
            step.watch(batch, key_clip_ids=batch.clip_ids)
        step(batch)
        if isinstance(step, WatchedStep):
            step.unwatch()
            step.look_at_state()
            assert step.findings == []
        states.append(state.tensors())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_step_that_is_finite_here_is_said(tmp_path: Path) -> None:
    """A bad clip that only the run saw, such as one of a faulty memory: nothing is found, and the job says so."""
    make_data_set(tmp_path / "data")
    manifest = Manifest.load(str(tmp_path / "data"))
    settings = changed(PRESETS["tiny"][1], data={"uri": manifest.uri})
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    error = NonFiniteError("a loss of step 1", step=1, clip_ids=[["a"]])
    uri = replay_file.write(error, state, RunFolder(str(tmp_path / "run")), newest=None, ranks=1)
    outcome = replay(uri)
    assert outcome == replace(outcome, findings=[], error="", step=1, is_exact=None)
    ended = subprocess.run(
        [sys.executable, "jobs/replay.py", uri], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: step 1 is finite here, so the cause is not in the state, the data")
