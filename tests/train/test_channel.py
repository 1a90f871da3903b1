"""A run that fails goes on while it makes progress, and ends with a message when it makes none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dataset import make_data_set
from tests.train.test_step import changed
from vmoco.cluster.local import LocalCluster
from vmoco.job import describe
from vmoco.presets import PRESETS
from vmoco.train.run import Run, prepare
from vmoco.train.run_folder import RunFolder
from vmoco.train.state import STATE_RECORD

CHECKPOINTS = 3


def fail_after_a_checkpoint(config: dict[str, str]) -> None:
    """A worker that keeps one checkpoint and fails, three times, and then fails without a new one."""
    from vmoco.train.channel import errors_reported

    kept = len(list(Path(config["folder"]).glob("step-*")))
    if kept < CHECKPOINTS:
        place = Path(RunFolder(config["folder"]).checkpoint_uri(10 * (kept + 1)))
        place.mkdir(parents=True)
        (place / STATE_RECORD).touch()
    with errors_reported(None):  # it is no error for the user, so nothing is reported
        raise RuntimeError(f"failure with {kept} checkpoints")


@pytest.mark.cluster
@pytest.mark.parametrize("max_failures", [0, 1])
def test_failures_are_counted_anew_after_each_checkpoint(
    ray_cluster: LocalCluster, tmp_path: Path, max_failures: int
) -> None:
    """With one restart allowed a run outlives three failures, as each comes after a new checkpoint; with none, no."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    from vmoco.train.channel import Channel, Listener
    from vmoco.train.launch import run_config

    make_data_set(tmp_path / "data")
    settings = changed(
        PRESETS["tiny"][1],
        run={"name": "failing", "storage": str(tmp_path / "runs")},
        data={"uri": str(tmp_path / "data")},
        scaling={"max_failures": max_failures},
    )
    run = Run(**vars(prepare(settings)), run_id="none", is_new=True)
    channel = Channel.remote()  # type: ignore[attr-defined]
    lines: list[str] = []
    listener = Listener(channel, lines.append)
    trainer = TorchTrainer(
        fail_after_a_checkpoint,
        train_loop_config={"folder": run.folder},
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=run_config(run, channel, []),
    )
    with pytest.raises(ray.train.TrainingFailedError) as raised:
        trainer.fit()
    listener.close()
    message = describe(raised.value)
    assert message.startswith("error: run failing has failed ")
    restarts = [line for line in lines if line.startswith("warning: workers failed")]
    if max_failures == 0:
        assert "failed once since its checkpoint of step 10: RuntimeError: failure with 0 checkpoints" in message
        assert restarts == []
    else:
        assert "failed 2 times since its checkpoint of step 30: RuntimeError: failure with 3 checkpoints" in message
        assert len(restarts) == CHECKPOINTS
        assert restarts[0].endswith("restart 1 of at most 1 since its checkpoint of step 10")
    assert "raise --scaling.max-failures" in message
    assert any("in fail_after_a_checkpoint" in line for line in lines), f"a traceback names the line: {lines}"
