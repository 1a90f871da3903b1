"""The official lists of Kinetics, Something-Something v2, UCF101 and HMDB51, as they are shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.test_annotations import make, size
from vmoco.data.annotations import list_annotated
from vmoco.data.found import Found
from vmoco.data.source import Listing


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
    trimmed_id, part = "0347ZoDXyP0_000095_000105", ("validate", None, None)
    assert listing.videos == (
        Found("-3B32lodo2M_000059_000069", size(whole), whole, 59.0, 69.0, "air drumming", part, source="-3B32lodo2M"),
        Found(
            trimmed_id, size(trimmed), trimmed, label="abseiling", splits=("train", None, None), source=trimmed_id[:11]
        ),
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


APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \xff\xfe"


@pytest.mark.parametrize("layout", ["ucf101", "hmdb51"])
def test_files_whose_names_do_not_matter_are_not_read(tmp_path: Path, layout: str) -> None:
    """An archive made on a Mac has `._trainlist01.txt` beside the lists, which is no text."""
    root = make(tmp_path / "in", "Archery/a.avi")
    lists = tmp_path / "lists"
    (lists / "__MACOSX").mkdir(parents=True)
    name = {"ucf101": "trainlist01.txt", "hmdb51": "Archery_test_split1.txt"}[layout]
    (lists / name).write_text({"ucf101": "Archery/a.avi 1\n", "hmdb51": "a.avi 1\n"}[layout])
    for other in (f"._{name}", f"__MACOSX/._{name}", "readme.txt", "._classInd.txt"):
        (lists / other).write_bytes(APPLE_DOUBLE)
    for given in (layout, "auto"):
        assert splits(list_annotated(root, str(lists), given)) == {"Archery/a.avi": ("Archery", "train", None, None)}  # type: ignore[arg-type]
    (lists / name).write_bytes(APPLE_DOUBLE)
    with pytest.raises(ValueError, match=rf"list .*{name} is not UTF-8 text"):
        list_annotated(root, str(lists), layout)  # type: ignore[arg-type]


def test_ucf101_names_that_differ_in_case(tmp_path: Path) -> None:
    """The lists say HandstandPushups, and some copies have the folder HandStandPushups."""
    name = "HandStandPushups/v_HandStandPushups_g01_c01.avi"
    root = make(tmp_path / "in", name)
    (tmp_path / "testlist01.txt").write_text("HandstandPushups/v_HandStandPushups_g01_c01.avi\n")
    listing = list_annotated(root, str(tmp_path), "ucf101")
    assert [found.path for found in listing.videos] == [name]
    assert listing.notes[0].startswith("1 names differ from their files in case or Unicode form, such as 'Handstand")


KINETICS = {
    "train.csv": "label,youtube_id,time_start,time_end,split,is_cc\nair drumming,-3B32lodo2M,59,69,train,0\n",
    "quoted.csv": '"label","youtube_id","time_start","time_end"\n"air drumming","-3B32lodo2M","59","69"',
    "train.txt": "label\tyoutube_id\ttime_start\ttime_end\tsplit\nair drumming\t-3B32lodo2M\t59\t69\ttrain\n",
    "no header.txt": "air drumming,-3B32lodo2M,59,69,train\n",
    "spaces.txt": "air_drumming -3B32lodo2M 59 69 train\n",
    "test.csv": "youtube_id,time_start,time_end,split\n-3B32lodo2M,59,69,test\n",
    "test no header.txt": "-3B32lodo2M,59.0,69.0,test\n",
}


@pytest.mark.parametrize("name", KINETICS)
@pytest.mark.parametrize("trimmed", [True, False])
def test_kinetics_lists_of_all_years(tmp_path: Path, name: str, trimmed: bool) -> None:
    """CSV and text, with and without header and label, are recognised; the source is the YouTube video."""
    file = f"val/{'-3B32lodo2M_000059_000069' if trimmed else '-3B32lodo2M'}.mp4"
    root = make(tmp_path / "in", file)
    (tmp_path / name).write_text(KINETICS[name])
    listing = list_annotated(root, str(tmp_path / name), "auto")
    (found,) = listing.videos
    assert listing.notes[0].endswith(f"{name} is read as --layout kinetics")
    assert (found.video_id, found.path, found.source) == ("-3B32lodo2M_000059_000069", file, "-3B32lodo2M")
    assert (found.label or "none").replace("_", " ") == ("none" if "test" in name else "air drumming")
    assert found.splits[0] == ("test" if "test" in name else None if "quoted" in name else "train")
    assert found.range == (None if trimmed else "59-69")


def test_ids_of_kinetics_are_taken_exactly(tmp_path: Path) -> None:
    """Two YouTube ids may differ in case alone: the other video is not this one."""
    root = make(tmp_path / "in", "abcdefghijk.mp4")
    (tmp_path / "l.csv").write_text("label,youtube_id,time_start,time_end\nx,abcdefghijk,0,10\nx,Abcdefghijk,0,10\n")
    listing = list_annotated(root, str(tmp_path / "l.csv"), "kinetics")
    assert [found.source for found in listing.videos] == ["abcdefghijk"]
    assert [row.video_id for row in listing.rejected] == ["Abcdefghijk_000000_000010"]


def ssv2_lists(folder: Path, prefix: str = "something-something-v2-") -> str:
    folder.mkdir()
    holding, putting = "Holding [something] next to [something]", "Putting [something] into [something]"
    train = [{"id": "78687", "label": "holding potato next to bottle", "template": holding, "placeholders": ["potato"]}]
    validation = [
        {"id": "74225", "label": "putting box into box", "template": putting},
        {"id": "9", "template": putting},
    ]
    labels = {text.replace("[", "").replace("]", ""): str(number) for number, text in enumerate((holding, putting))}
    for name, content in {"train": train, "validation": validation, "test": [{"id": "1420"}], "labels": labels}.items():
        (folder / f"{prefix}{name}.json").write_text(json.dumps(content))
    (folder / f"._{prefix}train.json").write_bytes(APPLE_DOUBLE)
    return str(folder)


@pytest.mark.parametrize("prefix", ["something-something-v2-", ""])
def test_ssv2(tmp_path: Path, prefix: str) -> None:
    """All lists of the folder, or one of them; the label is the template, the split is in the name of the file."""
    root = make(tmp_path / "in", "78687.webm", "videos/74225.webm", "1420.mp4")
    lists = ssv2_lists(tmp_path / "lists", prefix)
    listing = list_annotated(root, lists, "auto")
    assert splits(listing) == {
        "78687.webm": ("Holding something next to something", "train", None, None),
        "videos/74225.webm": ("Putting something into something", "validate", None, None),
        "1420.mp4": (None, "test", None, None),
    }
    assert [(row.video_id, row.reason) for row in listing.rejected] == [("9.webm", "missing")]
    one = list_annotated(root, f"{lists}/{prefix}train.json", "auto")
    assert list(splits(one)) == ["78687.webm"]


def test_ssv2_lists_that_are_refused(tmp_path: Path) -> None:
    """A label that the labels file does not have, an entry without id, and a file that is no list."""
    root, lists = make(tmp_path / "in", "1.webm"), Path(ssv2_lists(tmp_path / "lists", ""))
    for content, said in (
        (
            [{"id": "1", "template": "Eating [something]"}],
            r"train.json, entry 1 has the label 'Eating something', which",
        ),
        ([{"template": "x"}], r"train.json, entry 1 has no id"),
        ({"a": 1}, r"no list of ssv2 in .*train.json"),
        (3, r"train.json is neither a list nor a table of labels"),
    ):
        (lists / "train.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=said):
            list_annotated(root, str(lists / "train.json"), "ssv2")
    (lists / "train.json").write_text("{")
    with pytest.raises(ValueError, match=r"train.json is not JSON"):
        list_annotated(root, str(lists / "train.json"), "ssv2")


def test_half_a_character_in_ssv2_is_refused(tmp_path: Path) -> None:
    """JSON can write what no text is; the entry is named."""
    for entry in ({"id": "1", "template": "Holding \ud83d"}, {"id": "\ud83d"}):
        (tmp_path / "1.webm").write_bytes(b"x")
        (tmp_path / "train.json").write_text(json.dumps([{"id": "1"}, entry]))
        with pytest.raises(ValueError, match=r"train.json, entry 2: (id|template) '.*ud83d' is no text"):
            list_annotated(str(tmp_path), str(tmp_path / "train.json"), "ssv2")
