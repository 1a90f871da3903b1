"""Rows of a manifest on disk: whatever the order and the pieces in which they come, they are read back sorted."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmoco.data import clip_rows
from vmoco.data.clip_rows import SCHEMA, ClipRows, Counts
from vmoco.data.ledger import ScratchError
from vmoco.data.temporary_database import folder

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
NOTES = [None, "joined: 2 recordings", "joined: 2 recordings; mirrored: yes"]


def values(field: pa.Field) -> st.SearchStrategy[Any]:
    """Anything that a column may hold."""
    if pa.types.is_boolean(field.type):
        own: st.SearchStrategy[Any] = st.booleans()
    elif pa.types.is_floating(field.type):
        own = st.floats(width=field.type.bit_width, allow_nan=False)
    elif pa.types.is_integer(field.type):
        bound = 2 ** (field.type.bit_width - 1)
        own = st.integers(-bound, bound - 1)
    else:
        own = texts
    return st.none() | own if field.nullable else own


row = st.fixed_dictionaries({field.name: values(field) for field in SCHEMA} | {"notes": st.sampled_from(NOTES)})


@given(st.lists(row, min_size=1, max_size=30, unique_by=lambda each: each["clip_id"]), st.integers(1, 7))
def test_rows_are_read_back_sorted(rows: list[dict[str, Any]], size: int) -> None:
    """All values come back bit for bit, by video, time and clip; hash, notes and counts are those of all rows."""
    held_out = {each["video_id"]: each["held_out"] for each in rows}
    rows = [each | {"held_out": held_out[each["video_id"]]} for each in rows]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_rows, "ROWS_PER_PIECE", size)
        kept = ClipRows()
        assert not kept
        for first in range(0, len(rows), 3):
            kept.add(table.slice(first, 3).select(SCHEMA.names[::-1]))
        assert kept
        pieces = list(kept.batches())
    assert all(piece.num_rows == size for piece in pieces[:-1])
    sorting = [("video_id", "ascending"), ("start_seconds", "ascending"), ("clip_id", "ascending")]
    assert pa.concat_tables(pieces).equals(table.sort_by(sorting), check_metadata=True)
    lines = sorted((each["clip_id"], each["sha256"]) for each in rows)
    expected = hashlib.sha256("".join(f"{clip} {pixels}\n" for clip, pixels in lines).encode()).hexdigest()[:16]
    assert kept.content_hash() == (expected, 0)
    noted = {(each["video_id"], note.partition(":")[0]) for each in rows for note in (each["notes"] or "").split("; ")}
    assert kept.note_counts() == Counter(kind for _, kind in noted if kind)
    counts = Counts()
    for piece in pieces:
        counts.add(piece)
    assert counts.found == {"videos": len(held_out), "clips": len(rows), "held_out": sum(held_out.values())}
    empty = {field.name for field in SCHEMA if all(each[field.name] is None for each in rows)}
    assert set(kept.without_values(SCHEMA.names)) == empty


def test_a_name_that_is_there_twice_is_counted() -> None:
    """Two clips of one name are an error of whoever made them, and are found."""
    constant = {field.name: 0 if not pa.types.is_string(field.type) else "" for field in SCHEMA}
    rows = [constant | {"clip_id": name, "held_out": False} for name in "abab"]
    assert ClipRows.of(pa.Table.from_pylist(rows, schema=SCHEMA)).content_hash()[1] == 2


def test_the_folder_is_the_one_that_is_used() -> None:
    """The message names the folder in which the rows really are."""
    kept = ClipRows()
    kept._database.execute("CREATE TABLE filler AS SELECT randomblob(2000) AS x FROM (SELECT 1 UNION ALL SELECT 2)")
    for _ in range(16):
        kept._database.execute("INSERT INTO filler SELECT randomblob(2000) FROM filler LIMIT 20000")
    files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)]
    assert any(file.startswith(f"{os.path.realpath(folder())}/etilqs_") for file in files), files


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the temporary files do not fit, the folder and what to do are named."""
    kept = ClipRows()
    kept._database.execute("PRAGMA max_page_count = 20")
    table = pa.Table.from_pylist(
        [{field.name: None for field in SCHEMA}] * 9, schema=pa.schema([field.with_nullable(True) for field in SCHEMA])
    )
    texts_of = pa.array(["x" * 9000] * 9)
    for name in ("clip_id", "video_id", "sha256"):
        table = table.set_column(table.column_names.index(name), name, texts_of)
    monkeypatch.setattr(clip_rows, "SCHEMA", table.schema)
    with pytest.raises(ScratchError, match=rf"^cannot keep rows in a temporary database in {folder()}: .* full; free"):
        kept.add(table)
