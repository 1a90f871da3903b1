"""The index holds what the manifest says of the clips that are taken, once for each node, never of another manifest.

A plain reading of the manifest's rows, one after the other, is what it is compared with.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_clip_scores import ingested, with_scores
from tests.data.test_cuts import CUTS, scenes
from tests.data.test_loader import equal
from tests.data.videos import write_video
from tests.dataset import make_data_set
from tests.made import settings_for
from tests.train.test_step import changed
from vmoco.clip_settings import DataSettings
from vmoco.data import clip_index
from vmoco.data import manifest as manifests
from vmoco.data.clip_index import CLIP, ClipIndex
from vmoco.data.decoder import Decoder
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.data.manifest_writer import write_manifest
from vmoco.seed import hash64

Facts = list[tuple[Any, ...]]


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """12 videos of 2 clips, the last two held out; opened as a rank opens it. The cache of the node is empty."""
    monkeypatch.setenv("VMOCO_HOME", str(tmp_path / "home"))
    return Manifest.load(make_data_set(tmp_path / "data", num_held_out=2).uri)


def facts(index: ClipIndex) -> Facts:
    """All that an index says, clip by clip."""
    found: Facts = []
    for video in range(index.num_videos):
        for clip in range(int(index.first_clip[video]), int(index.first_clip[video + 1])):
            shot = int(index.place_in_shot[clip]), int(index.num_of_shot[clip])
            where = index.shard_name(index.shard(clip)), *index.extent(clip)
            name = int(index.video_names[video])
            found.append((index.clip_id(clip), int(index.clip_ids[clip]), index.sha256(clip), *where, name, *shot))
    assert len(found) == index.num_clips
    return found


def plain_facts(rows: list[dict[str, Any]], *, shots: bool) -> Facts:
    """The same from rows of a manifest."""
    found: Facts = []

    def same(row: dict[str, Any]) -> tuple[Any, ...]:
        if not shots or row["shot"] is None:
            return (row["video_id"],)
        return (row["video_id"], row["shot"], row["clip_id"] if row["cuts"] else None)

    for _, members in itertools.groupby(rows, same):
        own = list(members)
        for place, row in enumerate(own):
            name = int(np.uint64(hash64("video", row["video_id"])).view(np.int64))
            ids = row["clip_id"], int(row["clip_id"], 16), row["sha256"]
            found.append((*ids, row["shard"], row["offset"], row["num_bytes"], name, place, len(own)))
    return found


def folders() -> list[Path]:
    """The indexes of this node."""
    return sorted((Path(os.environ["VMOCO_HOME"]) / "cache" / "indexes").glob("?" * 32))


def test_a_clip_takes_64_bytes(data_set: Manifest) -> None:
    """As many as the file says, and a record of a video 16."""
    index = ClipIndex.of(data_set, DataSettings())
    (folder,) = folders()
    assert CLIP.itemsize == 64
    assert (folder / "clips").stat().st_size == 64 * index.num_clips == 64 * 20
    assert (folder / "videos").stat().st_size == 16 * (index.num_videos + 1)


@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    rows_at_once=st.integers(1, 9),
    shots_at_once=st.integers(1, 9),
    seed=st.integers(0, 100),
)
def test_pieces_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], rows_at_once: int, shots_at_once: int, seed: int
) -> None:
    """Wherever a piece of the manifest ends, also in a video or a shot; from a file, and in memory."""
    draw = np.random.default_rng(seed)
    rows, unknown = [], draw.integers(8, size=2).tolist()
    for video, count in enumerate(counts):
        held_out, shot = bool(draw.random() < 0.3), 0
        for clip in range(count):
            shot += int(draw.random() < 0.4)
            cuts = int(draw.integers(3)) if draw.random() < 0.3 else 0
            sha256, shard = f"{int(draw.integers(2**60)):064x}", f"{draw.integers(3):016x}"
            rows.append(
                {
                    "video_id": f"video {video:03d}",
                    "clip_id": f"{hash64('clip', video, clip):016x}",
                    "start_seconds": float(clip),
                    "sha256": sha256,
                    "shard": shard,
                    "offset": int(draw.integers(2**40)),
                    "num_bytes": int(draw.integers(2**31)),
                    "held_out": held_out,
                    "cuts": cuts,
                    "shot": None if video in unknown else shot,
                }
            )
            shot += cuts
    folder = tmp_path_factory.mktemp("set")
    manifest = manifest_of(folder / "data", rows)
    expected = plain_facts([row for row in rows if not row["held_out"]], shots=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMOCO_HOME", str(folder / "home"))
        patch.setattr(manifests, "ROWS_PER_PIECE", rows_at_once)
        patch.setattr(clip_index, "_AT_ONCE", shots_at_once)
        assert manifest.table.num_rows == len(rows)  # it is in memory now
        assert facts(ClipIndex.of(manifest, DataSettings())) == expected
        assert manifest.is_read
        opened = Manifest.load(manifest.uri)
        assert facts(ClipIndex.of(opened, DataSettings())) == expected
        assert not opened.is_read


def manifest_of(folder: Path, rows: list[dict[str, Any]]) -> Manifest:
    """A manifest with these rows; its shards are empty files."""
    shards = {row["shard"] for row in rows}
    (folder / "shards").mkdir(parents=True)
    for name in shards:
        (folder / "shards" / f"{name}.arrow").touch()
    missing = {"string": "", "int32": 0, "int64": 0, "float": 0.0, "double": 0.0, "bool": False}
    columns = {
        field.name: pa.array(
            [row.get(field.name, None if field.nullable else missing[str(field.type)]) for row in rows], field.type
        )
        for field in manifests.FIELDS
    }
    return write_manifest(
        str(folder),
        pa.table(columns),
        settings={},
        frame_shape=(10, 40, 48, 3),
        encoding="raw",
        shards=dict.fromkeys(shards, manifests.ShardFile(0, "")),
        num_rejected=0,
    )


def test_a_video_is_one_shot_where_one_of_a_clip_is_not_known(data_set: Manifest) -> None:
    """A data set that an earlier version began knows the shots of some videos only: these keep theirs.

    The index says how many others there are, from a file and in memory. One with a single clip has no pairs.
    """
    table = with_scores(data_set).table
    for unknown, videos in (([0], 1), ([2, 3, 9], 2), (range(24), 10), ([], 0), ([23], 0)):
        shots = [None if row in unknown else shot for row, shot in enumerate(table["shot"].to_pylist())]
        partly = table.set_column(table.column_names.index("shot"), "shot", pa.array(shots, pa.int32()))
        rows = partly.slice(0, 20).to_pylist()
        expected = []
        for _, own in itertools.groupby(rows, lambda row: row["video_id"]):
            members = list(own)
            expected += plain_facts(members, shots=all(row["shot"] is not None for row in members))
        write_again(data_set, partly)
        for manifest in (Manifest.load(data_set.uri), data_set.with_table(partly)):
            for _ in range(2):  # it is made, then opened
                index = ClipIndex.of(manifest, DataSettings())
                assert (facts(index), index.num_without_shots) == (expected, videos)
    few = table.slice(1)
    without = few.set_column(few.column_names.index("shot"), "shot", pa.nulls(23, pa.int32()))
    assert ClipIndex.of(data_set.with_table(without), DataSettings()).num_without_shots == 9


def test_batches_are_those_of_a_manifest_in_memory(data_set: Manifest) -> None:
    """A rank that maps the index reads no rows of the manifest, and yields the same bits."""
    settings = settings_for(data_set)
    opened = Manifest.load(data_set.uri)
    ranks = Loader(opened, settings, rank=0, world_size=1)
    assert data_set.table.num_rows == 24
    alone = Loader(data_set, settings, rank=0, world_size=1)
    assert all(equal(ranks.batch(step), alone.batch(step)) for step in range(8))
    assert (opened.is_read, data_set.is_read) == (False, True)


def test_the_index_is_made_once(data_set: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next rank, and the next run, read the manifest no more; other choices of clips have their own."""
    first = facts(ClipIndex.of(data_set, DataSettings()))
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "batches", None)
        assert facts(ClipIndex.of(Manifest.load(data_set.uri), DataSettings())) == first
    chosen = with_scores(Manifest.load(data_set.uri)).table
    write_again(data_set, chosen)
    lively = Manifest.load(data_set.uri)
    assert facts(ClipIndex.of(lively, DataSettings(min_motion=0.5))) == plain_facts(
        chosen.slice(5, 15).to_pylist(), shots=True
    )
    assert len(folders()) == 2


