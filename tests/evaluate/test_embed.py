"""On a Ray cluster, embedding is complete and resumable, and evaluation is distributed and reports what it measured."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchvision.models import video as torchvision_video

from tests.data.videos import corrupt, images, truncate, write_video
from tests.dataset import damage_clip, make_data_set, never_read_at_once, upload
from tests.embeddings import embedded, labelled_data_set
from tests.made import encoder_of, save_checkpoint, settings_for
from vmoco import tracking
from vmoco.cluster.local import LocalCluster
from vmoco.data import ledger, probing, source
from vmoco.data.manifest_writer import write_manifest
from vmoco.encoders import foreign, promotion, registry
from vmoco.evaluate import embed as embedding
from vmoco.evaluate import evaluate as evaluation
from vmoco.evaluate.embed import embed
from vmoco.evaluate.embed_items import shard_items
from vmoco.evaluate.embed_task import EmbedTask, Work
from vmoco.evaluate.features import Window, clip_features, window
from vmoco.evaluate.knn import classify
from vmoco.evaluate.score import label_free_score, score_encoder
from vmoco.evaluate.table import part_losses, part_rejected
from vmoco.job_settings import EmbedSettings, EvaluateSettings, FinetuneSettings
from vmoco.train.publish import write_encoder


def quiet(_: str) -> None:
    """Ignores a line."""


@pytest.mark.cluster
def test_videos_are_embedded_once_and_none_disappears(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    """Each good video gives all clips, each bad one is in the ledger; only missing parts are made again."""
    for name in range(5):
        write_video(tmp_path / "videos" / f"{name}.mp4", images(20 + 8 * name))
    truncate(write_video(tmp_path / "videos" / "cut.mp4", images(40)), 0.5)
    encoder = encoder_of()
    settings = EmbedSettings(
        videos=str(tmp_path / "videos"), output=str(tmp_path / "table"), videos_per_part=2, batch_size=4
    )
    first = embed(encoder, settings, show=quiet)
    counted = {name: len(encoder.clips(tmp_path / "videos" / f"{name}.mp4")) for name in range(5)}
    videos = first.table.columns()["video_id"].to_pylist()
    assert {int(video[0]): videos.count(video) for video in videos} == counted
    np.testing.assert_allclose(
        first.table.features(np.array([video == "3.mp4" for video in videos])),
        encoder.embed(tmp_path / "videos" / "3.mp4").numpy(),
        atol=1e-6,
    )
    assert [row.video_id for row in ledger.read(settings.output)] == ["cut.mp4"]
    assert (first.num_rejected, first.num_reused) == (1, 0)

    parts = sorted((tmp_path / "table" / "parts").iterdir())
    assert len(parts) == 3
    kept = {path: path.stat().st_mtime_ns for path in parts[1:]}
    parts[0].unlink()
    again = embed(encoder, settings, show=quiet)
    assert again.num_reused == 2
    assert {path: path.stat().st_mtime_ns for path in parts[1:]} == kept
    assert again.table.columns().equals(first.table.columns())
    assert np.array_equal(again.table.features(), first.table.features())
    assert [row.video_id for row in ledger.read(settings.output)] == ["cut.mp4"]

    torch.nn.init.normal_(next(encoder.backbone.parameters()))
    with pytest.raises(ValueError, match=r"the table in .* was made with weights \w+, not \w+: give another --output"):
        embed(encoder, settings, show=quiet)


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_an_encoder_is_evaluated_by_every_protocol(ray_cluster: LocalCluster, tmp_path: Path) -> None:
    """Scores equal those of the plain functions in this process; two splits count together. Videos 0 and 3, which are
    held out, are ranges of one file.
    """
    manifest = labelled_data_set(tmp_path / "data", num_videos=48)
    files = manifest.table["video_sha256"].to_pylist()
    shared = pa.array([file if int(file) != 3 else f"{0:064d}" for file in files])
    place = manifest.table.column_names.index("video_sha256")
    table = manifest.table.set_column(place, manifest.table.schema.field(place), shared)
    kept = {name: getattr(manifest, name) for name in ("settings", "frame_shape", "encoding", "shards")}
    manifest = write_manifest(manifest.uri, table, num_rejected=0, **kept)
    encoder = encoder_of()
    settings = EvaluateSettings(
        data=manifest.uri,
        protocols=("label-free", "knn", "probe", "retrieval", "finetune"),
        features=str(tmp_path / "features"),
        k=5,
        finetune=FinetuneSettings(epochs=1, batch_size=8),
    )
    with never_read_at_once():
        planned = evaluation.plan(settings)
        scores = {score.protocol: score for score in evaluation.evaluate(encoder, planned, settings, show=quiet)}
    assert [split.name for split in planned.splits] == ["split 1", "split 2"]
    assert list(scores) == [
        "label-free",
        "knn",
        "probe",
        *[f"retrieval-R@{k}" for k in (1, 5, 10, 20)],
        "finetune",
    ]
    alone = score_encoder(encoder, manifest)
    assert scores["label-free"].value == pytest.approx(alone.retrieval.value)
    # Chance depends on what shares a source.
    assert scores["label-free"].beside == label_free_score(dataclasses.replace(alone, arrow=None)).beside
    assert scores["label-free"].evaluation_set == alone.evaluation_set
    features, right = clip_features(encoder, manifest, manifest.table), []
    for split in planned.splits:
        votes = classify(features[split.test], [features[split.train]], split.labels[split.train], k=5)
        videos = split.video_ids[split.test]
        for video in np.unique(videos):
            truth = split.labels[split.video_ids == video][0]
            right.append(votes[videos == video].sum(axis=0).argmax() == truth)
    assert scores["knn"].value == pytest.approx(np.mean(right))
    assert all(score.low <= score.value <= score.high for score in scores.values())

    parts = sorted((tmp_path / "features").rglob("*.parquet"))
    before = [path.stat().st_mtime_ns for path in parts]
    frozen = settings.model_copy(update={"protocols": ("knn",)})
    (knn,) = evaluation.evaluate(encoder, evaluation.plan(frozen), frozen, show=quiet)
    assert knn == scores["knn"]
    assert [path.stat().st_mtime_ns for path in parts] == before, "features are not computed twice"

    other = foreign.random_initialisation(encoder, seed=3)
    assert other.weights_hash() != encoder.weights_hash()
    assert other.weights_hash() == foreign.random_initialisation(encoder, seed=3).weights_hash()


def test_a_damaged_clip_is_not_embedded(tmp_path: Path) -> None:
    """The task returns the message; no part of the table is written."""
    manifest = make_data_set(tmp_path / "data")
    said = damage_clip(manifest, 3)
    task = EmbedTask(encoder_of(), Work(str(tmp_path / "table"), window(encoder_of(), manifest), batch_size=4))
    made = [task(item) for item in shard_items(manifest, manifest.table)]
    assert re.match(said, made[0]["error"])
    assert [bool(each["error"]) for each in made] == [True, False]
    assert len(list((tmp_path / "table" / "parts").iterdir())) == 1


def three_videos(folder: Path) -> dict[str, Any]:
    """An item of three videos, for `EmbedTask`."""
    paths = [write_video(folder / f"{name}.mp4", images(24)) for name in "abc"]
    plan = {"folder": str(folder), "videos": [[path.name, path.stat().st_size] for path in paths]}
    return {"part": "all", "plan": json.dumps(plan)}


@pytest.mark.parametrize("error", [ZeroDivisionError("no rate"), ValueError("strange"), PermissionError(13, "locked")])
@pytest.mark.parametrize("place", [(probing, "probe"), (source, "file_sha256")], ids=["decode", "read"])
def test_any_error_of_one_video_is_a_row_of_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str], error: Exception
) -> None:
    """Whatever error one video raises, the others are embedded, and the next run tries this video again."""
    item, real = three_videos(tmp_path / "videos"), getattr(*place)

    def broken(path: str) -> Any:
        if path.endswith("b.mp4"):
            raise error
        return real(path)

    monkeypatch.setattr(*place, broken)
    task = EmbedTask(encoder_of(), Work(str(tmp_path / "table"), Window(8, 1), batch_size=4))
    assert task(item) == {"clips": 6, "error": ""}
    (row,) = part_rejected(str(tmp_path / "table"), "all") or []
    stage = "decode" if place[1] == "probe" else "read"
    assert (row.video_id, row.stage, row.reason, row.transient) == ("b.mp4", stage, "unexpected-error", True)
    assert row.message == f"{type(error).__name__}: {error}"


def test_a_damaged_video_is_recorded(tmp_path: Path) -> None:
    """Its clips without damage are in the table, and the part remembers what is lost."""
    path = write_video(tmp_path / "videos" / "b.mp4", images(100), options={"g": "10", "sc_threshold": "0"})
    corrupt(path, end=0.45)
    plan = {"folder": str(path.parent), "videos": [[path.name, path.stat().st_size]]}
    item = {"part": "all", "plan": json.dumps(plan)}
    task = EmbedTask(encoder_of(), Work(str(tmp_path / "table"), Window(8, 1), batch_size=4))
    made = task(item)
    assert made["error"] == ""
    assert made["clips"] > 4
    assert part_rejected(str(tmp_path / "table"), "all") == []
    (loss,) = part_losses(str(tmp_path / "table"), "all")
    assert loss.video_id == "b.mp4"
    assert loss.lost


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of the actors happens in this process."""
    monkeypatch.setattr(
        embedding, "_run", lambda items, encoder, work, pool: map(EmbedTask(encoder, work), items) if items else ()
    )


