"""Lists of videos in all their layouts."""

from __future__ import annotations

import gc
import json
import os
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vmoco.data import annotations, gathered, named_entries
from vmoco.data.annotations import list_annotated
from vmoco.data.found import Found
from vmoco.data.ingest import list_inputs
from vmoco.data.listed_files import ListedFiles
from vmoco.data.source import Listing
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
        ({"path": "a.mp4", "start_seconds": -1}, r"start_seconds '-1' is not a number"),
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


NAMED = [
    {"path": "a", "label": "x"},
    {"path": "a", "label": "x"},
    {"path": "A.MP4", "label": "y", "video_id": "again"},
    {"path": "gone.mp4"},
    {"path": "c"},
    {"path": "b.mp4", "start_seconds": 1},
]


def test_a_list_on_disk_is_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries, their files, reasons and notes do not depend on how many there are."""
    root = make(tmp_path / "in", "a.mp4", "b.mp4", "c.mp4", "c.avi")
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, NAMED)))
    small = list_annotated(root, str(tmp_path / "list.jsonl"), "table")
    assert [(found.video_id, found.path, found.source) for found in small.videos] == [
        ("a.mp4", "a.mp4", "a.mp4"),
        ("again", "a.mp4", "a.mp4"),
        ("b.mp4#1-", "b.mp4", "b.mp4"),
    ]
    assert [(row.video_id, row.reason) for row in small.rejected] == [("c", "ambiguous"), ("gone.mp4", "missing")]
    assert small.notes == (
        "1 entries are repeated, and count once",
        "1 names differ from their files in case or Unicode form, such as 'A.MP4', which is 'a.mp4'",
    )
    monkeypatch.setattr(gathered, "IN_MEMORY", 0)
    monkeypatch.setattr(named_entries, "_AT_ONCE", 2)
    large = list_annotated(root, str(tmp_path / "list.jsonl"), "table")
    assert not isinstance(large.videos, tuple)
    assert not isinstance(large.rejected, tuple)
    assert (tuple(large.videos), tuple(large.rejected), large.notes) == (small.videos, small.rejected, small.notes)


def test_memory_does_not_grow_with_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of Kinetics with half of its files, four times as long, takes no more Python objects at a time."""
    monkeypatch.setattr(gathered, "IN_MEMORY", 100)
    for module in (gathered, named_entries):
        monkeypatch.setattr(module, "_AT_ONCE", 50)

    def peak(count: int) -> int:
        names = [f"{number:011d}_{5:06d}_{15:06d}" for number in range(count)]
        videos = gathered.gather(Found(f"{name}.mp4", 9) for name in names[::2])
        monkeypatch.setattr(annotations, "list_footage", lambda *args, **more: Listing(videos, (), 0, root="/in"))
        lines = (f"run,{name[:11]},5,15,train\n" for name in names)
        (tmp_path / "list.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "".join(lines))
        del names
        tracemalloc.start()
        try:
            listing = list_annotated("/in", str(tmp_path / "list.csv"), "kinetics")
            assert (len(listing.videos), len(listing.rejected)) == (count // 2, count // 2)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(2000), peak(8000)
    # pydantic keeps up to 16,384 texts that it has read, 1.2 MB. An entry is 1,900 bytes as an object with its names.
    assert many < few + 2**21


def test_a_folder_whose_name_is_no_text_stands_aside(tmp_path: Path) -> None:
    """Beside the videos of a list lie pictures in a folder whose name is bytes that are no UTF-8."""
    root = make(tmp_path, "a.mp4")
    folder = os.fsencode(tmp_path) + b"/pics\xff"
    os.mkdir(folder)
    for number in range(3):
        with open(folder + b"/frame_%03d.jpg" % number, "wb") as file:
            file.write(b"x")
    (tmp_path / "list.txt").write_text("a.mp4 1\n")
    assert [found.label for found in list_annotated(root, f"{root}/list.txt", "auto").videos] == ["1"]


def test_many_ranges_of_one_file() -> None:
    """Each range knows that its file has others, by work that does not grow with their number: SQLite counts it."""

    def work(count: int) -> int:
        entries = named_entries.NamedEntries(Found(f"{at}", 0, "a.mp4", start_seconds=at) for at in range(count))
        entries.take_files([Found("a.mp4", 9)])
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1

        entries._database.set_progress_handler(step, 100)
        assert [again for _, _, again in entries.with_file()] == [True] * count
        return steps

    assert work(8000) < 24 * work(500), "16 times the ranges; it was 256 times the work where each one counted all"


@pytest.mark.parametrize(
    ("line", "label"),
    [
        (json.dumps({"path": "a.mp4", "label": "one\u2028two\x85"}, ensure_ascii=False), "one\u2028two\x85"),
        ('{"path": "a.mp4", "label": 2.50}', "2.50"),
        ('{"path": "a.mp4", "label": "2020-01-01"}', "2020-01-01"),
        ('{"path": "a.mp4", "label": %s}' % ("9" * 5001), "9" * 5001),
    ],
    ids=["line ends of Unicode", "a number", "a date", "a long number"],
)
def test_json_is_read_as_it_is_written(tmp_path: Path, line: str, label: str) -> None:
    """Texts keep what they hold, numbers keep their digits, dates stay texts: as in CSV."""
    root = make(tmp_path, "a.mp4")
    (tmp_path / "list.jsonl").write_text(line + "\n")
    assert [found.label for found in list_annotated(root, f"{root}/list.jsonl", "table").videos] == [label]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"path": "a.mp4", "label": 1, "label": 2}', "line 1 is not JSON (a name is there twice: path, label, label)"),
        ('{"path": "a.mp4", "end_seconds": 1%s}' % ("0" * 400), "row 1: end_seconds '10000"),
        ('{"path": "a.mp4", "label": %s}' % ("[" * 20_000), "line 1 is not JSON (maximum recursion depth exceeded"),
        ('{"path": "a.mp4"}\n{"path": ', "line 2 is not JSON (Expecting value"),
    ],
    ids=["twice", "endless", "deep", "cut off"],
)
def test_json_that_says_nothing_is_refused(tmp_path: Path, line: str, said: str) -> None:
    """With the line, and without a traceback."""
    root = make(tmp_path, "a.mp4")
    (tmp_path / "list.jsonl").write_text(line)
    with pytest.raises(ValueError, match=re.escape(said)):
        list_annotated(root, f"{root}/list.jsonl", "table")


