"""The manifest: the commit point of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.dataset import make_data_set
from vmoco import storage
from vmoco.data import clip_scores, manifest
from vmoco.data.manifest import FIELDS, NAME, Manifest
from vmoco.data.manifest_writer import write_manifest
from vmoco.data.shard import ShardFile

ROWS: list[dict[str, Any]] = [
    {"clip_id": "03", "video_id": "b", "start_seconds": 0.5, "held_out": True, "shard": "s1", "row": 0},
    {"clip_id": "01", "video_id": "a", "start_seconds": 10.0, "held_out": False, "shard": "s0", "row": 0},
    {"clip_id": "02", "video_id": "a", "start_seconds": 9.0, "held_out": False, "shard": "s0", "row": 1},
]
SETTINGS = {"num_frames": 4, "height": 8}


def rows(**changes: Any) -> pa.Table:
    constant: dict[str, Any] = {"fps": 25.0, "height": 8, "width": 8, "offset": 64, "num_bytes": 768}
    constant |= {"entry": "e", "video_bytes": 7, "video_sha256": "v"}
    full = [{**constant, **row, "sha256": f"pixels of {row['clip_id']}", **changes} for row in ROWS]
    return pa.Table.from_pylist(full, schema=pa.schema(FIELDS))


def write(folder: Path, table: pa.Table | None = None, shards: tuple[str, ...] = ("s0", "s1", "s2")) -> Manifest:
    (folder / manifest.SHARDS).mkdir(parents=True, exist_ok=True)
    for name in shards:
        (folder / manifest.SHARDS / f"{name}.arrow").touch()
    table = rows() if table is None else table
    files = {name: ShardFile(9, f"hash of {name}", by_clips=name == "s1") for name in shards}
    return write_manifest(
        str(folder), table, settings=SETTINGS, frame_shape=(4, 8, 8, 3), encoding="jpeg", shards=files, num_rejected=5
    )


def test_what_is_written_is_loaded(tmp_path: Path) -> None:
    """Rows, settings, shape, counts, shards and hash come back equal."""
    written = write(tmp_path)
    loaded = Manifest.load(str(tmp_path))
    assert loaded == written
    assert loaded.table.column_names == [field.name for field in FIELDS]
    assert loaded.settings == SETTINGS
    assert loaded.frame_shape == (4, 8, 8, 3)
    assert loaded.counts == {"videos": 2, "clips": 3, "rejected": 5, "held_out": 1}
    assert loaded.shards == {
        name: ShardFile(9, f"hash of {name}", by_clips=name == "s1") for name in ("s0", "s1", "s2")
    }
    assert loaded.encoding == "jpeg"


def test_notes_are_kept_and_counted(tmp_path: Path) -> None:
    """Each kind of note counts its videos, not its clips; a manifest without notes is that of earlier versions."""
    plain = write(tmp_path / "plain")
    assert "notes" not in pq.read_table(tmp_path / "plain" / NAME).column_names
    assert plain.table["notes"].null_count == 3
    notes = [None, "joined: 2 recordings; mirrored: yes", "joined: 2 recordings; mirrored: yes"]
    noted = write(tmp_path / "noted", rows().drop_columns("notes").append_column("notes", pa.array(notes)))
    assert noted.counts == {**plain.counts, "joined": 1, "mirrored": 1}
    assert noted.hash == plain.hash
    loaded = Manifest.load(str(tmp_path / "noted"))
    assert loaded == noted
    assert loaded.table["notes"].to_pylist() == [notes[1], notes[1], None]


def test_rows_are_sorted(tmp_path: Path) -> None:
    """Rows stand by video, then by time, in whatever order they came."""
    assert write(tmp_path).table["clip_id"].to_pylist() == ["02", "01", "03"]


def test_the_hash_is_over_the_clips_and_not_their_layout(tmp_path: Path) -> None:
    """Other shards, rows or order: the same hash; other pixels: another."""
    lines = "".join(
        f"{row['clip_id']} pixels of {row['clip_id']}\n" for row in sorted(ROWS, key=lambda r: r["clip_id"])
    )
    expected = hashlib.sha256(lines.encode()).hexdigest()[:16]
    assert write(tmp_path / "a").hash == expected
    assert write(tmp_path / "b", rows(shard="s2", row=9).slice(1)).hash != expected
    assert write(tmp_path / "c", rows(shard="s2", row=9).take([2, 0, 1])).hash == expected
    assert write(tmp_path / "d", rows(sha256="other")).hash != expected


def test_a_folder_without_manifest_is_no_data_set(tmp_path: Path) -> None:
    """The error names the folder and the job that makes one; a file in its place is the same error."""
    with pytest.raises(ValueError, match=r"is not a data set: no manifest.parquet there; make one with jobs/ingest.py"):
        Manifest.load(str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is not a data set"):
        Manifest.load(str(tmp_path / "file"))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    """A data set whose shards were moved is refused with their names, before anything is read from them."""
    write(tmp_path)
    (tmp_path / manifest.SHARDS / "s1.arrow").unlink()
    with pytest.raises(ValueError, match=r"shards missing: 1 of the 3 .*\(s1.arrow\): restore them"):
        Manifest.load(str(tmp_path))


def test_another_version_is_refused(tmp_path: Path) -> None:
    """A manifest of another schema version names both versions; a foreign Parquet file has none."""
    write(tmp_path)
    table = pq.read_table(tmp_path / NAME)
    pq.write_table(table.replace_schema_metadata({"vmoco": '{"version": 7}'}), tmp_path / NAME)
    with pytest.raises(ValueError, match=r"has schema version 7, this vmoco reads the versions 2 and 3: use the vmoco"):
        Manifest.load(str(tmp_path))
    pq.write_table(table.replace_schema_metadata(None), tmp_path / NAME)
    with pytest.raises(ValueError, match=r"has schema version None"):
        Manifest.load(str(tmp_path))
    (tmp_path / NAME).write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"manifest.parquet cannot be read"):
        Manifest.load(str(tmp_path))


def test_any_parquet_reader_finds_the_facts(tmp_path: Path) -> None:
    """The JSON under the key `vmoco` lies in Parquet's own key-value metadata, not only in Arrow's."""
    write(tmp_path)
    assert b'"counts"' in pq.read_metadata(tmp_path / NAME).metadata[b"vmoco"]


def test_sources_are_a_column_only_where_there_are_some(tmp_path: Path) -> None:
    """A data set of complete files has the columns of earlier versions; when loaded, every row has the field."""
    names = [field.name for field in FIELDS]
    scores = {field.name for field in clip_scores.FIELDS}
    for source, left_out in ((None, {"notes", "source", *scores}), ("camera 1", {"notes", *scores})):
        about: dict[str, Any] = {"settings": SETTINGS, "frame_shape": (4, 8, 8, 3), "encoding": "raw", "shards": {}}
        made = write_manifest(str(tmp_path), rows(source=source), num_rejected=0, **about)
        assert pq.read_schema(tmp_path / NAME).names == [name for name in names if name not in left_out]
        loaded = Manifest.load(str(tmp_path))
        assert loaded == made
        assert loaded.table["source"].to_pylist() == [source] * 3


def test_rows_are_chosen_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen rows are those of the complete table, without a look at it; none are an empty table of all fields."""
    table = write(tmp_path).table
    loaded = Manifest.load(str(tmp_path))
    monkeypatch.setattr(manifest, "ROWS_PER_PIECE", 2)
    assert loaded.held_out().equals(table.filter(table["held_out"]))
    assert loaded.rows(lambda piece: pc.equal(piece["video_id"], "a"))["clip_id"].to_pylist() == ["02", "01"]
    assert loaded.rows(lambda piece: pc.equal(piece["video_id"], "c")).equals(table.slice(0, 0))
    assert not loaded.is_read