def test_a_window_slides_over_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and features are those of `embed_dense`, each with its own id; a bad video is in the ledger.

    Only missing parts are made again; a table has clips of one kind.
    """
    without_ray(monkeypatch)
    encoder, folder = encoder_of(), tmp_path / "videos"
    for name in range(3):
        write_video(folder / f"{name}.mp4", images(20 + 8 * name), fps=10 if name == 2 else 25)
    truncate(write_video(folder / "cut.mp4", images(40)), 0.5)
    settings = EmbedSettings(
        videos=str(folder), output=str(tmp_path / "table"), videos_per_part=1, batch_size=4, every_seconds=0.04
    )
    table = embed(encoder, settings, show=quiet).table
    assert len(set(table.strings("clip_id"))) == len(table)
    for name in range(3):
        mine = table.strings("video_id") == f"{name}.mp4"
        dense = encoder.embed_dense(folder / f"{name}.mp4", every_seconds=0.04)
        np.testing.assert_allclose(table.features(mine), dense.features.numpy(), atol=1e-5)
        np.testing.assert_array_equal(table.columns()["start_seconds"].to_numpy()[mine], dense.start_seconds)
        assert set(table.columns()["clip_seconds"].to_numpy()[mine]) == {dense.clip_seconds}
    assert [row.video_id for row in ledger.read(settings.output)] == ["cut.mp4"]
    sorted((tmp_path / "table" / "parts").iterdir())[0].unlink()
    again = embed(encoder, settings, show=quiet)
    assert again.num_reused == 3
    assert again.table.columns().equals(table.columns())
    for changes, was in (({"every_seconds": 0.08}, "every_seconds"), ({"clip_seconds": 0.4}, "frames_per_clip")):
        with pytest.raises(ValueError, match=f"the table in .* was made with {was} "):
            embed(encoder, settings.model_copy(update=changes), show=quiet)


def test_dense_clips_overlap_by_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--dense is --every-seconds of half a clip; what is lost of a damaged video is in the ledger."""
    without_ray(monkeypatch)
    path = write_video(tmp_path / "videos" / "b.mp4", images(100), options={"g": "10", "sc_threshold": "0"})
    corrupt(path, end=0.45)
    settings = EmbedSettings(videos=str(path.parent), output=str(tmp_path / "table"), dense=True)
    rows = embed(encoder_of(), settings, show=quiet).table.columns()
    starts = rows["start_seconds"].to_numpy()
    assert set(np.round(np.diff(starts), 6)) > {0.16}
    np.testing.assert_allclose(np.round(starts / 0.16) * 0.16, starts, atol=1e-6)
    (loss,) = ledger.read_losses(settings.output)
    assert loss.video_id == "b.mp4"


