"""A table in many parts reads as one, block by block, and its parts record which videos were rejected."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from tests.dataset import stored_clips
from tests.embeddings import embedded, labelled_data_set, table_of
from tests.made import encoder_of
from vmoco import storage
from vmoco.data.ledger import Loss, Rejection
from vmoco.evaluate.features import clip_features
from vmoco.evaluate.table import FeatureTable, part_bytes, part_losses, part_rejected, part_uri


def test_blocks_are_the_chosen_rows_in_order(tmp_path: Path) -> None:
    """For any choice of rows, and again on the second pass; a block is never longer than a part."""
    features = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    table = table_of(tmp_path, features, ["a"] * 40)
    chosen = np.random.default_rng(1).random(40) < 0.4
    blocks = table.blocks(chosen)
    for _ in range(2):
        assert max(map(len, blocks)) <= 7
        assert np.array_equal(np.concatenate(list(blocks)), features[chosen])
    assert np.array_equal(table.features(), features)
    assert table.strings("video_id")[3] == "v00003"
    assert np.array_equal(table.colours()[0], [1, 2, 3])


def test_any_reader_of_parquet_reads_it(tmp_path: Path) -> None:
    """Arrow's own types alone: lists of floats, strings, numbers."""
    table_of(tmp_path, np.eye(4, dtype=np.float32), ["a", "b", None, "c"])  # type: ignore[list-item]
    (path,) = (tmp_path / "parts").glob("*.parquet")
    read = pq.read_table(path).to_pydict()
    assert read["feature"][2] == [0, 0, 1, 0]
    assert read["label"] == ["a", "b", None, "c"]


def test_pandas_and_scikit_learn_train_on_it(tmp_path: Path) -> None:
    """By their own readers alone: features are those of the encoder, and a pipeline fits the labels of the data set."""
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    encoder, manifest = encoder_of(num_frames=10), labelled_data_set(tmp_path / "data", num_videos=12)
    embedded(encoder, manifest, tmp_path / "table")
    frame = pd.read_parquet(tmp_path / "table" / "parts").sort_values(["video_id", "row"])
    features = np.stack(frame["feature"].to_list())
    stored = dict(zip(manifest.table["clip_id"].to_pylist(), stored_clips(manifest), strict=True))
    clips = np.stack([stored[clip_id] for clip_id in frame["clip_id"]])
    np.testing.assert_allclose(features, encoder.embed(clips).numpy(), atol=1e-6)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    assert pipeline.fit(features, frame["label"]).score(features, frame["label"]) == 1.0


def test_a_part_without_clips_accounts_for_its_videos(tmp_path: Path) -> None:
    """It reads back with its rejections, and adds no rows to the table."""
    lost = Rejection("x.mp4", "probe", "truncated", "half of it", entry="an entry")
    less = Loss("y.mp4", ((0.5, 1.0),), 12.5, "h264: concealing")
    content = part_bytes([], np.zeros((0, 5), np.float32), rejected=[lost], losses=[less])
    storage.write_atomic(part_uri(str(tmp_path), "empty"), content)
    assert part_rejected(str(tmp_path), "empty") == [lost]
    assert part_losses(str(tmp_path), "empty") == [less]
    assert part_rejected(str(tmp_path), "none") is None
    features = np.ones((3, 5), np.float32)
    table_of(tmp_path, features, ["a"] * 3)
    both = FeatureTable(str(tmp_path))
    assert np.array_equal(both.features(), features)


def test_what_describes_the_clips_is_read_without_their_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a part of 4 MB, local or remote, it reads only the footer for rejections and the small columns for rows."""
    table_of(tmp_path, np.random.default_rng(0).normal(size=(500, 2048)).astype(np.float32), ["a"] * 500, block=500)
    (path,) = (tmp_path / "parts").glob("*.parquet")
    size, counted = path.stat().st_size, [0]

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            content = super().read(size)
            counted[0] += len(content)
            return content

    class Remote:
        def open_input_file(self, path: str) -> pa.NativeFile:
            return pa.PythonFile(Counting(path), mode="r")

        open_input_stream = open_input_file

        def get_file_info(self, path: str) -> pafs.FileInfo:
            return pafs.LocalFileSystem().get_file_info(path)

    monkeypatch.setattr(storage, "filesystem", lambda uri: (Remote(), uri))
    assert part_rejected(str(tmp_path), path.stem) == []
    assert 0 < counted[0] < 0.05 * size
    counted[0] = 0
    assert len(FeatureTable(str(tmp_path), [path.stem])) == 500
    assert 0 < counted[0] < 0.1 * size


def test_no_table_is_said(tmp_path: Path) -> None:
    """The message names the job that makes a table."""
    with pytest.raises(ValueError, match=r"there is no table of embeddings in .*jobs/embed.py"):
        FeatureTable(str(tmp_path))


def test_the_task_writes_what_the_encoder_gives(tmp_path: Path) -> None:
    """Features, labels, splits and times of a data set, in the order of its shards, in batches of another size."""
    manifest = labelled_data_set(tmp_path / "data", num_videos=5)
    table = embedded(encoder_of(), manifest, tmp_path / "table", batch_size=3)
    assert (
        table.columns()["clip_id"].to_pylist()
        == manifest.table.sort_by([("shard", "ascending"), ("row", "ascending")])["clip_id"].to_pylist()
    )
    order = [manifest.table["clip_id"].to_pylist().index(clip) for clip in table.columns()["clip_id"].to_pylist()]
    expected = clip_features(encoder_of(), manifest, manifest.table)[order]
    np.testing.assert_allclose(table.features(), expected, atol=1e-6)
    assert table.columns()["label"].to_pylist() == [manifest.table["label"][at].as_py() for at in order]
    assert set(table.columns()["split_1"].to_pylist()) == {"train", "test"}
    assert set(table.columns()["clip_seconds"].to_pylist()) == {0.4}
