"""The ablation's order, names and start from a trunk; the training itself is the library's."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.benchmarks import ablation
from tests.benchmarks.ablation import (
    ARMS,
    CAMERA_VIDEOS,
    DECISIVE,
    FIT_MAPS,
    FURTHER,
    PRETRAIN_MAPS,
    TEST_MAPS,
    TRUNK,
    VALIDATION_MAPS,
)
from tests.train.test_step import CPU
from vmoco import storage
from vmoco.train.state import TrainState


def test_what_decides_comes_first_for_all_seeds() -> None:
    """The decisive arms of every seed stand before any other arm, each trunk before its arms, data sets in turn."""
    runs = list(ablation.in_order(["doom", "moments"], list(ARMS), [0, 1, 2]))
    assert len(runs) == len(set(runs)) == 2 * len(ARMS) * 3
    decisive = [arm in DECISIVE for _, arm, _ in runs]
    assert decisive == sorted(decisive, reverse=True)
    assert [seed for _, arm, seed in runs if arm in FURTHER] == sorted([0, 1, 2] * 2 * len(FURTHER))
    for at, (data, arm, seed) in enumerate(runs):
        if arm not in ablation.FROM_SCRATCH:
            assert (data, TRUNK, seed) in runs[:at]
    assert [data for data, _, _ in runs] == ["doom", "moments"] * (len(runs) // 2)


def test_a_test_part_shows_videos_that_nothing_else_does() -> None:
    """No map or video that a probe is tested or chosen on serves for anything else."""
    for parts in (
        {"pretrain": PRETRAIN_MAPS, "fit": FIT_MAPS, "validation": VALIDATION_MAPS, "test": TEST_MAPS},
        CAMERA_VIDEOS,
    ):
        shown = {part: set(names) for part, names in parts.items()}
        for part in ("validation", "test"):
            others = set().union(*(names for other, names in shown.items() if other != part))
            assert shown[part], part
            assert not shown[part] & others, part


def test_each_arm_is_another_training() -> None:
    """No two arms have the same settings, except where the arm is not trained by them."""
    hashes = {arm: ablation.settings_of(arm, 0).content_hash() for arm in ARMS if arm != "random initialisation"}
    assert len(set(hashes.values())) == len(hashes)


def test_results_of_before_are_still_found() -> None:
    """The name of a result follows from the settings that it changes: those of seed 0, which took hours, stay valid."""
    names = {arm: ablation.result_path(Path("/"), "doom", arm, 0).name for arm in ARMS}
    assert names["MoCo + decay"] == "moco-decay-seed0-669de078af.json"
    assert names["MoCo + adversarial dropping"] == "moco-adversarial-dropping-seed0-d00eaf5729.json"
    assert len(set(names.values())) == len(names)


def test_hardness_is_of_the_second_half() -> None:
    """The mean of the points after half of the steps; none where no generator chose frames."""
    points = {step: {"adversary_hardness": step / 100} for step in (100, 200, 300, 400)}
    assert ablation.hardness(points, 400) == 3.5
    assert ablation.hardness({400: {"loss": 1.0}}, 400) is None


def test_an_arm_starts_from_both_encoders_of_its_trunk(tmp_path: Path) -> None:
    """Query and key encoder, with heads and running statistics, are the trunk's; the queue is new."""
    trunk = TrainState(ablation.settings_of(TRUNK, 0), manifest_hash="", device=CPU)
    with torch.no_grad():
        for tensor in (*trunk.moco.query.state_dict().values(), *trunk.moco.key.state_dict().values()):
            tensor += torch.ones_like(tensor) * (1 if tensor.dtype == torch.int64 else torch.rand(()))
    ablation.save_weights(tmp_path / "trunk.safetensors", trunk, both=True)
    arm = TrainState(ablation.settings_of("MoCo", 0), manifest_hash="", device=CPU)
    queue = arm.moco.queue.keys.clone()
    ablation.begin_from(tmp_path / "trunk.safetensors", arm)
    for part in ("query", "key"):
        expected, found = getattr(trunk.moco, part).state_dict(), getattr(arm.moco, part).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(arm.moco.queue.keys, queue)
    ablation.save_weights(tmp_path / "arm.safetensors", arm, both=False)
    assert all(name.startswith("query.") for name in safetensors.torch.load_file(tmp_path / "arm.safetensors"))


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Runs that the benchmark starts on two data sets and seeds: each writes its result; the trunk of seed 0 fails.

    Weights of a trunk are its name; reports count results.
    """
    found: list[tuple[str, int]] = []

    def run(command: list[str], env: dict[str, str]) -> object:
        data, arm, seed = command[-3], command[-2], int(command[-1])
        found.append((arm, seed))
        failed = (arm, seed) == (TRUNK, 0)
        if not failed:
            weights = ablation.weights_path(tmp_path / "weights", data, arm, seed)
            weights.parent.mkdir(parents=True, exist_ok=True)
            weights.write_text(arm)
            path = ablation.result_path(tmp_path / "runs", data, arm, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"trunk": storage.file_sha256(str(weights))}))
        return type("Done", (), {"returncode": int(failed)})

    monkeypatch.setattr(ablation.subprocess, "run", run)
    monkeypatch.setattr(ablation, "make_data", lambda folder, name: None)
    monkeypatch.setattr(ablation, "write_report", lambda results, settings: len(results))
    places = ["--folder", str(tmp_path / "weights"), "--results", str(tmp_path / "runs")]
    words = ["--data", "doom", "--seeds", "0", "1", "--jobs", "1", "--arms", TRUNK, "MoCo"]
    monkeypatch.setattr("sys.argv", ["ablation", *places, *words])
    return found


def test_a_trunk_that_is_missing_fails_its_arms_alone(
    started: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed run stops no other run: the benchmark goes on, reports what there is, and ends with the failures."""
    with pytest.raises(SystemExit, match=r"2 runs failed.*'MoCo', 0"):
        ablation.main()
    assert started == [(TRUNK, 0), (TRUNK, 1), ("MoCo", 1)]
    assert capsys.readouterr().out.splitlines()[-1] == "2"


def test_another_machine_goes_on_only_with_the_same_trunk(
    started: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains the trunk again for an arm that is missing; where that ends with other bits, the arm is left out."""
    with pytest.raises(SystemExit):
        ablation.main()
    shutil.rmtree(tmp_path / "weights")
    monkeypatch.setattr("sys.argv", [word for word in sys.argv if word != "0"])  # seed 1 alone
    ablation.main()
    assert len(started) == 3  # nothing is missing, so no weights are needed
    result = ablation.result_path(tmp_path / "runs", "doom", "MoCo", 1)
    result.unlink()
    ablation.main()
    assert started[3:] == [(TRUNK, 1), ("MoCo", 1)]
    result.unlink()
    ablation.weights_path(tmp_path / "weights", "doom", TRUNK, 1).write_text("other bits")
    with pytest.raises(SystemExit, match=r"1 runs failed"):
        ablation.main()
    assert len(started) == 5
