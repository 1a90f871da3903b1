"""Training takes the clips that the settings leave it; a list of clips to leave out belongs to the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.dataset import make_data_set, training_clips
from tests.made import settings_for
from tests.train.test_step import changed
from vmoco.data.fit import check_fits, epoch_clips, fit_to_data
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.data.training_clips import write_list
from vmoco.encoders.package import VIDEOS
from vmoco.train import run
from vmoco.train.publish import write_encoder
from vmoco.train.state import TrainState, differences


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """10 videos of two clips; the last two are held out."""
    return make_data_set(tmp_path / "data", num_videos=10, num_held_out=2)


def list_of(manifest: Manifest, path: Path, *rows: int) -> str:
    ids = manifest.table["clip_id"].to_pylist()
    write_list(str(path), [(ids[row], f"row {row}\n of the manifest") for row in rows], title="a title")
    return str(path)


def test_clips_of_the_list_are_never_trained_on(manifest: Manifest, tmp_path: Path) -> None:
    """Neither as a query nor as a key, at any step; a video without clips is not drawn, and its lineage says so."""
    ids = manifest.table["clip_id"].to_pylist()
    settings = changed(
        settings_for(manifest),
        data={"leave_out": list_of(manifest, tmp_path / "list.txt", 0, 4, 5, 18), "positives": "two_clips"},
    )
    fitted, _ = fit_to_data(settings, manifest)
    assert epoch_clips(fitted, manifest) == 7
    loader = Loader(manifest, fitted, rank=0, world_size=1)
    seen = {name for step in range(20) for name in loader.batch(step).clip_ids}
    assert seen == set(ids[:16]) - {ids[0], ids[4], ids[5]}
    assert seen == set(loader.clip_ids(np.arange(loader.plan.first_clips[-1])))

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    state = TrainState(fitted, manifest_hash=manifest.hash, device=torch.device("cpu"))
    state.save(folder, run_id="a run")
    write_encoder(folder, tmp_path / "encoder", data=manifest)
    listed = pq.read_table(tmp_path / "encoder" / VIDEOS).to_pydict()
    names = [f"video-{number:03d}" for number in range(10) if number != 2]
    assert listed == {"video_id": names, "held_out": [False] * 7 + [True] * 2}


def test_the_hash_of_the_list_is_part_of_the_run(manifest: Manifest, tmp_path: Path) -> None:
    """The place of the list is not, and settings without a list have the bytes that they always had."""
    base = settings_for(manifest)
    one = changed(base, data={"leave_out": list_of(manifest, tmp_path / "one.txt", 0)})
    moved = changed(base, data={"leave_out": list_of(manifest, tmp_path / "moved.txt", 0)})
    other = changed(base, data={"leave_out": list_of(manifest, tmp_path / "other.txt", 1)})
    hashes = [fit_to_data(each, manifest)[0].content_hash() for each in (base, one, moved, other)]
    assert hashes[0] == base.content_hash()
    assert hashes[1] == hashes[2]
    assert len(set(hashes)) == 3
    fitted, _ = fit_to_data(one, manifest)
    assert fit_to_data(fitted, manifest)[0] == fitted
    assert training_clips(manifest, fitted.data).equals(training_clips(manifest, fitted.data))


def test_a_run_is_resumed_only_with_its_list(manifest: Manifest, tmp_path: Path, tracker_home: Path) -> None:
    """Without the list, with another list, and after the list has changed, the message says what differs."""
    place = list_of(manifest, tmp_path / "list.txt", 0)
    base = changed(settings_for(manifest), run={"storage": str(tmp_path / "runs")})
    begun = run.open_run(run.prepare(changed(base, data={"leave_out": place})))
    lines = run.introduce(begun)
    assert any(
        line.startswith("1 of 16 clips are left out of training, and with them 0 complete vid") for line in lines
    )
    digest = begun.settings.data.leave_out_sha256
    with pytest.raises(ValueError, match=rf"other settings \(--data.leave-out-sha256 {digest} -> None\): set them"):
        run.prepare(base)
    list_of(manifest, tmp_path / "list.txt", 1)
    with pytest.raises(ValueError, match=rf"--data.leave-out-sha256 {digest} -> \w{{64}}\): set them"):
        run.prepare(changed(base, data={"leave_out": place}))
    with pytest.raises(ValueError, match=rf"{place} has changed: its SHA-256 is \w+, and .* is {digest}. Restore the"):
        Loader(manifest, begun.settings, rank=0, world_size=1)


def test_an_option_that_is_left_out_again_is_named(manifest: Manifest, tmp_path: Path) -> None:
    """Settings that are written only where they are used differ from their default, in both directions."""
    base = settings_for(manifest)
    other = changed(base, generator={"select": "sample"})
    assert differences(base, other) == "--generator.select top -> sample"
    assert differences(other, base) == "--generator.select sample -> top"


def test_a_list_that_cannot_be_used_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    """Of another data set, missing, a folder, or without a clip that is left: one sentence each, before work starts."""
    base = settings_for(manifest)
    other = make_data_set(tmp_path / "other", num_videos=12)
    place = list_of(other, tmp_path / "list.txt", 0, 22, 23)
    with pytest.raises(ValueError, match=r"not a list of clips of .*data: 2 of its 3 lines name none, the first is '"):
        fit_to_data(changed(base, data={"leave_out": place}), manifest)
    for name in ("missing.txt", "other"):
        with pytest.raises(ValueError, match=rf"--data.leave-out .*/{name} is not a file: give a list of clips, such"):
            fit_to_data(changed(base, data={"leave_out": str(tmp_path / name)}), manifest)
    everything = list_of(manifest, tmp_path / "all.txt", *range(16))
    fitted, _ = fit_to_data(changed(base, data={"leave_out": everything}), manifest)
    with pytest.raises(ValueError, match=r"no clip of .* is left to train on: --data.leave-out .* leaves out all"):
        check_fits(manifest, fitted)
    with pytest.raises(ValueError, match=r"--data.leave-out-sha256 ab needs the list itself: give --data.leave-out"):
        changed(base, data={"leave_out_sha256": "ab"})
    wrong = changed(base, data={"leave_out": everything, "leave_out_sha256": "ab"})
    with pytest.raises(ValueError, match=r"all.txt has changed: its SHA-256 is \w+, and --data.leave-out-sha256 is ab"):
        fit_to_data(wrong, manifest)
