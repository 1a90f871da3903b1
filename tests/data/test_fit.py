"""A run and its data set: epochs become steps, shares become numbers, and clips get no longer than they are stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.dataset import make_data_set
from tests.train.test_step import changed
from vmoco.config import PretrainSettings
from vmoco.data.fit import fit_to_data, window_warnings
from vmoco.data.manifest import Manifest
from vmoco.presets import PRESETS

DEMO = PRESETS["demo"][1]
"""200 steps, of which 10 % are the warm-up; each of the 12 videos below is drawn four times in an epoch."""


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """12 videos, each with two clips of 16 frames."""
    return make_data_set(tmp_path, num_videos=12, num_frames=16)


@pytest.mark.parametrize(
    ("train", "steps", "warmup"),
    [
        ({}, 200, 20),
        ({"epochs": 40.0}, 60, 6),
        ({"epochs": 0.1}, 1, 0),
        ({"epochs": 40.0, "warmup_steps": 5}, 60, 5),
        ({"steps": 300}, 300, 30),
        ({"warmup_percent": 2.5}, 200, 5),
        ({"warmup_percent": 0.0}, 200, 0),
    ],
)
def test_steps_follow_from_epochs(manifest: Manifest, train: dict[str, Any], steps: int, warmup: int) -> None:
    """What was given counts, and not what the preset says in another way; fitted twice it is the same."""
    fitted, lines = fit_to_data(changed(DEMO, train=train), manifest)
    assert (fitted.train.steps, fitted.train.warmup_steps) == (steps, warmup)
    assert (fitted.train.epochs, fitted.train.warmup_percent) == (None, None)
    said = [line for line in lines if "epochs" in line]
    assert said == ([f"{train['epochs']:g} epochs of 48 clips are {steps} steps of 32"] if "epochs" in train else [])
    assert fit_to_data(fitted, manifest) == (fitted, [])


def test_a_window_that_saves_nothing_is_said(manifest: Manifest) -> None:
    """On a disk, where its clips do not fit into the cache, and where an epoch leaves most of its clips out."""

    def said(data_set: Manifest, **data: Any) -> list[str]:
        return window_warnings(changed(DEMO, data={"draws_per_video": 2} | data), data_set)

    far = dataclasses.replace(manifest, uri="gs://bucket/set")
    gib = sum(each.num_bytes for each in manifest.shards.values()) / 2**30
    assert said(manifest) == said(far) == []
    (line,) = said(manifest, shuffle_window=4)
    assert line.startswith("--data.shuffle-window 4 saves requests to a store, and ")
    room = gib / 0.9 / 12
    assert said(far, shuffle_window=6, cache_gib=6.5 * room) == []
    (line,) = said(far, shuffle_window=8, cache_gib=6.5 * room)
    assert line.startswith("--data.shuffle-window 8: the clips of a window have 0.0")
    assert line.endswith("lower the window to 6, or raise the size of the cache")
    (line,) = said(far, shuffle_window=4, cache_gib=6.5 * room, draws_per_video=1)
    assert "fetches all 2.0 clips of each video of gs://bucket/set, and an epoch uses 1: give --data.draws" in line
    assert said(far, shuffle_window=4, draws_per_video=1) == [], "all clips stay in the cache"


def test_epochs_of_the_preset_give_way_to_steps(manifest: Manifest) -> None:
    """`recommended` trains 200 epochs, with 2.5 % of the steps as warm-up, unless one says otherwise."""
    recommended = changed(PRESETS["recommended"][1], data={"stride": 1})
    few = changed(recommended, train={"steps": 80})
    assert fit_to_data(few, manifest)[0].train.steps == 80
    fitted, lines = fit_to_data(recommended, manifest)
    assert fitted.train.steps == round(200 * 12 / 256)
    assert lines[0] == "200 epochs of 12 clips are 9 steps of 256"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"epochs": 3.0, "steps": 100}, "--train.epochs 3 and --train.steps 100 both say the same thing: leave one"),
        ({"warmup_percent": 3.0, "warmup_steps": 7}, "--train.warmup-percent 3 and --train.warmup-steps 7 both say"),
    ],
)
def test_both_ways_at_once_are_refused(manifest: Manifest, train: dict[str, Any], message: str) -> None:
    """Neither can come from the preset, so one of them would be ignored."""
    with pytest.raises(ValueError, match=message):
        fit_to_data(changed(DEMO, train=train), manifest)


def test_without_a_length_a_run_is_refused() -> None:
    """The message names both ways to give one."""
    with pytest.raises(ValueError, match=r"--train\.steps is missing: give it, or --train\.epochs"):
        PretrainSettings(**{"train": {"global_batch": 64}})


@pytest.mark.parametrize(
    ("preset", "data", "stride"),
    [
        ("demo", {"num_frames": 5}, 2),  # 9 of 10 frames
        ("demo", {}, 1),  # 15 frames are not there, 8 are
        ("demo", {"stride": 3}, 3),  # given, and so refused later
        ("paper", {}, 1),  # 32 frames are not there either way
    ],
)
def test_clips_fit_what_is_stored(tmp_path: Path, preset: str, data: dict[str, Any], stride: int) -> None:
    """A preset's stride gives way to that which fits, and a line says so; a stride that was given stays."""
    manifest = make_data_set(tmp_path, num_frames=10)
    settings = changed(PRESETS[preset][1], data=data)
    fitted, lines = fit_to_data(settings, manifest)
    assert fitted.data.stride == stride
    assert fitted.data.num_frames == settings.data.num_frames
    if stride != settings.data.stride:
        (line,) = lines
        assert line.startswith("--data.stride 1, and not 2 as in preset demo, because the clips of ")
        assert line.endswith("have 10 frames: ingest with --num-frames 15 for longer ones")
