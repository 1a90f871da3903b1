"""Ingest on a real Ray cluster: complete, idempotent, and clear about bad input."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data import videos
from tests.data.test_ingest_tasks import probed, settings
from tests.dataset import damage_clip, never_read_at_once, stored_clips, stored_frames, training_clips
from vmoco import storage
from vmoco.clip_settings import DataSettings
from vmoco.data import contact_sheet, ledger
from vmoco.data import ingest as job
from vmoco.data.check import check
from vmoco.data.decoder import Decoder
from vmoco.data.held_out import is_held_out
from vmoco.data.ingest import CUTS, list_inputs
from vmoco.data.ingest_plan import plan_shards
from vmoco.data.ingest_tasks import make_shard
from vmoco.data.ledger import Rejection
from vmoco.data.manifest import NAME, Manifest
from vmoco.job_settings import IngestSettings

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.cluster


def make_videos(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        # AVI keeps no time stamps, so FFmpeg guesses those of H.264, and late by some frames.
        codec = "mpeg4" if name.endswith(".avi") else "libx264"
        videos.write_video(folder / name, videos.images(20 + number), codec=codec)


def flags(chosen: IngestSettings) -> list[str]:
    """The settings as flags of the job."""
    changed = chosen.model_dump(exclude_defaults=True)
    return [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").glob("*.arrow"))}


def quiet(line: str) -> None:
    pass


def ingest(chosen: IngestSettings, progress: Callable[[str], None]) -> Manifest:
    """The data set as it is now: its rows are read before the next ingest replaces them.

    No ingest has all rows of a manifest in memory, old or new.
    """
    with never_read_at_once():
        made = job.ingest(chosen, progress=progress)
    assert made.table.num_rows == made.counts["clips"]
    return made


def test_every_video_is_in_the_manifest_or_in_the_ledger(tmp_path: Path, ray_cluster: object) -> None:
    """Good videos give rows whose shards hold their frames; bad ones give ledger rows; the counts say so."""
    make_videos(tmp_path / "in", "a.mp4", "deep/b 'quoted'.avi", "deep/é🎞.mkv")
    videos.truncate(videos.write_video(tmp_path / "in/cut.mp4", videos.images(20)), 0.5)
    (tmp_path / "in/empty.mp4").touch()
    os.mkfifo(tmp_path / "in/pipe.mp4")
    lines: list[str] = []
    chosen = settings(tmp_path, videos_per_shard=2, held_out_percent=40)
    manifest = ingest(chosen, progress=lines.append)
    assert manifest == Manifest.load(str(tmp_path / "out"))
    assert set(manifest.table["video_id"].to_pylist()) == {"a.mp4", "deep/b 'quoted'.avi", "deep/é🎞.mkv"}
    reasons = {row.video_id: row.reason for row in ledger.read(str(tmp_path / "out"))}
    assert reasons == {"cut.mp4": "cannot-open", "empty.mp4": "empty", "pipe.mp4": "not-a-file"}
    held_out = {name for name in manifest.table["video_id"].to_pylist() if is_held_out(name, 40)}
    assert manifest.counts == {"videos": 3, "clips": 9, "rejected": 3, "held_out": len(held_out)}
    assert {row["video_id"] for row in manifest.table.to_pylist() if row["held_out"]} == held_out
    assert manifest.frame_shape == (4, 24, 32, 3)
    assert manifest.settings == chosen.content()
    for row in manifest.table.to_pylist():
        frames = stored_frames(manifest.shard_uri(row["shard"]))[row["row"]]
        first = round(row["start_seconds"] * 25)
        assert [videos.number_of(frame) for frame in frames] == list(range(first, first + 4))
    lines = list({line[:12]: line for line in lines}.values())  # the last of each kind: a slow machine prints more
    assert re.fullmatch(r"ingest  looked at 5/5 videos  rejected 2  clips 9  [\d.]+ clips/s  0:00 left", lines[-4])
    assert re.fullmatch(r"ingest  writes 9 clips in raw encoding, 0\.1 MB, to .*/out, which has .* free", lines[-3])
    assert re.fullmatch(r"ingest  cut 3/3 videos  rejected 0  clips 9  [\d.]+ clips/s  0:00 left", lines[-2])
    assert lines[-1] == (f"ingest  rejected 3: cannot-open 1, empty 1, not-a-file 1; see {tmp_path}/out/ledger.jsonl")
    assert Image.open(tmp_path / "out" / contact_sheet.NAME).size[0] > 400
    assert not (tmp_path / "out/probes").exists()


def test_bytes_do_not_depend_on_the_parallelism(tmp_path: Path, ray_cluster: object) -> None:
    """Shards made by parallel tasks equal those made one after the other, in this process."""
    make_videos(tmp_path / "in", *(f"{number}.mp4" for number in range(5)))
    chosen = settings(tmp_path, videos_per_shard=1)
    ingest(chosen, progress=quiet)
    plain, decoder = str(tmp_path / "plain"), Decoder()
    for plan in plan_shards(probed(chosen, decoder), chosen):
        make_shard(plan, root=chosen.videos, output=plain, settings=chosen, decoder=decoder)
    decoder.close()
    assert shards(tmp_path / "out") == shards(tmp_path / "plain")


def test_running_again_does_nothing_and_adding_appends(tmp_path: Path, ray_cluster: object) -> None:
    """A second run says that nothing is new; new videos give new shards, and old ones keep their bytes and dates."""
    make_videos(tmp_path / "in", "b.mp4", "d.mp4")
    (tmp_path / "in/text.mp4").write_text("no video")
    first = ingest(settings(tmp_path), progress=quiet)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    lines: list[str] = []
    assert ingest(settings(tmp_path), progress=lines.append) == first
    assert lines == [f"ingest  nothing new: all 3 videos are in {tmp_path}/out or its ledger"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}

    videos.write_video(tmp_path / "in/a.mp4", videos.images(25))
    second = ingest(settings(tmp_path, videos_per_shard=1), progress=quiet)
    assert second.counts == {"videos": 3, "clips": 9, "rejected": 1, "held_out": 0}
    old = [path for path in before if path.suffix == ".arrow"]
    assert {path: before[path] for path in old} == {path: path.stat().st_mtime_ns for path in old}
    assert second.hash != first.hash
    assert second.table.filter([name != "a.mp4" for name in second.table["video_id"].to_pylist()]) == first.table


def test_a_data_set_of_schema_2_is_continued(tmp_path: Path, ray_cluster: object) -> None:
    """Its shards stay as they are and are read beside new ones, which have the new hash and the scores of their clips.

    `version_2` was made by the code of commit 152faab, whose shards have schema 2, with the settings of these tests.
    """
    shutil.copytree(ROOT / "tests/data/version_2", tmp_path, dirs_exist_ok=True)
    old = Manifest.load(str(tmp_path / "out"))
    assert ingest(settings(tmp_path), progress=quiet) == old
    assert old.counts == {"videos": 2, "clips": 6, "rejected": 1, "held_out": 0}
    assert not check(old.uri, progress=quiet)

    before, rows = shards(tmp_path / "out"), old.table
    videos.write_video(tmp_path / "in/a.mp4", videos.images(25))
    continued = ingest(settings(tmp_path), progress=quiet)
    assert continued.counts == {"videos": 3, "clips": 9, "rejected": 1, "held_out": 0}
    assert before.items() < shards(tmp_path / "out").items()
    assert {f"{name}.arrow" for name, shard in continued.shards.items() if not shard.by_clips} == set(before)
    is_old = pa.array([name != "a.mp4" for name in continued.table["video_id"].to_pylist()])
    assert continued.table.filter(is_old).select(rows.column_names) == rows
    assert [score is None for score in continued.table["motion"].to_pylist()] == is_old.to_pylist()
    assert not check(continued.uri, progress=quiet)
    assert [len(clip) for clip in stored_clips(continued)] == 9 * [4]
    with pytest.raises(
        ValueError, match=r"6 of the 9 training clips .* have none, because an earlier version made them"
    ):
        training_clips(continued, DataSettings(num_frames=4, min_motion=1.0))

    damage_clip(old, 4)
    assert next(iter(old.shards)) in "".join(check(continued.uri, progress=quiet))


def test_a_data_set_that_no_encoder_can_be_scored_on_is_named(tmp_path: Path, ray_cluster: object) -> None:
    """The last line says it, also when nothing is new; the percentage that it names is enough."""
    make_videos(tmp_path / "in", "a.mp4", "b.mp4", "c.mp4")
    said: list[str] = []
    for _ in range(2):
        ingest(settings(tmp_path, held_out_percent=10), progress=said.append)
        assert said[-1].startswith("warning: an encoder cannot be scored on this data set: 0 of 0 held-out videos have")
    found = re.search(r"with --held-out-percent (\d+), which holds out (\d+) such videos$", said[-1])
    assert found is not None
    enough = settings(tmp_path, held_out_percent=int(found[1]), output=str(tmp_path / "enough"))
    assert ingest(enough, progress=said.append).counts["held_out"] == int(found[2]) == 2
    assert "warning" not in said[-1]


def test_a_changed_video_replaces_its_clips(tmp_path: Path, ray_cluster: object) -> None:
    """A file of another size gives new rows instead of the old ones, and a broken one loses its rows."""
    make_videos(tmp_path / "in", "a.mp4", "b.mp4", "c.mp4")
    ingest(settings(tmp_path), progress=quiet)
    videos.write_video(tmp_path / "in/a.mp4", videos.images(9))
    (tmp_path / "in/b.mp4").write_text("no video any more")
    lines: list[str] = []
    manifest = ingest(settings(tmp_path), progress=lines.append)
    assert lines[0] == "ingest  2 videos changed since they were ingested: their clips are replaced"
    assert manifest.table["video_id"].to_pylist() == ["a.mp4"] * 2 + ["c.mp4"] * 3
    assert [row.video_id for row in ledger.read(str(tmp_path / "out"))] == ["b.mp4"]


def test_parts_change_nothing(tmp_path: Path, ray_cluster: object) -> None:
    """Long videos in parts, or as a whole where parts fail, damaged ones too: the same clips, ledger and hash.

    A note counts those whose parts failed.
    """
    coding = {"g": "10", "keyint_min": "10", "sc_threshold": "0"}
    videos.write_video(tmp_path / "in/long.mp4", videos.images(200), options=coding)
    # The times of H.264 in AVI are guessed; a picture that is refreshed bit by bit cannot be decoded from the middle.
    videos.write_video(tmp_path / "in/guessed.avi", videos.images(200), options={**coding, "bf": "2"})
    refresh = {"x264-params": "intra-refresh=1:keyint=12:bframes=0:scenecut=0"}
    videos.write_video(tmp_path / "in/refresh.mp4", videos.images(200), options=refresh)
    videos.corrupt(videos.write_video(tmp_path / "in/noise.mp4", videos.images(200), options=coding), end=0.45)
    found, lines, noted = [], [], []
    for seconds in (600, 2):
        chosen = settings(tmp_path, part_seconds=seconds, output=f"{tmp_path}/{seconds}", max_clips_per_video=20)
        made = ingest(chosen, progress=lines.append)
        losses = [(loss.video_id, loss.lost, loss.percent) for loss in ledger.read_losses(made.uri)]
        counts = dict(made.counts)
        noted.append(counts.pop("decoded-whole", 0))
        found.append((made.hash, counts, losses, made.table.select(["clip_id", "start_seconds", "fps"])))
    assert found[0] == found[1]
    assert (found[0][1]["videos"], found[0][1]["rejected"]) == (4, 0)
    assert noted == [0, 2]
    assert "ingest  2 long videos cannot be decoded in parts: each is decoded as a whole" in lines
    assert [name for name, _, _ in found[0][2]] == ["noise.mp4"]


def test_a_damaged_video_gives_its_whole_clips_and_a_ledger_row(tmp_path: Path, ray_cluster: object) -> None:
    """The ledger names what is lost and counts no rejection; the next run has nothing to do; `reject` rejects."""
    make_videos(tmp_path / "in", "a.mp4")
    coding = {"g": "10", "keyint_min": "10", "sc_threshold": "0"}
    path = videos.write_video(tmp_path / "in/b.mp4", videos.images(100), options=coding)
    videos.corrupt(path, end=0.45)
    chosen = settings(tmp_path, max_clips_per_video=100)
    lines: list[str] = []
    first = ingest(chosen, progress=lines.append)
    (loss,) = ledger.read_losses(first.uri)
    assert (loss.video_id, len(loss.lost) > 0, 0 < loss.percent < 50) == ("b.mp4", True, True)
    assert ledger.read(first.uri) == []
    assert first.counts["rejected"] == 0
    starts = [row["start_seconds"] for row in first.table.to_pylist() if row["video_id"] == "b.mp4"]
    assert starts
    assert all(start + 4 / 25 <= low + 1e-3 or start >= high - 1e-3 for start in starts for low, high in loss.lost)
    assert any(line.startswith("ingest  1 videos are damaged: clips without damage are kept") for line in lines)
    assert ingest(chosen, progress=quiet) == first
    assert ledger.read_losses(first.uri) == [loss]
    with pytest.raises(ValueError, match=r"was made with --damaged drop-clips, not reject: use --damaged drop-clips"):
        ingest(settings(tmp_path, max_clips_per_video=100, damaged="reject"), progress=quiet)
    other = settings(tmp_path, max_clips_per_video=100, damaged="reject", output=str(tmp_path / "strict"))
    strict = ingest(other, progress=quiet)
    assert [(row.video_id, row.damaged) for row in ledger.read(strict.uri)] == [("b.mp4", "reject")]
    assert ledger.read_losses(strict.uri) == []
    with pytest.raises(ValueError, match=r"was made with --damaged reject, not drop-clips"):
        ingest(settings(tmp_path, max_clips_per_video=100, output=str(tmp_path / "strict")), progress=quiet)


def test_damaged_videos_of_an_old_data_set_are_tried_again_once(tmp_path: Path, ray_cluster: object) -> None:
    """A data set from before `--damaged` rejected them: the next run takes their whole clips, and all is settled."""
    make_videos(tmp_path / "in", "a.mp4")
    coding = {"g": "10", "keyint_min": "10", "sc_threshold": "0"}
    videos.corrupt(videos.write_video(tmp_path / "in/b.mp4", videos.images(100), options=coding), end=0.45)
    videos.truncate(videos.write_video(tmp_path / "in/c.mkv", videos.images(100), options=coding), 0.2)
    chosen = settings(tmp_path)
    new = ingest(chosen, progress=quiet)
    clips = set(new.table["clip_id"].to_pylist())
    output = tmp_path / "out"
    shutil.rmtree(output)
    (tmp_path / "in/b.mp4").rename(tmp_path / "b.mp4")
    (tmp_path / "in/c.mkv").rename(tmp_path / "c.mkv")
    old = ingest(chosen, progress=quiet)
    (tmp_path / "b.mp4").rename(tmp_path / "in/b.mp4")
    (tmp_path / "c.mkv").rename(tmp_path / "in/c.mkv")
    entries = {found.video_id: found.entry for found in list_inputs(chosen)[1].videos}
    rows = [Rejection(name, "decode", "decode-error", "x", entry=entries[name]) for name in ("b.mp4", "c.mkv")]
    ledger.write(old.uri, rows)
    again = ingest(chosen, progress=quiet)
    assert set(again.table["clip_id"].to_pylist()) == clips
    assert [loss.video_id for loss in ledger.read_losses(again.uri)] == ["b.mp4"]
    assert [(row.video_id, row.reason, row.damaged) for row in ledger.read(again.uri)] == [
        ("c.mkv", "truncated", "drop-clips")
    ]
    lines: list[str] = []
    assert ingest(chosen, progress=lines.append).hash == again.hash
    assert lines[0].startswith("ingest  nothing new")


def test_a_video_whose_clips_all_cross_a_cut_is_in_the_ledger(tmp_path: Path, ray_cluster: object) -> None:
    """With --at-cuts drop it gives no clip and does not disappear; the others keep their scores."""
    steady = [np.full((72, 96, 3), 40 + at, np.uint8) for at in range(20)]
    videos.write_video(tmp_path / "in/steady.mp4", steady)
    videos.write_video(tmp_path / "in/cut.mp4", [*steady[:8], *(255 - image for image in steady[8:])])
    chosen = settings(tmp_path, at_cuts="drop", num_frames=16, max_rejected_percent=60)
    made = ingest(chosen, progress=quiet)
    assert [(row["video_id"], row["cuts"], row["shot"]) for row in made.table.to_pylist()] == [("steady.mp4", 0, 0)]
    assert made.table["motion"][0].as_py() == pytest.approx(1, abs=0.3)
    rejected = [(row.video_id, row.reason, row.message) for row in ledger.read(made.uri)]
    assert rejected == [("cut.mp4", "cuts", CUTS.format("drop"))]
    assert ingest(chosen, progress=quiet) == made
    with pytest.raises(ValueError, match="was made with --at-cuts drop, not keep: use --at-cuts drop to continue"):
        ingest(settings(tmp_path, num_frames=16), progress=quiet)


def test_duplicates_are_in_the_ledger(tmp_path: Path, ray_cluster: object) -> None:
    """Of equal contents the first name is kept, also against what is there already; `keep` takes them all."""
    make_videos(tmp_path / "in", "b.mp4", "c.mp4")
    shutil.copy(tmp_path / "in/b.mp4", tmp_path / "in/d.mp4")
    ingest(settings(tmp_path), progress=quiet)
    shutil.copy(tmp_path / "in/b.mp4", tmp_path / "in/a.mp4")
    manifest = ingest(settings(tmp_path), progress=quiet)
    assert set(manifest.table["video_id"].to_pylist()) == {"b.mp4", "c.mp4"}
    rows = [(row.video_id, row.reason, row.message) for row in ledger.read(manifest.uri)]
    assert rows == [(name, "duplicate", "the same content as b.mp4") for name in ("a.mp4", "d.mp4")]
    # When the first one changes, the others are no duplicates any more.
    videos.write_video(tmp_path / "in/b.mp4", videos.images(50))
    manifest = ingest(settings(tmp_path), progress=quiet)
    assert set(manifest.table["video_id"].to_pylist()) == {"a.mp4", "b.mp4", "c.mp4"}
    assert [(row.video_id, row.message) for row in ledger.read(manifest.uri)] == [
        ("d.mp4", "the same content as a.mp4")
    ]
    kept = ingest(settings(tmp_path, duplicates="keep", output=str(tmp_path / "all")), progress=quiet)
    assert kept.counts["videos"] == 4


def test_a_kill_between_ledger_and_manifest_is_harmless(tmp_path: Path, ray_cluster: object) -> None:
    """Ledger rows of shards that no manifest names are forgotten, so the next run plans as an undisturbed one would."""
    make_videos(tmp_path / "in", "a.mp4", "b.mp4")
    ingest(settings(tmp_path), progress=quiet)
    committed = (tmp_path / "out" / NAME).read_bytes()
    videos.write_video(tmp_path / "in/d.mp4", videos.images(25))
    (tmp_path / "in/c.mp4").write_text("no video")
    grown = ingest(settings(tmp_path), progress=quiet)
    after = shards(tmp_path / "out")
    (tmp_path / "out" / NAME).write_bytes(committed)
    assert ingest(settings(tmp_path), progress=quiet) == grown
    assert shards(tmp_path / "out") == after


def test_other_settings_are_refused(tmp_path: Path, ray_cluster: object) -> None:
    """An output of other settings is not touched; the error names the option and both values."""
    make_videos(tmp_path / "in", "a.mp4")
    ingest(settings(tmp_path), progress=quiet)
    videos.write_video(tmp_path / "in/b.mp4", videos.images(25))
    with pytest.raises(ValueError, match=r"was made with --num-frames 4, not 8: use --num-frames 4 to continue it"):
        ingest(settings(tmp_path, num_frames=8), progress=quiet)
    with pytest.raises(ValueError, match=r"was made with --hdr tonemap, not keep: use --hdr tonemap to continue it"):
        ingest(settings(tmp_path, hdr="keep"), progress=quiet)
    assert Manifest.load(str(tmp_path / "out")).counts["videos"] == 1
    assert ingest(settings(tmp_path, seconds_per_video=9.0), progress=quiet).counts["videos"] == 2


def test_all_rejected_is_an_error_without_a_data_set(tmp_path: Path, ray_cluster: object) -> None:
    """The error names the count, the most common reason and the ledger, which is there; twice the same."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("no video")
    (tmp_path / "in/c.mp4").touch()
    for _ in range(2):
        said = rf"3 of 3 videos were rejected \(cannot-open 2, empty 1\): see {tmp_path}/out/ledger.jsonl"
        with pytest.raises(ValueError, match=said):
            ingest(settings(tmp_path), progress=quiet)
        assert not (tmp_path / "out" / NAME).exists()
        assert len(ledger.read(str(tmp_path / "out"))) == 3