def write_again(manifest: Manifest, table: pa.Table) -> None:
    """Replaces the manifest of a data set."""
    write_manifest(
        manifest.uri,
        table,
        settings=manifest.settings,
        frame_shape=manifest.frame_shape,
        encoding=manifest.encoding,
        shards=manifest.shards,
        num_rejected=0,
    )


def test_another_manifest_has_another_index(data_set: Manifest) -> None:
    """A video less, or other videos held out with the same hash: what was made before is not used."""
    before = facts(ClipIndex.of(data_set, DataSettings()))
    table = data_set.table
    write_again(data_set, table.slice(2))
    assert facts(ClipIndex.of(Manifest.load(data_set.uri), DataSettings())) == before[2:]
    held_out = pa.array([row < 4 for row in range(24)])
    write_again(data_set, table.set_column(table.column_names.index("held_out"), "held_out", held_out))
    again = Manifest.load(data_set.uri)
    assert again.hash == data_set.hash
    assert facts(ClipIndex.of(again, DataSettings())) == plain_facts(table.slice(4).to_pylist(), shots=False)


def test_a_manifest_that_is_replaced_while_it_is_read_is_an_error(data_set: Manifest) -> None:
    """Its header and its rows would be of two data sets."""
    table = make_data_set(Path(data_set.uri).parent / "other", num_videos=13).table
    write_again(data_set, table)
    with pytest.raises(ValueError, match=r"^data set .*/data has changed while it was read: start again"):
        ClipIndex.of(data_set, DataSettings())
    with pytest.raises(ValueError, match=r"has changed while it was read"):
        _ = data_set.table


