"""A checkpoint holds the whole state: resumed runs go on with the same bits, and what does not fit is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dataset import make_data_set
from tests.ranks import run_on_ranks
from tests.train.test_step import CPU, changed
from vmoco import storage
from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.presets import PRESETS
from vmoco.train import distributed
from vmoco.train import state as module
from vmoco.train.state import (
    STATE_RECORD,
    STATE_SETTINGS,
    STATE_TENSORS,
    DamagedCheckpointError,
    TrainState,
    read_settings,
)
from vmoco.train.step import TrainStep

# 12 videos, batches of 16 on 4 ranks: step 5 lies in the middle of an epoch, and the generator starts at step 4.
SETTINGS = changed(
    PRESETS["tiny"][1], train={"steps": 8, "global_batch": 16, "micro_batch": 4}, moco={"queue_size": 40}
)

ADVERSARIAL_DECAY = changed(SETTINGS, moco={"decay_schedule": "adversarial"})
ADAMW = changed(
    SETTINGS, train={"optimizer": "adamw", "learning_rate": 1e-3}, data={"positives": "two_clips", "num_frames": 8}
)
REVERSED = changed(SETTINGS, moco={"reversed_negatives_percent": 50.0})
TRANSFORMER = changed(
    ADAMW,
    model={"backbone": "swin3d_nano", "drop_path": 0.4},
    train={"weight_decay": 0.05, "weight_decay_on": "weights", "clip_gradient_norm": 0.01},
)


def advance(folder: str, settings: PretrainSettings, until: int, resume: str | None, keep: str | None) -> str:
    """Trains to a step, from a checkpoint if there is one; returns a hash of all tensors of this rank."""
    manifest = Manifest.load(folder)
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    if resume:
        state.load(Path(resume))
    step = TrainStep(settings, state, CPU)
    loader = Loader(
        manifest, settings, rank=distributed.rank(), world_size=distributed.world_size(), start_step=state.step
    )
    for batch in loader:
        if state.step == until:
            break
        step(batch)
    if keep and distributed.rank() == 0:
        state.save(Path(keep))
    digest = hashlib.sha256()
    for name, tensor in sorted(state.tensors().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        pytest.param(1, SETTINGS, id="1"),
        pytest.param(4, SETTINGS, id="4"),
        pytest.param(1, ADVERSARIAL_DECAY, id="1-adversarial-decay", marks=pytest.mark.slow),
        pytest.param(2, ADVERSARIAL_DECAY, id="2-adversarial-decay"),
        pytest.param(1, ADAMW, id="1-adamw-two-clips", marks=pytest.mark.slow),
        pytest.param(2, ADAMW, id="2-adamw-two-clips"),
        pytest.param(2, REVERSED, id="2-reversed"),
        pytest.param(2, TRANSFORMER, id="2-transformer"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, num_ranks: int, settings: PretrainSettings) -> None:
    """Stopped mid-epoch after 5 of 8 steps and resumed in new processes: every tensor has the same bits everywhere.

    On 4 ranks, because there the order of sums within DDP's buckets shows in the last digits. With an adversarial
    decay the first step after resuming needs the generator's loss of the last step before.
    """
    make_data_set(tmp_path / "data")
    (tmp_path / "kept").mkdir()
    data, kept = str(tmp_path / "data"), str(tmp_path / "kept")
    uninterrupted = run_on_ranks(num_ranks, advance, data, settings, 8, None, None)
    run_on_ranks(num_ranks, advance, data, settings, 5, None, kept)
    resumed = run_on_ranks(num_ranks, advance, data, settings, 8, kept, None)
    assert resumed == uninterrupted
    assert len(set(resumed)) == 1, "all ranks hold the same"


def test_another_number_of_workers_goes_on_with_the_same_clips_and_keys(tmp_path: Path) -> None:
    """From a checkpoint of 2 ranks, 1 and 4 ranks end with the queue of the 2 that were not interrupted.

    The videos and ages of its keys are the same; the keys themselves differ in the last digits, as sums do.
    """
    make_data_set(tmp_path / "data")
    (tmp_path / "kept").mkdir()
    data, kept = str(tmp_path / "data"), str(tmp_path / "kept")
    expected = run_on_ranks(2, queue_after, data, 8, None, kept)[0]
    for num_ranks in (1, 4):
        for found in run_on_ranks(num_ranks, queue_after, data, 8, kept, None):
            assert torch.equal(found["video_ids"], expected["video_ids"])
            assert torch.equal(found["born"], expected["born"])
            assert torch.nn.functional.cosine_similarity(found["keys"], expected["keys"]).min() > 0.9


def queue_after(folder: str, until: int, resume: str | None, keep: str | None) -> dict[str, torch.Tensor]:
    """The queue after some steps; with `keep`, the state of step 5 is kept on the way."""
    manifest = Manifest.load(folder)
    state = TrainState(SETTINGS, manifest_hash=manifest.hash, device=CPU)
    if resume:
        state.load(Path(resume))
    step = TrainStep(SETTINGS, state, CPU)
    rank, world_size = distributed.rank(), distributed.world_size()
    for batch in Loader(manifest, SETTINGS, rank=rank, world_size=world_size, start_step=state.step):
        if keep and state.step == 5 and rank == 0:
            state.save(Path(keep))
        if state.step < until:
            step(batch)
    return {name: tensor.clone() for name, tensor in state.moco.queue.state_dict().items()}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A checkpoint of step 6, with the generator under way."""
    make_data_set(tmp_path / "data")
    folder = tmp_path / "kept"
    folder.mkdir()
    advance(str(tmp_path / "data"), SETTINGS, 6, None, str(folder))
    return folder