def test_what_a_window_does_not_go_with_is_refused(tmp_path: Path) -> None:
    """Before any work, with the flags as they are typed."""
    manifest = make_data_set(tmp_path / "data")
    places = {"videos": manifest.uri, "output": str(tmp_path / "table")}
    with pytest.raises(ValueError, match=r"^--every-seconds 0.5 needs videos, and --videos .* is a data set, whose"):
        embed(encoder_of(), EmbedSettings(**places, every_seconds=0.5), show=quiet)
    with pytest.raises(ValueError, match=r"^--every-seconds 0.01 is less than a frame at the encoder's 25 frames"):
        embed(encoder_of(), EmbedSettings(**places, every_seconds=0.01), show=quiet)
    with pytest.raises(ValueError, match=r"^--clip-seconds 0.01 is 0 frames at the encoder's 25 frames per second"):
        embed(encoder_of(), EmbedSettings(**places, dense=True, clip_seconds=0.01), show=quiet)
    assert not (tmp_path / "table").exists()
    with pytest.raises(
        ValueError, match=r"^--dense and --every-seconds 2 both tell when the next clip begins: give one"
    ):
        EmbedSettings(**places, dense=True, every_seconds=2)
    with pytest.raises(ValueError, match=r"^--clip-seconds 2 needs --every-seconds or --dense"):
        EmbedSettings(**places, clip_seconds=2)
    with pytest.raises(ValueError, match=r"^--max-clips-per-video 5 has no effect with --dense, which embeds every"):
        EmbedSettings(**places, max_clips_per_video=5, dense=True)


