"""A preset runs on the data for which it is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data import videos
from tests.dataset import make_data_set
from tests.train.test_loop import Notes
from tests.train.test_step import CPU, changed
from vmoco.cluster.local import LocalCluster
from vmoco.config import PretrainSettings
from vmoco.job_settings import IngestSettings
from vmoco.model.queue import oldest_key_weight
from vmoco.presets import PRESETS
from vmoco.train.loop import train
from vmoco.train.run import introduce, open_run, prepare
from vmoco.train.state import TrainState

SMALL = PRESETS["small"][1]


def steps_of(settings: PretrainSettings, host: Notes) -> TrainState:
    """Two steps with the generator, on this process alone."""
    prepared = prepare(changed(settings, generator={"start_percent": 0}, train={"stop_after": 2}))
    state = TrainState(prepared.settings, manifest_hash=prepared.mixture.hash, device=CPU)
    train(prepared.settings, prepared.mixture, state, device=CPU, host=host)
    return state


def test_small_is_recommended_in_a_small_size() -> None:
    """The same method: pairs, head, generator, kind of decay and weight of the oldest key; it runs on any machine."""
    large = PRESETS["recommended"][1]
    for group, name in (
        ("data", "positives"),
        ("model", "head"),
        ("generator", "before_start"),
        ("generator", "start_percent"),
        ("moco", "temperature"),
        ("moco", "age_unit"),
        ("moco", "decay_on"),
        ("train", "schedule"),
        ("scaling", "device"),
        ("scaling", "num_workers"),
    ):
        assert getattr(getattr(SMALL, group), name) == getattr(getattr(large, group), name), name
    weights = [
        oldest_key_weight(
            each.moco.decay,
            queue_size=each.moco.queue_size,
            global_batch=each.train.global_batch,
            age_unit=each.moco.age_unit,
        )
        for each in (SMALL, large)
    ]
    assert weights[0] == pytest.approx(weights[1], abs=0.03)


def test_small_has_nothing_to_warn_about(tmp_path: Path, tracker_home: Path) -> None:
    """With 112 videos of two stored clips of 16 frames, the default of ingest. Its first lines name what it chose."""
    make_data_set(tmp_path / "data", num_videos=112, num_frames=16, height=64, width=64, num_held_out=12)
    lines = introduce(open_run(prepare(changed(SMALL, data={"uri": str(tmp_path / "data")}))))
    assert "200 epochs of 400 clips are 1,250 steps of 64" in lines
    assert any(
        line.startswith("1250 steps of 64 clips, 200.0 epochs; 2 of 8 frames are dropped at random") for line in lines
    )
    assert any(line.endswith(" micro-batches a step; learning rate 0.002, with warm-up of 62 steps") for line in lines)
    warnings = [line for line in lines if line.startswith("warning")]
    assert all("the queue holds 2.6 epochs" in line for line in warnings)
    assert len(warnings) == 1


@pytest.mark.cluster
@pytest.mark.slow
def test_small_trains_on_what_ingest_makes_by_default(
    ray_cluster: LocalCluster, tmp_path: Path, tracker_home: Path
) -> None:
    """100 videos of less than a second, ingested without any other flag, train for two steps: the loss is finite."""
    from vmoco.data.ingest import ingest

    for number in range(100):
        frames = [videos.numbered_image(number + place, height=48, width=64) for place in range(20)]
        videos.write_video(tmp_path / "videos" / f"{number}.mp4", frames)
    manifest = ingest(IngestSettings(videos=str(tmp_path / "videos"), output=str(tmp_path / "data")))
    assert manifest.frame_shape == (16, 128, 171, 3)
    assert manifest.counts["clips"] == manifest.counts["videos"] == 100
    host = Notes()
    state = steps_of(changed(SMALL, data={"uri": str(tmp_path / "data")}), host)
    assert state.step == 2
    assert 0 < host.points[2]["loss"] < 20
