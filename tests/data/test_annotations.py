"""Lists of videos in all their layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vmoco.data.annotations import list_annotated
from vmoco.data.found import Found
from vmoco.data.ingest import list_inputs
from vmoco.job_settings import IngestSettings


def make(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * (len(name) + 1))
    return str(root)


def size(name: str) -> int:
    return len(name) + 1


ROWS = [
    {"path": "a.mp4", "start_seconds": 1.5, "end_seconds": 4, "label": "run", "video_id": None},
    {"path": "a.mp4", "start_seconds": 4, "end_seconds": None, "label": None, "video_id": "second half"},
    {"path": "b/c d.mp4", "start_seconds": None, "end_seconds": None, "label": 'say "hi",\nhe said', "video_id": None},
    {"path": "gone.mp4", "start_seconds": None, "end_seconds": None, "label": None, "video_id": None},
]


def write_csv(path: Path) -> None:
    path.write_text(
        "path,start_seconds,end_seconds,label,video_id\n"
        "a.mp4,1.5,4,run,\n"
        "a.mp4,4,,,second half\n"
        'b/c d.mp4,,,"say ""hi"",\nhe said",\n'
        "gone.mp4,,,,\n"
    )


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in ROWS))


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_jsonl], ids=lambda write: write.__name__)
def test_tables_say_the_same(tmp_path: Path, write: object) -> None:
    """CSV, Parquet and JSON lines: ranges, labels, names; what is not there is in the ledger, the rest is left out."""
    root = make(tmp_path / "in", "a.mp4", "b/c d.mp4", "not listed.mp4")
    suffix = write.__name__.removeprefix("write_")  # type: ignore[attr-defined]
    table = tmp_path / "in" / f"list.{suffix}"
    write(table)  # type: ignore[operator]
    listing = list_annotated(root, str(table), "table")
    assert listing.videos == (
        Found("a.mp4#1.5-4", size("a.mp4"), "a.mp4", 1.5, 4.0, "run", source="a.mp4"),
        Found("b/c d.mp4", size("b/c d.mp4"), "b/c d.mp4", label='say "hi",\nhe said'),
        Found("second half", size("a.mp4"), "a.mp4", 4.0, source="a.mp4"),
    )
    assert [(row.video_id, row.stage, row.reason) for row in listing.rejected] == [("gone.mp4", "list", "missing")]
    # The list itself may stand where the folder does: paths count from its folder.
    assert list_inputs(IngestSettings(videos=str(table), output="x")) == (root, listing)
    by_flag = IngestSettings(videos=root, annotations=str(table), output="x")
    assert list_inputs(by_flag) == (root, listing)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"path": "../a.mp4"}, r"row 2: path '../a.mp4' leaves the folder of the videos"),
        ({"path": "b/../../a.mp4"}, r"leaves the folder"),
        ({"path": "/etc/a.mp4"}, r"leaves the folder"),
        ({"path": "s3://other/a.mp4"}, r"leaves the folder"),
        ({"path": ""}, r"row 2 has no path"),
        ({"path": "a.mp4", "lable": "x"}, r"has the column 'lable': path and optionally end_seconds, group, label"),
        ({"path": "a.mp4", "start_seconds": "soon"}, r"start_seconds 'soon' is not a number of seconds from 0 on"),
        ({"path": "a.mp4", "start_seconds": -1}, r"start_seconds -1 is not a number"),
        ({"path": "a.mp4", "start_seconds": 3, "end_seconds": 3}, r"start_seconds 3 is not before end_seconds 3"),
        ({"path": "b.mp4", "video_id": "first"}, r"names 'first' 2 times \(1 such names\): give each row a video_id"),
    ],
)
def test_wrong_rows_are_refused(tmp_path: Path, row: dict[str, object], said: str) -> None:
    """Before any work: the message has the row, the value and what is allowed."""
    root = make(tmp_path, "a.mp4", "b.mp4")
    table = tmp_path / "list.jsonl"
    table.write_text(json.dumps({"path": "a.mp4", "video_id": "first"}) + "\n" + json.dumps(row) + "\n")
    if "lable" in row:
        table.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=said):
        list_annotated(root, str(table), "table")


def test_what_is_no_list_is_refused(tmp_path: Path) -> None:
    """Another suffix, no such file, nothing in it, nothing that is there."""
    root = make(tmp_path, "a.mp4")
    with pytest.raises(ValueError, match=r"list .*list.txt ends in '.txt': .csv, .parquet, .jsonl are allowed"):
        list_annotated(root, f"{root}/list.txt", "table")
    with pytest.raises(ValueError, match=r"list .*list.csv cannot be read"):
        list_annotated(root, f"{root}/list.csv", "table")
    (tmp_path / "list.csv").write_text("path\n")
    with pytest.raises(ValueError, match=r"list .*list.csv has no rows"):
        list_annotated(root, f"{root}/list.csv", "table")
    (tmp_path / "list.csv").write_text("path\nz.mp4\n")
    with pytest.raises(ValueError, match=r"none of the 1 videos that .*list.csv names is in .*: check --videos"):
        list_annotated(root, f"{root}/list.csv", "table")
