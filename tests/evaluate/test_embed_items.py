"""An embedding job is planned in rounds, and nothing done with an encoder reads all rows of a data set at once."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.dataset import make_data_set, never_read_at_once
from tests.embeddings import embedded, labelled_data_set
from tests.made import encoder_of
from vmoco.data.found import Found
from vmoco.data.manifest import Manifest
from vmoco.data.manifest_writer import write_manifest
from vmoco.evaluate import embed_items
from vmoco.evaluate import evaluate as evaluation
from vmoco.evaluate.dedup import duplicates_of
from vmoco.evaluate.dedup_page import write_page
from vmoco.evaluate.embed_items import Item, Items
from vmoco.evaluate.gallery import write_gallery
from vmoco.evaluate.knn import nearest_clips
from vmoco.evaluate.motion import plan_motion
from vmoco.job_settings import DedupSettings, EmbedSettings, EvaluateSettings
from vmoco.seed import hash64


def clips_of(items: list[Item]) -> list[list[str]]:
    return [[row["clip_id"] for row in json.loads(item["plan"])["rows"]] for item in items]


@pytest.fixture
def data(tmp_path: Path) -> Manifest:
    """8 videos of 3 clips in two shards, whose videos alternate in the manifest, as after videos were added."""
    made = make_data_set(tmp_path / "data", num_videos=8, clips_per_video=3)
    place, shards = made.table.column_names.index("shard"), np.array(sorted(made.shards))
    alternating = pa.array(shards[np.arange(24) // 3 % 2].tolist())
    table = made.table.set_column(place, made.table.schema.field(place), alternating)
    kept = {name: getattr(made, name) for name in ("settings", "frame_shape", "encoding", "shards")}
    write_manifest(made.uri, table, num_rejected=0, **kept)
    return Manifest.load(made.uri)


def test_rounds_are_the_whole(data: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard is one item, whose part has the name it always had; a round has as many shards as it may."""
    whole = embed_items.shard_items(data, data.table)
    assert embed_items.shard_items(data, data.table.slice(0, 0)) == []
    assert [sorted(each) for each in clips_of(whole)] == [
        sorted(data.table.filter(np.equal(data.table["shard"].to_pylist(), name))["clip_id"].to_pylist())
        for name in sorted(data.shards)
    ]
    first = json.loads(whole[0]["plan"])["rows"]
    named = sorted(data.shards)[0] + "\0" + "".join(row["clip_id"] + row["sha256"] for row in first)
    assert whole[0]["part"] == hashlib.sha256(named.encode()).hexdigest()[:16]
    for at_once, sizes in ((24, [2]), (23, [1, 1]), (1, [1, 1])):
        monkeypatch.setattr(embed_items, "CLIPS_PER_ROUND", at_once)
        fresh = Manifest.load(data.uri)
        with never_read_at_once():
            items = embed_items.of_data_set(fresh)
            rounds = list(items.rounds)
        assert (items.count, [len(each) for each in rounds]) == (2, sizes)
        assert list(itertools.chain(*rounds)) == whole


def test_only_chosen_clips_take_part(data: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard without a chosen clip has no item."""
    monkeypatch.setattr("vmoco.data.manifest.ROWS_PER_PIECE", 5)
    shards, ids = np.array(data.table["shard"].to_pylist()), np.array(data.table["clip_id"].to_pylist())
    for chosen in (np.arange(24) % 3 == 1, shards == shards[0], np.zeros(24, bool)):
        items = embed_items.of_data_set(Manifest.load(data.uri), chosen)
        made = clips_of(list(itertools.chain(*items.rounds)))
        assert items.count == len(made) == len(set(shards[chosen]))
        assert sorted(itertools.chain(*made)) == sorted(ids[chosen])


def test_videos_come_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts keep their videos and their order, however many are in a round."""

    def rounds_of(items: Items) -> list[list[list[str]]]:
        return [[[name for name, _ in json.loads(item["plan"])["videos"]] for item in each] for each in items.rounds]

    videos = [Found(f"{number}.mp4", 9) for number in range(7)]
    items = embed_items.of_videos("/videos", videos, videos_per_part=2)
    assert items.count == 4
    assert rounds_of(items) == [[["0.mp4", "1.mp4"], ["2.mp4", "3.mp4"], ["4.mp4", "5.mp4"], ["6.mp4"]]]
    monkeypatch.setattr(embed_items, "_VIDEOS_PER_ROUND", 5)
    again = rounds_of(embed_items.of_videos("/videos", videos, videos_per_part=2))
    assert again == [[["0.mp4", "1.mp4"], ["2.mp4", "3.mp4"]], [["4.mp4", "5.mp4"], ["6.mp4"]]]


def test_nothing_reads_all_rows_at_once(tmp_path: Path) -> None:
    """Pages, copies, neighbours, motion probes and the plan of an evaluation read the manifest piece by piece."""
    manifest, encoder = labelled_data_set(tmp_path / "data", num_videos=48), encoder_of()
    table = embedded(encoder, manifest, tmp_path / "table")
    settings = EmbedSettings(videos=manifest.uri, output=str(tmp_path / "table"), queries=4)
    dedup = DedupSettings(data=manifest.uri, output=str(tmp_path / "table"), min_similarity=-1.0, min_agreement=1e-6)
    fresh = Manifest.load(manifest.uri)
    with never_read_at_once():
        write_gallery(table, encoder, settings, title="t")
        found = duplicates_of(fresh, table, dedup, show=lambda line: None)
        write_page(fresh, found, dedup)
        assert nearest_clips(encoder, fresh).gallery_size == len(table)
        assert plan_motion(fresh).rows.num_rows
        planned = evaluation.plan(EvaluateSettings(data=manifest.uri))
        named = evaluation._evaluation_set("retrieval", planned, EvaluateSettings(data=manifest.uri))
    assert found.left_out.num_rows
    # As it was when the columns were one text: sets of evaluations that are recorded keep their name.
    columns = manifest.table.select(["clip_id", "sha256", "label", "split_1", "split_2", "split_3", "held_out"])
    names = json.dumps([[split.name for split in planned.splits], None])
    assert named == f"{hash64('retrieval', names, json.dumps(columns.to_pydict())):016x}"