def test_no_file_stays_open(tmp_path: Path) -> None:
    """The temporary databases go with the list, without Python having to look for cycles."""
    root = make(tmp_path, "a.mp4", "B.mp4")
    (tmp_path / "list.txt").write_text("A.MP4 1\nb 2\n")
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            listing = list_annotated(root, f"{root}/list.txt", "filelist")
            assert len(listing.videos) == 2
        assert len(os.listdir("/proc/self/fd")) <= before
        assert not any(isinstance(each, ListedFiles) for each in gc.get_objects())
    finally:
        gc.enable()


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    """JSON can write what no text is; the row is named, not the line of our code that cannot store it."""
    root = make(tmp_path, "a.mp4")
    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4", "label": "\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"list.jsonl, row 1: label '\\ud83d' is no text"):
        list_annotated(root, f"{root}/list.jsonl", "table")
    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4"}\n[1]\n')
    with pytest.raises(ValueError, match=r"list.jsonl, line 2: '\[1\]' is no row"):
        list_annotated(root, f"{root}/list.jsonl", "table")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "mac"])
def test_line_ends(tmp_path: Path, end: str) -> None:
    """Lines end as on any system, also within a quoted label, which keeps them."""
    root = make(tmp_path / "in", "a.mp4", "b.mp4")
    (tmp_path / "list.txt").write_bytes(end.join(["file,label", 'a.mp4,"one', 'two"', "", "b.mp4,three", ""]).encode())
    listing = list_annotated(root, str(tmp_path / "list.txt"), "filelist")
    assert [(found.path, found.label) for found in listing.videos] == [("a.mp4", f"one{end}two"), ("b.mp4", "three")]
    (tmp_path / "list.txt").write_bytes(end.join(["a.mp4 1", "b.mp4 2"]).encode())
    listing = list_annotated(root, str(tmp_path / "list.txt"), "filelist")
    assert [(found.path, found.label) for found in listing.videos] == [("a.mp4", "1"), ("b.mp4", "2")]
