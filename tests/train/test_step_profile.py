"""A profile shows the steps that were named, and changes no number of the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.dataset import make_data_set
from tests.train.test_loop import SETTINGS, Notes
from tests.train.test_step import CPU, changed
from vmoco.train.loop import train
from vmoco.train.state import TrainState
from vmoco.train.step_profile import StepProfile


def run(folder: Path, **fields: Any) -> Notes:
    settings, manifest, host = changed(SETTINGS, train=fields), make_data_set(folder), Notes()
    train(settings, manifest, TrainState(settings, manifest_hash=manifest.hash, device=CPU), device=CPU, host=host)
    return host


def trace(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(content))
    return found


@pytest.mark.usefixtures("one_thread")
def test_a_profile_has_its_steps_and_changes_no_number(tmp_path: Path) -> None:
    """Steps 4 and 5 of 12: one trace with as many forwards as two steps have, and the same losses as without."""
    plain, profiled = run(tmp_path / "a"), run(tmp_path / "b", profile_steps="4:6")
    assert list(profiled.files) == ["profile/steps-00000004-00000006-rank-0.json.gz"]
    assert plain.files == {}
    names = [event.get("name") for event in trace(profiled.files.popitem()[1])["traceEvents"]]
    # Two micro-batches of two steps, each with a gradient of the loss.
    assert names.count("aten::cross_entropy_loss") == 4
    for step, numbers in plain.points.items():
        assert numbers["loss"] == profiled.points[step]["loss"]
        assert numbers["gradient_norm"] == profiled.points[step]["gradient_norm"]


def test_a_run_that_stops_within_the_profile_keeps_what_there_is(tmp_path: Path) -> None:
    """Ended after step 7 of a profile from 6 to 10: a trace of one step, with its true name."""
    host = run(tmp_path, profile_steps="6:10", stop_after=7)
    assert list(host.files) == ["profile/steps-00000006-00000007-rank-0.json.gz"]


def break_off(profile: StepProfile) -> None:
    """Fails after the first step has begun."""
    with profile:
        profile.before(0)
        raise RuntimeError("broken")


def test_an_error_within_the_profile_is_raised_and_the_profiler_stopped() -> None:
    """No trace is kept then, and another profile can start."""
    settings = changed(SETTINGS, train={"profile_steps": "0:2"}).train
    kept: list[str] = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            break_off(StepProfile(settings, CPU, lambda name, content: kept.append(name)))
    assert kept == []
    with StepProfile(settings, CPU, lambda name, content: kept.append(name)) as profile:
        profile.before(1)  # resumed in the middle
        profile.after(1)
    assert kept == ["profile/steps-00000001-00000002-rank-0.json.gz"]


@pytest.mark.parametrize("steps", ["5:5", "9:4", "0:51", "100", "1:x"])
def test_steps_that_cannot_be_profiled_are_refused(steps: str) -> None:
    """None, too many, or no pair of numbers: the message has the flag and the value."""
    with pytest.raises(ValueError, match=rf"--train\.profile-steps {steps} is not allowed: give FIRST:END"):
        changed(SETTINGS, train={"profile_steps": steps})


def test_a_profile_does_not_change_the_settings_of_a_run() -> None:
    """The hash is the same with it, and without it so are the bytes: a run in progress can be profiled."""
    profiled = changed(SETTINGS, train={"profile_steps": "4:6"})
    assert profiled.content_hash() == SETTINGS.content_hash()
    assert "profile_steps" not in SETTINGS.canonical_json()
    assert "profile_steps" in profiled.canonical_json()