@pytest.mark.parametrize("damage", ["cut off", "no list", "killed"])
def test_what_is_not_complete_is_made_again(data_set: Manifest, damage: str) -> None:
    """A file that lost its end; a folder without its list; and what a killed process left is removed."""
    expected = facts(ClipIndex.of(data_set, DataSettings()))
    (folder,) = folders()
    if damage == "cut off":
        os.truncate(folder / "clips", 64 * 3)
    elif damage == "no list":
        (folder / "about.json").unlink()
    else:
        folder.rename(folder.parent / ".0123.tmp")
    assert facts(ClipIndex.of(data_set, DataSettings())) == expected
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", folder.name]


def test_without_a_place_for_files_it_is_made_in_memory(data_set: Manifest, tmp_path: Path) -> None:
    """The folder of the cache is a file: nothing is lost but the sharing."""
    expected = facts(ClipIndex.of(data_set, DataSettings()))
    blocked = tmp_path / "blocked"
    blocked.touch()
    assert facts(ClipIndex.of(data_set, DataSettings(cache=str(blocked)))) == expected


def test_a_disk_that_fills_up_is_no_end(data_set: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index that was begun is removed, another one is made in memory, and errors count each clip once."""
    expected = facts(ClipIndex.of(data_set, DataSettings()))
    os.unlink(folders()[0] / "about.json")
    monkeypatch.setattr(os, "fsync", full)
    assert facts(ClipIndex.of(data_set, DataSettings())) == expected
    assert [path.name for path in (Path(os.environ["VMOCO_HOME"]) / "cache" / "indexes").iterdir()] == [".lock"]


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_clip_that_is_too_large_for_the_index_is_named(tmp_path: Path) -> None:
    """Its size would lose its upper bits."""
    row = {"clip_id": f"{1:016x}", "sha256": f"{1:064x}", "video_id": "a", "shard": "b", "num_bytes": 2**32}
    with pytest.raises(ValueError, match=r"^a clip of .* has 4294967296 bytes, and 4 GiB is too much: ingest shorter"):
        ClipIndex.of(manifest_of(tmp_path, [row]), DataSettings())


def test_a_score_that_clips_lack_is_named(data_set: Manifest) -> None:
    """Counted over the complete data set, and no index is left behind."""
    with pytest.raises(
        ValueError, match=r"^--data.max-cuts 0 needs the scores of all clips, and 20 of the 20 training"
    ):
        ClipIndex.of(data_set, DataSettings(max_cuts=0))
    assert folders() == []


def test_the_oldest_indexes_are_removed(data_set: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 only those 3 stay that were opened last; one that is mapped is still readable."""
    monkeypatch.setattr(clip_index, "_KEPT", 3)
    write_again(data_set, with_scores(Manifest.load(data_set.uri)).table)
    opened = Manifest.load(data_set.uri)
    kept = []
    for number in range(5):
        kept.append(ClipIndex.of(opened, DataSettings(min_motion=number / 10)))
        for age, folder in enumerate(sorted(folders(), key=lambda each: each.stat().st_mtime)):
            os.utime(folder, (1000 + age, 1000 + age))  # clocks of file systems are coarse
    assert len(folders()) == 3
    assert [index.num_clips for index in kept] == [20, 19, 18, 17, 16]
    assert [row[0] for row in facts(kept[0])[1:]] == [row[0] for row in facts(kept[1])]


def open_and_count(uri: str, start: Any, made: Any) -> None:
    """In a rank of its own: opens the index at the same time as the others."""
    make = clip_index._make

    def counted(*arguments: Any) -> None:
        with made.get_lock():
            made.value += 1
        make(*arguments)

    clip_index._make = counted
    manifest = Manifest.load(uri)
    start.wait()
    assert ClipIndex.of(manifest, DataSettings()).num_clips == 20


def test_ranks_of_a_node_make_one(data_set: Manifest) -> None:
    """Four processes at once: one makes it, the others wait and map it."""
    context = multiprocessing.get_context("fork")
    start, made = context.Barrier(4), context.Value("i", 0)
    ranks = [context.Process(target=open_and_count, args=(data_set.uri, start, made)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert made.value == 1
    assert len(folders()) == 1


def test_a_pair_comes_from_one_shot_of_the_index(data_set: Manifest) -> None:
    """The loader's second clips are those of the plan: of the query's own shot."""
    chosen = with_scores(data_set)
    settings = changed(settings_for(chosen), data={"positives": "two_clips"})
    loader = Loader(chosen, settings, rank=0, world_size=1)
    rows = chosen.table.to_pylist()
    for step in range(10):
        draws = loader.plan.batch(step)
        for clip, other in zip(draws.clip.tolist(), loader.plan.second_clips(draws).tolist(), strict=True):
            assert (rows[clip]["video_id"], rows[clip]["shot"]) == (rows[other]["video_id"], rows[other]["shot"])


def test_frames_of_a_pair_are_of_one_true_shot(tmp_path: Path) -> None:
    """Joined scenes, with the clips that cross a cut kept: each pair that can be drawn lies between two real cuts.

    A clip that crosses one is paired with itself. All clips of one shot that cross none are paired with each other.
    """
    path = write_video(tmp_path / "videos" / "a.mp4", scenes(), options={"g": "10", "sc_threshold": "0"})
    decoder = Decoder()
    settings, (made, _) = ingested(path, decoder=decoder, num_frames=8)
    decoder.close()
    manifest = write_manifest(
        settings.output,
        pa.Table.from_pylist(made.rows, pa.schema(manifests.FIELDS)),
        settings=settings.content(),
        frame_shape=settings.frame_shape,
        encoding="raw",
        shards={made.name: made.file},
        num_rejected=0,
    )
    index = ClipIndex.of(manifest, DataSettings())
    shown = []
    for row in manifest.table.to_pylist():
        first = round(25 * row["start_seconds"])
        shown.append({sum(cut <= frame for cut in CUTS) for frame in range(first, first + 8)})
    assert sum(len(each) == 2 for each in shown) >= 2
    pairs = 0
    for clip, (place, count) in enumerate(zip(index.place_in_shot.tolist(), index.num_of_shot.tolist(), strict=True)):
        others = set(range(clip - place, clip - place + count)) - {clip}
        assert all(len(shown[clip] | shown[other]) == 1 for other in others), (clip, others)
        pairs += len(others)
    lengths = [sum(each == {shot} for each in shown) for shot in range(len(CUTS) + 1)]
    assert pairs == sum(length * (length - 1) for length in lengths) > 20