def test_too_many_rejected_is_an_error_that_keeps_the_clips(tmp_path: Path, ray_cluster: object) -> None:
    """Above the share the job fails, each time, but the good clips are a data set; a higher share accepts it."""
    make_videos(tmp_path / "in", "a.mp4")
    for name in ("b.mp4", "c.mp4"):
        (tmp_path / "in" / name).write_text("no video")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2 of 3 videos were rejected .*; the clips of the others are kept"):
            ingest(settings(tmp_path), progress=quiet)
    assert ingest(settings(tmp_path, max_rejected_percent=67), progress=quiet).counts["videos"] == 1


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    """The error names the output, before any video is decoded and without a cluster."""
    make_videos(tmp_path / "in", "a.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"{tmp_path}/file/out cannot be written \(Not a directory\)"):
        ingest(settings(tmp_path, output=str(tmp_path / "file/out")), progress=quiet)


def test_a_relative_path_is_refused_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a submitted job a relative path would name the job's own folder, so it is refused; elsewhere it is taken."""
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert storage.require_absolute("data", "--output") == os.path.abspath("data")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert storage.require_absolute("s3://bucket/data", "--output") == "s3://bucket/data"
    with pytest.raises(ValueError, match=r"--output 'data' is a relative path, and a submitted job does not run in"):
        storage.require_absolute("data", "--output")


def test_a_data_set_of_an_earlier_version_keeps_its_split(tmp_path: Path, ray_cluster: object) -> None:
    """New ranges are held out one by one there, and by file in a new one; missing videos cost nothing on a rerun."""
    videos.write_video(tmp_path / "in/a.mp4", videos.images(40))
    ranges = [f"{0.16 * part:.2f},{0.16 * part + 0.16:.2f}" for part in range(10)]

    def run(output: str, count: int) -> tuple[Manifest, list[str]]:
        lines: list[str] = []
        text = "path,start_seconds,end_seconds\n" + "".join(f"a.mp4,{span}\n" for span in ranges[:count])
        (tmp_path / "list.csv").write_text(text + "gone.mp4,,\n")
        chosen = settings(
            tmp_path, output=output, annotations=str(tmp_path / "list.csv"), held_out_percent=50, videos_per_shard=1
        )
        return ingest(chosen, progress=lines.append), lines

    def held_out(manifest: Manifest) -> dict[str, bool]:
        return dict(zip(manifest.table["video_id"].to_pylist(), manifest.table["held_out"].to_pylist(), strict=True))

    new, _ = run(str(tmp_path / "new"), 10)
    assert set(held_out(new).values()) == {is_held_out("a.mp4", 50)}
    again, lines = run(str(tmp_path / "new"), 10)
    assert again == new
    assert f"ingest  nothing new: all 10 videos are in {tmp_path}/new or its ledger" in lines

    before, _ = run(str(tmp_path / "old"), 5)
    path = tmp_path / "old" / NAME
    table = pq.read_table(path)
    by_entry = pa.array([is_held_out(name, 50) for name in table["video_id"].to_pylist()])
    place = table.column_names.index("held_out")
    pq.write_table(table.drop_columns(["source"]).set_column(place, table.schema.field(place), by_entry), path)
    continued, lines = run(str(tmp_path / "old"), 10)
    assert any("holds out each range by itself, as earlier versions did" in line for line in lines)
    assert held_out(continued) == {name: is_held_out(name, 50) for name in held_out(new)}
    assert len(set(held_out(continued).values())) == 2
    assert before.counts["videos"] == 5
