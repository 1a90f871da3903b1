"""The champion changes only to a better version on the same clips, or for a given reason, and can be restored."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmoco import tracking
from vmoco.encoders import promotion, registry
from vmoco.encoders.promotion import Score, promote, record, rollback
from vmoco.encoders.registry import SHA256_TAG


def score(value: float, evaluation_set: str = "set-a", protocol: str = promotion.LABEL_FREE) -> Score:
    return Score(protocol, evaluation_set, value, value - 0.05, value + 0.05, "chance 10 %")


@pytest.fixture
def name(tracker_home: Path) -> str:
    """A registered name with three versions without files: these tests need only aliases and tags."""
    run_id = tracking.create_import("none", tags={f"{SHA256_TAG}.encoder": "0"})
    for _ in range(3):
        registry.register(run_id, name="tested", alias="candidate")
    return "tested"


def champion() -> str:
    return str(registry.find_version("models:/tested@champion").version)


def test_a_better_score_on_the_same_set_moves_it(name: str) -> None:
    """The first needs a score; the next one more than the champion's interval; a third on other clips is refused."""
    with pytest.raises(ValueError, match=r"version 1 has no label-free score: run jobs/evaluate.py models:/tested/1"):
        promote(name, version="1")
    record("models:/tested/1", [score(0.50)])
    assert promote(name, version="1").reason.startswith("the first champion: label-free 50.0%")
    assert champion() == "1"
    record("models:/tested/2", [score(0.55)])
    with pytest.raises(ValueError, match=r"not better than the champion, version 1: label-free 55.0% .*50.0%"):
        promote(name, version="2")
    record("models:/tested/2", [score(0.56)])  # measured again: the new one counts
    assert promote(name, version="2").version == champion() == "2"
    record("models:/tested/3", [score(0.99, "set-b"), score(0.99, protocol="knn")])
    with pytest.raises(ValueError, match=r"no label-free score on the same evaluation set"):
        promote(name)  # the candidate, version 3
    assert champion() == "2"
    with pytest.raises(ValueError, match="version 2 is the champion already"):
        promote(name, version="2")


def test_with_several_common_sets_it_must_win_on_each(name: str) -> None:
    """A version that is better on one set and worse on another is not better."""
    record("models:/tested/1", [score(0.5, "set-a"), score(0.5, "set-b")])
    promote(name, version="1")
    record("models:/tested/2", [score(0.9, "set-a"), score(0.4, "set-b")])
    with pytest.raises(ValueError, match="on set-b"):
        promote(name, version="2")


def test_force_needs_a_reason_and_rollback_goes_back(name: str) -> None:
    """The reason is kept; one rollback restores the previous champion, a second one the champion before that."""
    with pytest.raises(ValueError, match="has had 0 champions"):
        rollback(name)
    with pytest.raises(ValueError, match="--force is empty: write why"):
        promote(name, version="1", force_reason=" ")
    for version in ("1", "2", "3"):
        promote(name, version=version, force_reason=f"because of {version}")
    assert [move.reason for move in promotion.history(name)] == [f"forced: because of {v}" for v in "123"]
    assert rollback(name).version == champion() == "2"
    assert rollback(name).version == champion() == "1"
    with pytest.raises(ValueError, match="a rollback needs a previous one"):
        rollback(name)


def test_a_long_history_fits_the_tracker(name: str) -> None:
    """A tag of MLflow has a limit: the newest moves are kept, and long reasons are cut."""
    for turn in range(20):
        promote(name, version=str(turn % 2 + 1), force_reason="x" * 5000)
    assert len(promotion.history(name)) == 12
    assert rollback(name).version == "1"


def test_an_unknown_name_is_said(name: str) -> None:
    """The message lists the names that exist."""
    with pytest.raises(ValueError, match=r"nothing is registered as 'other'.*there is tested"):
        promotion.history("other")
    with pytest.raises(ValueError, match=r"models:/tested/9 is not registered"):
        promote(name, version="9")