class FailsOnce:
    """`ParquetFile.iter_batches` of a store that breaks off one read; a reader that has failed has no more rows."""

    def __init__(self, at: int) -> None:
        self._reads, self._at = 0, at

    def __call__(self, file: pq.ParquetFile, **how: Any) -> Iterator[pa.RecordBatch]:
        for batch in self.original(file, **how):
            self._reads += 1
            if self._reads == self._at:
                raise OSError("connection lost")
            yield batch

    original = staticmethod(pq.ParquetFile.iter_batches)


@pytest.mark.parametrize("rows_per_piece", [2, 5, 100])
def test_reading_goes_on_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_piece: int) -> None:
    """Whichever read of whichever group of rows fails, no row is lost and none comes twice."""
    monkeypatch.setattr(manifest, "ROWS_PER_PIECE", rows_per_piece)
    monkeypatch.setattr(storage, "_WAITS_SECONDS", (0.0, 0.0))
    made = make_data_set(tmp_path, num_videos=12)
    for group in (7, 24):
        pq.write_table(pq.read_table(tmp_path / NAME), tmp_path / NAME, row_group_size=group)
        for at in range(1, 13):
            fails = FailsOnce(at)
            with monkeypatch.context() as patch:
                patch.setattr(pq.ParquetFile, "iter_batches", lambda file, fails=fails, **how: fails(file, **how))
                assert Manifest.load(str(tmp_path)).columns(["clip_id"])["clip_id"].equals(made.table["clip_id"]), at
