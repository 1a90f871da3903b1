"""What the driver does after training: an encoder is registered, also where its score cannot be had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.train.test_step import changed
from vmoco.presets import PRESETS


@pytest.mark.parametrize("kind", ["slow", "lost"])
def test_an_encoder_that_cannot_be_scored_is_registered_without_a_score(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scoring that takes too long, or whose task is lost, gives a warning with the reason and what to do."""
    from ray.exceptions import WorkerCrashedError

    from vmoco.train import launch

    def score_now(*_: Any) -> None:
        raise TimeoutError("not scored within 600 s") if kind == "slow" else WorkerCrashedError()

    monkeypatch.setattr(launch, "score_now", score_now)
    settings = changed(PRESETS["tiny"][1], tracking={"register_as": "tested"}, evaluation={"enabled": True})
    run: Any = SimpleNamespace(settings=settings)
    lines: list[str] = []
    assert launch._score(run, None, None, lines.append) is None  # type: ignore[arg-type]
    (line,) = lines
    assert line.startswith("warning: the encoder is registered without a score (")
    assert ("not scored within 600 s" in line) == (kind == "slow")
    assert line.endswith("jobs/evaluate.py can score it later")


def test_ray_restarts_without_limit_and_our_limit_is_called_first() -> None:
    """Ray's own count is a total over the run, so it must not end it; other callbacks of the caller stay."""
    from vmoco.train import launch
    from vmoco.train.channel import RestartLimit

    settings = changed(PRESETS["tiny"][1], run={"name": "tested", "storage": "/nowhere"}, scaling={"max_failures": 2})
    run: Any = SimpleNamespace(settings=settings, folder="/nowhere/tested")
    other = RestartLimit(name="other", folder="", max_failures=0, channel=None)
    config = launch.run_config(run, None, [other])
    assert config.failure_config is not None
    assert config.failure_config.max_failures == -1
    assert config.callbacks is not None
    assert isinstance(config.callbacks[0], RestartLimit)
    assert config.callbacks[1:] == [other]
