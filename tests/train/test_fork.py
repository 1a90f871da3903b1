"""A run that begins from another's training state: as if that had gone on, or with a method that changes on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dataset import make_data_set
from tests.train.test_loop import SETTINGS, Notes
from tests.train.test_step import CPU, changed
from vmoco.config import PretrainSettings
from vmoco.data.manifest import Manifest
from vmoco.train.fork import check_fork, fork
from vmoco.train.loop import train
from vmoco.train.state import TrainState


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


def test_with_equal_settings_it_is_as_if_the_other_went_on(donor: tuple[Manifest, str]) -> None:
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


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_the_method_may_change_on_the_way(donor: tuple[Manifest, str], ratio: float) -> None:
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


def test_what_cannot_be_taken_over_is_told_before(donor: tuple[Manifest, str], tmp_path: Path) -> None:
    """Another queue, other data, no step left, or no checkpoint: a sentence each."""
    manifest, uri = donor
    forked = changed(SETTINGS, run={"fork": uri})
    for settings, hash_, said in [
        (changed(forked, moco={"queue_size": 32}), manifest.hash, "moco.queue-size 64 -> 32"),
        (changed(forked, train={"optimizer": "adamw"}), manifest.hash, "train.optimizer sgd -> adamw"),
        (changed(forked, train={"stop_after": 7}), manifest.hash, "ends at 7: raise"),
        (forked, "other", "was trained on data set"),
        (changed(forked, run={"fork": str(tmp_path)}), manifest.hash, "is no checkpoint"),
    ]:
        with pytest.raises(ValueError, match=said):
            check_fork(settings, hash_)


def test_a_run_of_another_fork_is_another_run() -> None:
    """The name of a run stays with where it began; runs without a fork keep the hash that they had."""
    assert changed(SETTINGS, run={"fork": "/a"}).content_hash() != SETTINGS.content_hash()
    assert SETTINGS.content()["run"] == {"seed": 0}
