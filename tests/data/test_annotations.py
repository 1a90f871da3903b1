"""Lists of videos in all their layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vmoco.data.annotations import list_annotated
from vmoco.data.ingest import list_inputs
from vmoco.data.source import Found, Listing
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
        Found("a.mp4#1.5-4", size("a.mp4"), "a.mp4", 1.5, 4.0, "run"),
        Found("b/c d.mp4", size("b/c d.mp4"), "b/c d.mp4", label='say "hi",\nhe said'),
        Found("second half", size("a.mp4"), "a.mp4", 4.0),
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
        ({"path": "a.mp4", "lable": "x"}, r"has the column 'lable': path and optionally end_seconds, label"),
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


def splits(listing: Listing) -> dict[str, tuple[str | None, ...]]:
    return {found.video_id: (found.label, *found.splits) for found in listing.videos}


def test_kinetics(tmp_path: Path) -> None:
    """Trimmed files are taken whole wherever they lie, whole ones in their range; missing ones are in the ledger."""
    trimmed, whole = "train/abseiling/0347ZoDXyP0_000095_000105.mp4", "-3B32lodo2M.mkv"
    root = make(tmp_path / "in", trimmed, whole)
    (tmp_path / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "abseiling,0347ZoDXyP0,95,105,train\n"
        '"air drumming",-3B32lodo2M,59,69,validate\n'
        "zumba,gone1234567,0,10,test\n"
    )
    listing = list_annotated(root, str(tmp_path / "train.csv"), "kinetics")
    assert listing.videos == (
        Found("-3B32lodo2M_000059_000069", size(whole), whole, 59.0, 69.0, "air drumming", ("validate", None, None)),
        Found("0347ZoDXyP0_000095_000105", size(trimmed), trimmed, label="abseiling", splits=("train", None, None)),
    )
    assert [(row.video_id, row.reason) for row in listing.rejected] == [("gone1234567_000000_000010", "missing")]


def test_ucf101(tmp_path: Path) -> None:
    """The class is the folder; each of three splits has its column."""
    names = [f"{folder}/v_{folder}_g0{group}_c01.avi" for folder in ("Archery", "YoYo") for group in (1, 2)]
    root = make(tmp_path / "in", *names)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 YoYo\n")
    (lists / "trainlist01.txt").write_text(f"{names[0]} 1\r\n{names[2]} 2\r\n")
    (lists / "testlist01.txt").write_text(f"{names[1]}\n{names[3]}\n")
    (lists / "trainlist02.txt").write_text(f"{names[1]} 1\n{names[3]} 2\n")
    (lists / "testlist02.txt").write_text(f"{names[0]}\n{names[2]}\n")
    (lists / "trainlist03.txt").write_text(f"{names[0]} 1\n")
    assert splits(list_annotated(root, str(lists), "ucf101")) == {
        names[0]: ("Archery", "train", "test", "train"),
        names[1]: ("Archery", "test", "train", None),
        names[2]: ("YoYo", "train", "test", None),
        names[3]: ("YoYo", "test", "train", None),
    }


def test_hmdb51(tmp_path: Path) -> None:
    """The class is in the name of the split file; 1 is train, 2 is test, and 0 is in no part of that split."""
    names = ["brush_hair/April 09 (x)_brush_hair_u_nm_np1_ba_goo_0.avi", "run/b_run_f_cm_np1_le_med_1.avi"]
    root = make(tmp_path / "in", *names)
    lists = tmp_path / "splits"
    lists.mkdir()
    for split, (first, second) in enumerate([("1", "2"), ("0", "1"), ("2", "0")], start=1):
        (lists / f"brush_hair_test_split{split}.txt").write_text(f"{names[0].split('/')[1]} {first} \n")
        (lists / f"run_test_split{split}.txt").write_text(f"{names[1].split('/')[1]} {second}\n")
    assert splits(list_annotated(root, str(lists), "hmdb51")) == {
        names[0]: ("brush_hair", "train", None, "test"),
        names[1]: ("run", "test", "train", None),
    }
    with pytest.raises(ValueError, match=r"no split files of ucf101 in .*splits"):
        list_annotated(root, str(lists), "ucf101")
    with pytest.raises(
        ValueError,
        match=r"with --layout hmdb51, --annotations .*nothing must be the folder of its split files: .* not a folder",
    ):
        list_annotated(root, str(tmp_path / "nothing"), "hmdb51")