def test_a_full_scratch_disk_rejects_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is the machine's: the task returns the error message and writes no part."""
    item = three_videos(tmp_path / "videos")
    task = EmbedTask(encoder_of(), Work(str(tmp_path / "table"), Window(8, 1), batch_size=4))
    with open("/dev/full", "r+b") as full:
        monkeypatch.setattr(task._decoder, "scratch", full)
        assert re.search(r"cannot write pixels to /.*; free space there", task(item)["error"])
        task._decoder.close()
    assert not (tmp_path / "table").exists()


def test_a_remote_data_set_is_embedded_clip_by_clip(tmp_path: Path, store: Any) -> None:
    """The rows and features of a local data set; of a shard, only the chosen clips are fetched."""
    manifest = make_data_set(tmp_path / "data", encoding="jpeg")
    far = upload(manifest, "s3://bucket/set")
    store.requests.clear()
    tables = [embedded(encoder_of(), each, tmp_path / str(place)) for place, each in enumerate((manifest, far))]
    assert tables[1].columns().equals(tables[0].columns())
    assert np.array_equal(tables[1].features(), tables[0].features())
    store.requests.clear()
    (item,) = shard_items(far, far.table.slice(0, 2))
    task = EmbedTask(encoder_of(), Work(str(tmp_path / "two"), window(encoder_of(), far), batch_size=4))
    assert task(item) == {"clips": 2, "error": ""}
    assert [method for method, _ in store.requests].count("GET") == 2