def fresh(kept: Path, settings: PretrainSettings = SETTINGS, manifest_hash: str | None = None) -> TrainState:
    return TrainState(
        settings, manifest_hash=manifest_hash or Manifest.load(str(kept.parent / "data")).hash, device=CPU
    )


def test_state_survives_writing_and_reading(kept: Path) -> None:
    """Every tensor, optimizers included, and the step come back; the settings' bytes are the canonical ones."""
    state = fresh(kept)
    record = state.load(kept)
    assert (state.step, record.step) == (6, 6)
    stored = load_file(kept / STATE_TENSORS)
    assert set(stored) == set(state.tensors())
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.tensors().items())
    assert any(name.startswith("optimizer.generator") for name in stored)
    assert (kept / "settings.json").read_text() == SETTINGS.canonical_json()


def test_a_flipped_byte_is_noticed(kept: Path) -> None:
    """The hash in the record does not match, and the sentence says which file."""
    path = kept / STATE_TENSORS
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"state.safetensors is damaged"):
        fresh(kept).load(kept)


@pytest.mark.parametrize(
    "missing", ["optimizer.query.0.momentum_buffer", "query.head.weight", "queue.born", "difference"]
)
def test_a_missing_tensor_is_refused(kept: Path, missing: str) -> None:
    """A checkpoint without a tensor is no checkpoint, also where only an optimizer would notice."""
    tensors = load_file(kept / STATE_TENSORS)
    del tensors[missing]
    save_file(tensors, kept / STATE_TENSORS)
    record = json.loads((kept / STATE_RECORD).read_text())
    (kept / STATE_RECORD).write_text(json.dumps(record | {"sha256": storage.file_sha256(str(kept / STATE_TENSORS))}))
    with pytest.raises(ValueError, match=rf"missing .*{missing}"):
        fresh(kept).load(kept)


def rewrite(kept: Path, tensors: dict[str, torch.Tensor], **record: object) -> None:
    """Puts other tensors into a checkpoint whose record then fits them."""
    save_file(tensors, kept / STATE_TENSORS)
    before = json.loads((kept / STATE_RECORD).read_text())
    (kept / STATE_RECORD).write_text(
        json.dumps(before | {"sha256": storage.file_sha256(str(kept / STATE_TENSORS))} | record)
    )


def test_another_architecture_is_refused_and_changes_nothing(kept: Path) -> None:
    """By its settings; where those were lost, by the names of the tensors; else by their shapes."""
    other = changed(SETTINGS, model={"backbone": "r2plus1d_nano"})
    state = fresh(kept, other)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with pytest.raises(ValueError, match=r"other settings \(--model\.backbone r3d_nano -> r2plus1d_nano\): set them"):
        state.load(kept)
    tensors = load_file(kept / STATE_TENSORS)
    rewrite(kept, tensors, settings_hash=other.content_hash())
    with pytest.raises(ValueError, match=r"does not fit this run: missing .*key\.backbone.*, unknown"):
        state.load(kept)
    assert state.step == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())

    wide = changed(SETTINGS, generator={"hidden_channels": 9})
    rewrite(kept, tensors, settings_hash=wide.content_hash())
    state = fresh(kept, wide)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with pytest.raises(
        ValueError, match=r"another network: generator\..* is \(8, .*, this run's \(9, .*: set the flags of --model"
    ):
        state.load(kept)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())


def test_other_settings_are_named(kept: Path) -> None:
    """The sentence names the field, what it was and what it is; scaling may change."""
    with pytest.raises(ValueError, match=r"moco.temperature 0.07 -> 0.2"):
        fresh(kept, changed(SETTINGS, moco={"temperature": 0.2})).load(kept)
    fresh(kept, changed(SETTINGS, scaling={"num_workers": 2})).load(kept)


def test_settings_of_another_version_are_named_in_plain_words(kept: Path) -> None:
    """The message has the checkpoint and the flag, without pydantic's words around it; a damaged file is named too."""
    fields = json.loads((kept / STATE_SETTINGS).read_bytes())
    fields["moco"]["queue_length"] = 64
    (kept / STATE_SETTINGS).write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=r"cannot read the settings of checkpoint .*: --moco\.queue-length does"
    ) as raised:
        read_settings(kept)
    assert "Value error" not in str(raised.value)
    assert str(raised.value).endswith("does not exist: did you mean --moco.queue-size?")
    (kept / STATE_SETTINGS).write_text("{")
    with pytest.raises(DamagedCheckpointError, match=r"settings\.json of checkpoint .* is damaged"):
        read_settings(kept)


def test_other_data_are_refused(kept: Path) -> None:
    """A checkpoint belongs to the clips it was trained on."""
    with pytest.raises(ValueError, match=r"was trained on data set .*, this run reads other"):
        fresh(kept, manifest_hash="other").load(kept)


def test_a_snapshot_that_is_reused_takes_no_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory costs seconds for a large state: the second snapshot asks for none and has the new values."""
    state = TrainState(SETTINGS, manifest_hash="", device=CPU)
    first = state.snapshot()
    places = {name: tensor.data_ptr() for name, tensor in first.tensors.items()}
    state.difference.fill_(3.0)
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(module, "_host_memory", lambda tensor: taken.append(tensor) or torch.empty_like(tensor))
    second = state.snapshot(reuse=first)
    assert taken == []
    assert {name: tensor.data_ptr() for name, tensor in second.tensors.items()} == places
    assert float(second.tensors["difference"]) == 3


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    """An empty folder is not a checkpoint."""
    with pytest.raises(ValueError, match=r"is not a checkpoint of vmoco"):
        TrainState(SETTINGS, manifest_hash="", device=CPU).load(tmp_path)
