"""The report of the ablation: differences within a trunk, choices on validation alone, partial results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks import ablation_report as report
from tests.benchmarks.ablation import ARMS, BASE

MOCO, RANDOM, RELATIVE = "MoCo", "MoCo + random dropping", "MoCo + adversarial dropping, relative"
LONGER = "MoCo, old keys + random dropping, twice the steps"


def result(arm: str, seed: int, test: float, validation: float = 0.0, **more: Any) -> dict[str, Any]:
    """A result as a run leaves it, in short."""
    scores = {"linear_test": test, "knn_test": test - 5, "linear_validation": validation, "knn_validation": 0.0}
    return {"data": "doom", "arm": arm, "seed": seed, "cpu_seconds": 120, "metrics": {}, "dropped": {}} | scores | more


def test_differences_are_within_a_trunk() -> None:
    """Trunks differ by 40 points and the arm by 1, 2 and 3: the interval is that of 1, 2 and 3, by the table of t."""
    results = [result(MOCO, seed, 20.0 * seed) for seed in range(4)]
    results += [result(RANDOM, seed, 20.0 * seed + gain) for seed, gain in ((2, 1.0), (0, 2.0), (1, 3.0))]
    found = report.difference(results, RANDOM, MOCO, measure="linear_test")
    assert found.mean == pytest.approx(2)
    assert found.half_width == pytest.approx(4.303 * 1 / 3**0.5, abs=1e-3)  # 97.5 % of t with 2 degrees of freedom
    assert found.count == 3  # trunk 3 lacks the arm
    assert str(found) == "+2.0 ± 2.5"


def test_a_partial_report_says_how_many_trunks_count() -> None:
    """One trunk has no interval; a difference that has fewer trunks than the arm says so; hardness may be missing."""
    results = [result(MOCO, 0, 40), result(MOCO, 1, 44), result(RANDOM, 0, 41)]
    results += [result(RELATIVE, seed, 42.0 + 2 * seed, hardness=1.0 + seed) for seed in (0, 1, 2)]
    results += [result("random initialisation", 0, 27, hardness=None)]
    rows = {line.split(" | ")[0].strip("| "): line for line in report.tables(results).splitlines()}
    assert rows[RELATIVE].startswith(f"| {RELATIVE} | 3 | 44.0 | +1.0 ± 12.7 (2 trunks) | +1.0 (1 trunks) | 39.0 |")
    assert rows[RELATIVE].endswith("| 2.00 | 2.0 |")
    assert rows[RANDOM].startswith(f"| {RANDOM} | 1 | 41.0 | +1.0 |  | 36.0 |")
    assert rows["random initialisation"].endswith("|  | 2.0 |")
    line = report._line(results)
    assert line["chosen_on_validation"] == {}  # no arm shares three trunks with MoCo
    assert line["arms"][RANDOM] == {
        "linear": 41.0,
        "to_moco": {"mean": 1.0, "trunks": 1},
        "seeds": [0],
        "hardness": None,
        "cpu_minutes": 2.0,
    }
    assert line["arms"][RELATIVE]["to_moco"] == {"mean": 1.0, "trunks": 2, "low": -11.71, "high": 13.71}


def test_the_test_part_chooses_nothing() -> None:
    """The best arm of the validation part is chosen and reported by its test part, even if another wins there."""
    results = []
    for seed in range(3):
        results += [result(MOCO, seed, 40, 40), result(RANDOM, seed, 50 + seed, 41), result(RELATIVE, seed, 38, 45)]
    results += [result("MoCo + two clips", seed, 90, 90) for seed in range(2)]  # too few trunks
    results += [result("supervised", seed, 99, 99) for seed in range(3)]  # learned from labels
    results += [result(LONGER, seed, 99, 99) for seed in range(3)]  # with more steps than the others
    found = report._line(results)["chosen_on_validation"]
    assert found["among all arms"]["arm"] == RELATIVE
    assert found["among all arms"]["validation"]["mean"] == 5
    assert found["among all arms"]["test"] == {"mean": -2.0, "trunks": 3, "low": -2.0, "high": -2.0}
    assert found["among adversarial arms"] | {"validation": None, "test": None} == {
        "arm": RELATIVE,
        "validation": None,
        "test": None,
        "to": RANDOM,
    }
    assert found["among adversarial arms"]["test"]["mean"] == -13


def test_data_sets_choose_together_and_another_only_tests() -> None:
    """The arm with the best mean over both validation parts, which neither chooses alone; `camera` has no say."""
    gains = {"MoCo + two clips": (9.0, -5.0, 99.0), RANDOM: (6.0, 6.0, 1.0), RELATIVE: (-5.0, 9.0, 0.0)}
    by_data = {}
    for at, data in enumerate(("doom", "moments", "camera")):
        found = [result(MOCO, seed, 40, 40) for seed in range(3)]
        for arm, gain in gains.items():
            found += [result(arm, seed, 40 + 2 * gain[at], 40 + gain[at]) for seed in range(3)]
        found += [result(LONGER, seed, 99, 99) for seed in range(3)]
        by_data[data] = found
    together = report.choose_together(by_data)
    assert {choice.arm for choice in together.values()} == {RANDOM}
    assert {data: choice.validation.mean for data, choice in together.items()} == {"doom": 6, "moments": 6, "camera": 1}
    assert {data: choice.test.mean for data, choice in together.items()} == {"doom": 12, "moments": 12, "camera": 2}
    assert f"together: {RANDOM}.**" in report._together(together)
    assert report.choose_together({"doom": by_data["doom"]}) == {}


def test_the_arms_that_the_report_compares_exist() -> None:
    """Every name in the report is an arm: a renamed arm would silently leave a comparison out."""
    named = {report.REFERENCE, report.CONTROL, *(name for pair in report.PAIRS for name in pair)}
    assert named <= set(ARMS)
    assert [arm for arm in ARMS if arm.endswith(report.LONGER)] == [LONGER]
    assert sum(arm.startswith(report.ADVERSARY) for arm in ARMS) == 6


def test_the_report_is_written_beside_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text around the tables stays; JSON, table and plot show every run; a second report gives the same bytes."""
    method = tmp_path / "METHOD.md"
    method.write_text(f"before\n{report._BEGIN}old\n{report._END}\nafter\n")
    monkeypatch.setattr(report, "METHOD", method)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    results = [result(arm, seed, 40 + 3 * at + seed) for at, arm in enumerate((MOCO, RANDOM)) for seed in (0, 1)]
    results += [{**each, "data": "moments"} for each in results[:3]]
    for each in results:
        each |= {"metrics": {"oldest_key_similarity": 0.91234}, "dropped": {"dropped_entropy": 0.5, "step": 400}}
    found = report.write_report(results, settings=BASE)
    text, plot = method.read_text(), (tmp_path / "results/ablation.png").read_bytes()
    assert text.startswith("before\n")
    assert text.endswith("<!-- /ablation -->\nafter\n")
    assert "old" not in text
    assert text.count("| MoCo + random dropping | ") == 2
    assert list(found) == ["doom", "moments", "chosen on validation together", "core_hours"]
    assert found["core_hours"] == round(7 * 120 / 3600, 1)
    kept = json.loads((tmp_path / "results/ablation.json").read_text())
    assert kept["settings"] == BASE.content()
    assert kept["summary"] == found
    assert [(row["data"], row["arm"], row["linear_test"]) for row in kept["results"]] == [
        (each["data"], each["arm"], each["linear_test"]) for each in results
    ]
    assert kept["results"][0]["oldest_key_similarity"] == 0.912
    assert np.asarray(Image.open(tmp_path / "results/ablation.png")).std() > 1
    assert report.write_report(kept["results"], settings=BASE) == found
    assert method.read_text() == text
    assert (tmp_path / "results/ablation.png").read_bytes() == plot