def test_what_the_data_set_allows_is_planned(tmp_path: Path) -> None:
    """Without labels there is only the label-free score; a protocol that needs labels is refused by name."""
    labelled = labelled_data_set(tmp_path / "labelled")
    assert evaluation.plan(EvaluateSettings(data=labelled.uri)).protocols == ("label-free", "knn", "probe", "retrieval")
    bare = make_data_set(tmp_path / "bare", num_held_out=4)
    planned = evaluation.plan(EvaluateSettings(data=bare.uri))
    assert planned.protocols == ("label-free",)
    assert "no labels" in planned.notes[0]
    with pytest.raises(ValueError, match="probe needs labels"):
        evaluation.plan(EvaluateSettings(data=bare.uri, protocols=("probe",)))
    with pytest.raises(ValueError, match="the label-free score needs two such videos"):
        evaluation.plan(EvaluateSettings(data=make_data_set(tmp_path / "none").uri))


def test_torchvisions_supervised_weights_are_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from torch's download folder, with torchvision's preprocessing; if missing, a message says so."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    theirs = torchvision_video.r3d_18()
    torch.save(theirs.state_dict(), folder / torchvision_video.R3D_18_Weights.KINETICS400_V1.url.rpartition("/")[2])
    found = foreign.supervised("r3d_18")
    assert torch.equal(found.backbone.trunk.stem[0].weight, theirs.stem[0].weight)
    assert (found.preprocessing.num_frames, found.preprocessing.fps) == (16, 15.0)
    with pytest.raises(ValueError, match="torchvision has no weights of r3d_nano: choose one of r3d_18"):
        foreign.supervised("r3d_nano")


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_the_jobs_evaluate_note_and_embed_a_registered_encoder(
    ray_cluster: LocalCluster, tracker_home: Path, tmp_path: Path
) -> None:
    """The commands print scores and those of references, record them with the version, and promote by them.

    Then a data set becomes a table and a page.
    """
    manifest = labelled_data_set(tmp_path / "data")
    save_checkpoint(tmp_path / "checkpoint", manifest)
    write_encoder(tmp_path / "checkpoint", tmp_path / "encoder", data=manifest)
    run_id = tracking.create_run(settings_for(manifest), tags={})
    registry.attach(tmp_path / "encoder", run_id=run_id)
    registry.register(run_id, name="tested", alias="candidate")
    uri = "models:/tested@candidate"

    def job(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **ray_cluster.environment, "RAY_ADDRESS": ray_cluster.gcs_address}
        environment["VMOCO_HOME"] = str(tracker_home)
        command = [sys.executable, f"jobs/{name}.py", uri, *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)

    written = tmp_path / "scores.json"
    evaluated = job("evaluate", "--data", manifest.uri, "--reference", "--k", "3", "--scores", str(written))
    assert evaluated.returncode == 0, evaluated.stderr
    noted = {score.protocol: score for score in promotion.scores_of(registry.find_version(uri))}
    assert {"label-free", "knn", "probe", "retrieval-R@1"} <= set(noted)
    assert all(str(score) in evaluated.stdout for score in noted.values())
    assert "\nrandom initialisation\n" in evaluated.stdout
    listed = json.loads(written.read_text())
    assert {row["protocol"]: row["value"] for row in listed[uri]} == {name: each.value for name, each in noted.items()}
    assert set(listed) == {uri, "random initialisation"}
    assert "no supervised reference: torchvision has no weights of r3d_nano" in evaluated.stdout
    assert promotion.promote("tested").version == "1"

    embedded = job("embed", "--videos", manifest.uri, "--output", str(tmp_path / "table"), "--queries", "2")
    assert embedded.returncode == 0, embedded.stderr
    assert f"{manifest.table.num_rows} clips in {tmp_path}/table/parts" in embedded.stdout
    assert (tmp_path / "table" / "gallery.html").exists()
    copies = job("dedup", "--data", manifest.uri, "--output", str(tmp_path / "table"), "--min-agreement", "0.99")
    assert copies.returncode == 0, copies.stderr
    assert f"0 of {manifest.table.num_rows} clips are copies of another clip" in copies.stdout
    assert (tmp_path / "table" / "leave_out.txt").read_text().startswith(f"# 0 clips of {manifest.uri}")
    refused = job("embed", "--videos", str(tmp_path / "nowhere"), "--output", str(tmp_path / "other"))
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/nowhere is not a folder")
