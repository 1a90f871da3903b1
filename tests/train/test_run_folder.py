"""The folder of a run: the newest complete checkpoint is found, the list survives a kill, runs can start from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.dataset import make_data_set
from tests.train.test_checkpoint_writer import SETTINGS as WRITTEN
from tests.train.test_checkpoint_writer import Run, fresh, scored
from tests.train.test_loop import SETTINGS, Notes
from tests.train.test_step import CPU, changed
from vmoco.config import PretrainSettings
from vmoco.data.augment import augment
from vmoco.data.loader import Loader, View
from vmoco.data.manifest import Manifest
from vmoco.model.moco import MocoEncoder
from vmoco.train.loop import train
from vmoco.train.run_folder import CHECKPOINTS, DAMAGED, RunFolder, begin_from, check_fork, fork
from vmoco.train.state import STATE_RECORD, STATE_SETTINGS, STATE_TENSORS, TrainState
from vmoco.train.step import TrainStep


@pytest.mark.parametrize("damage", ["flip", "cut", "no tensors", "no record", "half a record"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    """Whatever is broken, the one before is restored. The damaged one is reported once, and never tried again."""
    run = Run(tmp_path)
    run.keep(10, 20)
    place = Path(run.folder.checkpoint_uri(20))
    content = (place / STATE_TENSORS).read_bytes()
    if damage == "flip":
        (place / STATE_TENSORS).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "cut":
        (place / STATE_TENSORS).write_bytes(content[: len(content) // 2])
    elif damage == "no tensors":
        (place / STATE_TENSORS).unlink()
    elif damage == "no record":
        (place / STATE_RECORD).unlink()
    else:
        (place / STATE_RECORD).write_text((place / STATE_RECORD).read_text()[:40])
    state, folder = fresh(), RunFolder(str(tmp_path))
    found = folder.resume(state)
    assert found is not None
    assert (found.record.step, state.step) == (10, 10)
    if damage == "no record":  # it was never finished, so nothing is wrong
        assert found.damaged == []
        return
    assert len(found.damaged) == 1
    assert "step-00000020" in found.damaged[0]
    assert (place / DAMAGED).exists()
    again = folder.resume(fresh())
    assert again is not None
    assert again.damaged == []


def test_no_complete_checkpoint_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    """A run whose checkpoints are all broken is not silently started again; a run that has none starts."""
    folder = RunFolder(str(tmp_path))
    assert folder.resume(fresh()) is None
    assert folder.restore(fresh()) == []
    Run(tmp_path).keep(10)
    Path(folder.checkpoint_uri(10), STATE_TENSORS).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete: .*step-00000010 has no state\.safetensors"):
        folder.resume(fresh())


def test_a_checkpoint_of_other_settings_is_not_skipped(tmp_path: Path) -> None:
    """It is refused, although an older one would fit."""
    run = Run(tmp_path)
    run.keep(10)
    other = TrainState(changed(WRITTEN, moco={"temperature": 0.2}), manifest_hash="data", device=CPU)
    other.step = 20
    place = Path(run.folder.checkpoint_uri(20))
    place.mkdir()
    other.save(place)
    with pytest.raises(ValueError, match=r"--moco\.temperature 0\.2 -> 0\.07"):
        run.folder.resume(fresh())


def test_a_resumed_list_ends_at_the_checkpoint(tmp_path: Path) -> None:
    """Scores stay, later rows go, and what a kill has left half-written is removed."""
    run = Run(tmp_path, keep_checkpoints=3)
    run.keep(10, 20, 30)
    run.folder.add_score(20, scored(0.5))
    run.writer.close()
    (tmp_path / ".step-40.x.tmp").mkdir()
    again = RunFolder(str(tmp_path))
    again.open_list(20)
    assert [(row.step, row.score) for row in again.checkpoints()] == [(10, None), (20, scored(0.5))]
    assert not (tmp_path / ".step-40.x.tmp").exists()
    again.open_list(30)
    newest = again.newest()
    assert newest is not None
    assert (newest.step, newest.score) == (30, None)


def test_a_checkpoint_that_the_list_misses_is_used(tmp_path: Path) -> None:
    """Killed between a checkpoint and the list, with an old list or none: the run resumes from the checkpoint."""
    run = Run(tmp_path)
    run.keep(10)
    before = (tmp_path / CHECKPOINTS).read_bytes()
    run.keep(20)
    for left in (before, None):
        (tmp_path / CHECKPOINTS).unlink()
        if left is not None:
            (tmp_path / CHECKPOINTS).write_bytes(left)
        state, folder = fresh(), RunFolder(str(tmp_path))
        assert folder.restore(state) == []
        assert state.step == 20
        folder.open_list(20)
        assert [row.step for row in folder.checkpoints()] == ([10, 20] if left else [20])


def new_state(settings: PretrainSettings, manifest: Manifest) -> TrainState:
    return TrainState(settings, manifest_hash=manifest.hash, device=CPU)


@pytest.fixture
def donor(tmp_path: Path) -> tuple[Manifest, str]:
    """The checkpoint of a run that stopped after step 7 of 12, when the generator had begun (at 6)."""
    manifest = make_data_set(tmp_path / "data")
    settings = changed(SETTINGS, train={"stop_after": 7})
    state, host = new_state(settings, manifest), Notes()
    assert train(settings, manifest, state, device=CPU, host=host)
    assert (state.step, host.kept) == (7, [5, 7])
    place = tmp_path / "donor"
    place.mkdir()
    state.save(place)
    return manifest, str(place)


def test_a_fork_with_equal_settings_continues_the_other_run(donor: tuple[Manifest, str]) -> None:
    """Steps 8 to 12 after a fork: every tensor has the bits of a run of 12 steps in one go."""
    manifest, uri = donor
    straight = new_state(SETTINGS, manifest)
    train(SETTINGS, manifest, straight, device=CPU, host=Notes())
    forked = new_state(SETTINGS, manifest)
    fork(uri, forked)
    assert forked.step == 7
    train(SETTINGS, manifest, forked, device=CPU, host=Notes())
    expected, found = straight.tensors(), forked.tensors()
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_fork_may_change_what_decays(donor: tuple[Manifest, str]) -> None:
    """Each parameter keeps its own momentum, although the optimizer has two groups now, and the run goes on."""
    manifest, uri = donor
    settings = changed(SETTINGS, train={"weight_decay_on": "weights"}, run={"fork": uri})
    check_fork(settings, manifest.hash)
    state = new_state(settings, manifest)
    fork(uri, state)
    assert len(state.query_optimizer.param_groups) == 2
    stored = load_file(Path(uri, STATE_TENSORS))
    found = state.tensors()
    assert set(found) == set(stored)
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert train(settings, manifest, state, device=CPU, host=Notes())


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_fork_may_change_the_method(donor: tuple[Manifest, str], ratio: float) -> None:
    """Another drop ratio, decay and learning rate from step 8 on: it trains to its end, and differently."""
    manifest, uri = donor
    settings = changed(
        SETTINGS,
        generator={"drop_ratio": ratio},
        moco={"decay": 0.9},
        train={"learning_rate": 0.01},
        run={"fork": uri},
    )
    check_fork(settings, manifest.hash)
    state = new_state(settings, manifest)
    fork(uri, state)
    assert train(settings, manifest, state, device=CPU, host=Notes())
    assert state.step == 12


def test_a_fork_that_does_not_fit_is_refused(donor: tuple[Manifest, str], tmp_path: Path) -> None:
    """Another queue or optimizer, no step left, other data, or no checkpoint: one error message each."""
    manifest, uri = donor
    forked = changed(SETTINGS, run={"fork": uri})
    for settings, hash_, message in [
        (changed(forked, moco={"queue_size": 32}), manifest.hash, r"--moco\.queue-size 64 -> 32"),
        (changed(forked, train={"optimizer": "adamw"}), manifest.hash, r"--train\.optimizer sgd -> adamw"),
        (changed(forked, train={"stop_after": 7}), manifest.hash, "ends at 7: raise"),
        (forked, "other", "was trained on data set"),
        (changed(forked, run={"fork": str(tmp_path)}), manifest.hash, "is not a checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_fork(settings, hash_)
    Path(uri, STATE_SETTINGS).write_text('{"moco": {"queue_size": 0}}')
    with pytest.raises(
        ValueError, match=r"settings of checkpoint .*donor: --moco\.queue-size 0 is not allowed"
    ) as raised:
        check_fork(forked, manifest.hash)
    assert "Value error" not in str(raised.value)


def test_a_run_with_another_fork_is_another_run() -> None:
    """The hash of a run covers its fork; a run without a fork has the hash of before forks existed."""
    assert changed(SETTINGS, run={"fork": "/a"}).content_hash() != SETTINGS.content_hash()
    assert SETTINGS.content()["run"] == {"seed": 0}


# Another optimizer, queue, method, seed and length of the run than those of the donor.
NEW_CYCLE = changed(
    SETTINGS,
    run={"seed": 5},
    data={"positives": "two_clips"},
    generator={"drop_ratio": 0.5},
    moco={"queue_size": 24, "decay": 0.9},
    train={"steps": 9, "optimizer": "adamw", "learning_rate": 0.001, "schedule": "cosine", "warmup_steps": 4},
)


def test_a_new_cycle_keeps_the_networks_and_starts_all_else(donor: tuple[Manifest, str]) -> None:
    """Encoders, heads, batch-norm statistics and generator are those of the checkpoint; the rest is as in a new run.

    The learning rate of the first step is the first of a warm-up of 4 steps: 0.001 * 8 / 32 / 4.
    """
    manifest, uri = donor
    state, new = new_state(NEW_CYCLE, manifest), new_state(NEW_CYCLE, manifest)
    begin_from(uri, state)
    trunk = load_file(Path(uri, STATE_TENSORS))
    found, fresh_tensors = state.tensors(), new.tensors()
    assert set(found) == set(fresh_tensors)
    for name, tensor in found.items():
        kept = name.startswith(("query.", "key.", "generator."))
        assert torch.equal(tensor, (trunk if kept else fresh_tensors)[name]), name
    assert not torch.equal(found["query.head.weight"], found["key.head.weight"])
    assert (state.step, state.moco.queue.num_filled, float(state.difference)) == (0, 0, 0.0)
    TrainStep(NEW_CYCLE, state, CPU)(Loader(manifest, NEW_CYCLE, rank=0, world_size=1).batch(0))
    assert state.query_optimizer.param_groups[0]["lr"] == pytest.approx(0.001 * 8 / 32 / 4)


def test_the_first_losses_of_a_new_cycle_are_those_of_the_networks_that_it_keeps(donor: tuple[Manifest, str]) -> None:
    """Computed from the checkpoint's tensors alone, with a learning rate too small to change them: steps 1 and 2.

    The queue is empty at step 1, so its loss is log 1; at step 2 it has the 8 keys of step 1.
    """
    manifest, uri = donor
    settings = changed(
        NEW_CYCLE,
        moco={"decay": 1.0},
        generator={"start_percent": 100.0},
        train={"learning_rate": 1e-12},
        augment={"blur_probability": 0.0},
    )
    state = new_state(settings, manifest)
    begin_from(uri, state)
    step, loader = TrainStep(settings, state, CPU), Loader(manifest, settings, rank=0, world_size=1)
    trunk, encoders = load_file(Path(uri, STATE_TENSORS)), {}
    for part in ("query", "key"):
        encoders[part] = MocoEncoder("r3d_nano", embedding_dim=32, head="linear").train()
        encoders[part].load_state_dict(
            {name.removeprefix(f"{part}."): value for name, value in trunk.items() if name.startswith(f"{part}.")}
        )

    def embeddings(part: str, view: View) -> torch.Tensor:
        clips = augment(view.frames, view.draws, size=32)
        return torch.cat([encoders[part](clips[:4]), encoders[part](clips[4:])])

    queue, videos = torch.zeros(0, 32), torch.zeros(0, dtype=torch.int64)
    for number in (0, 1):
        batch = loader.batch(number)
        with torch.no_grad():
            pairs = zip(encoders["key"].parameters(), encoders["query"].parameters(), strict=True)
            for slow, fast in pairs:
                slow.copy_(settings.moco.momentum * slow + (1 - settings.moco.momentum) * fast)
            queries, keys = embeddings("query", batch.query), torch.empty(8, 32)
            keys[batch.key_order] = embeddings("key", batch.key)
            similarities = queries @ queue.T
            similarities[batch.video_ids[:, None] == videos[None, :]] = -torch.inf
            logits = torch.cat([(queries * keys).sum(dim=1, keepdim=True), similarities], dim=1) / 0.07
            expected = F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
            positive = (queries * keys).sum(dim=1).mean()
        numbers = step(batch).numbers()
        assert numbers["positive_similarity"] == pytest.approx(float(positive), rel=1e-4)
        assert numbers["loss"] == pytest.approx(float(expected), rel=1e-4)
        assert (numbers["loss"] > 0.1) == (number == 1)
        queue, videos = torch.cat([queue, keys]), torch.cat([videos, batch.video_ids])


def test_a_new_cycle_has_a_new_generator_where_its_size_is_another(donor: tuple[Manifest, str]) -> None:
    """9 channels in place of 8: it is that of a new run with the same seed."""
    manifest, uri = donor
    settings = changed(NEW_CYCLE, generator={"hidden_channels": 9})
    state = new_state(settings, manifest)
    begin_from(uri, state)
    expected = new_state(settings, manifest).moco.generator.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in state.moco.generator.state_dict().items())


def test_a_new_cycle_of_other_encoders_is_refused(donor: tuple[Manifest, str], tmp_path: Path) -> None:
    """Another head or width, a damaged checkpoint, or none: one error message each, and the state is unchanged."""
    manifest, uri = donor
    for fields, message in [
        ({"head": "mlp"}, r"other encoders \(--model\.head linear -> mlp\): set these as they were"),
        ({"embedding_dim": 16}, r"other encoders \(--model\.embedding-dim 32 -> 16\): set these"),
    ]:
        with pytest.raises(ValueError, match=message):
            begin_from(uri, new_state(changed(SETTINGS, model=fields), manifest))
    state = new_state(SETTINGS, manifest)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with pytest.raises(ValueError, match="is not a checkpoint of vmoco"):
        begin_from(str(tmp_path), state)
    path = Path(uri, STATE_TENSORS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged"):
        begin_from(uri, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
