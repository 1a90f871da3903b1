"""Text lists in the forms in which other projects write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.test_annotations import make
from vmoco.data.annotations import list_annotated
from vmoco.data.filelist import read_filelist
from vmoco.data.found import Found
from vmoco.data.list_text import ListFile
from vmoco.data.listed_files import ListedFiles
from vmoco.data.source import Listing

Entry = tuple[str, float | None, float | None, str | None]


def listed(folder: Path, text: str | bytes, *names: str, name: str = "train.csv") -> Listing:
    root = make(folder / "in", *names)
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return list_annotated(root, str(folder / name), "auto")


def entries(listing: Listing) -> list[Entry]:
    return [(found.path, found.start_seconds, found.end_seconds, found.label) for found in listing.videos]


A, B = "dataset_root/video_1.mp4", "dataset_root/video_2.mp4"
FORMS = {
    "SlowFast, mae_st": (f"{A} 0\n{B} 399\n", [(A, None, None, "0"), (B, None, None, "399")]),
    "VideoMAE": (f"{A}  label_1\n{B}  label_2\n", [(A, None, None, "label_1"), (B, None, None, "label_2")]),
    "UniFormer": (f"{A},0\n{B},1\n", [(A, None, None, "0"), (B, None, None, "1")]),
    "tabs": (f"{A}\tair drumming\n{B}\tzumba\n", [(A, None, None, "air drumming"), (B, None, None, "zumba")]),
    "labels with spaces": (
        f"{A} air drumming\n{B} zumba\n",
        [(A, None, None, "air drumming"), (B, None, None, "zumba")],
    ),
    "paths": (f"{A}\r\n\r\n{B}\r\n", [(A, None, None, None), (B, None, None, None)]),
    "without ending": ("dataset_root/video_1 0\ndataset_root/video_2 1", [(A, None, None, "0"), (B, None, None, "1")]),
    "ranges": (
        f"{A} 0.5 9 run\n{A} 9 -1 run\n{B} 0 -1 sit\n",
        [(A, 0.5, 9.0, "run"), (A, 9.0, None, "run"), (B, None, None, "sit")],
    ),
    "ranges, commas": (f"{A}, 1, 2, a b\n{B}, 3, 4, c\n", [(A, 1.0, 2.0, "a b"), (B, 3.0, 4.0, "c")]),
    "header": (f"video_path;class\n{A};7\n{B};8\n", [(A, None, None, "7"), (B, None, None, "8")]),
    "header, other order": (f"label,start,end,file\n7,1,2,{A}\n8,,,{B}\n", [(A, 1.0, 2.0, "7"), (B, None, None, "8")]),
    "header, spaces": (f"file label\n{A} 7\n{B} 8\n", [(A, None, None, "7"), (B, None, None, "8")]),
    "quoted": (f'"{A}","a, b"\n"{B}","c"\n', [(A, None, None, "a, b"), (B, None, None, "c")]),
}


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_other_projects(tmp_path: Path, form: str, suffix: str) -> None:
    """With spaces, tabs and commas, with and without header and ending; the form is recognised and named."""
    text, expected = FORMS[form]
    listing = listed(tmp_path, text, A, B, "not listed.mp4", name=f"list{suffix}")
    assert entries(listing) == expected
    assert listing.notes[0].endswith(f"list{suffix} is read as --layout filelist")
    assert "its lines are read as" in listing.notes[1]


def test_absolute_paths_below_the_folder(tmp_path: Path) -> None:
    """As SlowFast's lists have them; one that lies elsewhere is refused."""
    root = tmp_path / "in"
    listing = listed(tmp_path, f"{root}/{A} 0\nfile://{root}/{B} 1\n./{A} 0\n", A, B)
    assert entries(listing) == [(A, None, None, "0"), (B, None, None, "1")]
    assert "1 entries are repeated, and count once" in listing.notes
    with pytest.raises(ValueError, match=r"train.csv, line 2: path '/elsewhere/b.mp4' leaves the folder of the videos"):
        listed(tmp_path, f"{A} 0\n/elsewhere/b.mp4 1\n", A)


def test_names_that_begin_with_a_dash_and_hold_separators(tmp_path: Path) -> None:
    """YouTube ids begin with a dash; spaces and commas in a name are told from separators by the files."""
    names = ["-3B32lodo2M.mp4", "a, b.mp4", "c d 1.mp4", "e.mp4 5.mp4"]
    expected = [(name, None, None, "3") for name in sorted(names)]
    for separator in (" ", ",", "\t", ", "):
        text = "".join(f"{name}{separator}3\n" for name in names)
        assert entries(listed(tmp_path, text, *names)) == expected
    assert entries(listed(tmp_path, "\n".join(names), *names)) == [(name, None, None, None) for name in sorted(names)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_of_spreadsheets(tmp_path: Path, encoding: str) -> None:
    """A byte order mark is not part of the first name."""
    assert entries(listed(tmp_path, "ü.mp4 0\n".encode(encoding), "ü.mp4")) == [("ü.mp4", None, None, "0")]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Bytes that are no text, a line of another form, nothing that is there, and what can be read in two ways."""
    with pytest.raises(ValueError, match=r"train.csv is not UTF-8 text \(invalid start byte at byte 5 of line 1\)"):
        listed(tmp_path, b"a.mp4\xff", A)
    with pytest.raises(
        ValueError, match=r"line 3: 'alone.mp4' is not `path label` separated by spaces, as other lines"
    ):
        listed(tmp_path, f"{A} 0\n{B} 1\nalone.mp4\n", A, B)
    with pytest.raises(
        ValueError, match=r"none of the 1 videos .*Its first line is 'x y z'; allowed are `path`, `path"
    ):
        listed(tmp_path, "x y z\n", A)
    with pytest.raises(
        ValueError, match=r"can be read as `path` and as `path label` separated by spaces, and both name 1"
    ):
        listed(tmp_path, "run 1\n", "run 1.mp4", "run.mp4")
    with pytest.raises(ValueError, match=r"names 'dataset_root/video_1.mp4' 2 times"):
        listed(tmp_path, f"{A} 0\n{A} 1\n", A)
    for empty in ("", "\n\n", "path,label\n"):
        with pytest.raises(ValueError, match=r"list .* has no rows"):
            list_annotated(str(tmp_path / "in"), _write(tmp_path / "empty.txt", empty), "filelist")


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_list_may_stand_where_the_folder_does(tmp_path: Path) -> None:
    """Then its paths count from its own folder."""
    from vmoco.data.ingest import list_inputs
    from vmoco.job_settings import IngestSettings

    root = make(tmp_path, A)
    list_inputs(IngestSettings(videos=_write(tmp_path / "train.txt", f"{A} 0\n"), output="x"))
    found_root, listing = list_inputs(IngestSettings(videos=f"{root}/train.txt", output="x"))
    assert (found_root, entries(listing)) == (root, [(A, None, None, "0")])


WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"], exclude_characters='/"'), min_size=1
)
NAMES = st.lists(
    st.lists(WORDS, min_size=1, max_size=3).map(lambda words: " ".join(words) + ".mp4"),
    min_size=2,
    max_size=6,
    unique_by=lambda name: name.casefold(),
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES, separator=st.sampled_from([" ", "\t", ",", ", ", "  "]), ranged=st.booleans())
def test_any_names_with_any_separator(tmp_path: Path, names: list[str], separator: str, ranged: bool) -> None:
    """Whatever letters, signs and spaces names have: path, range and label come back as they were written."""
    rows = [
        (name, *((str(place), str(place + 2.5)) if ranged else ()), f"class{place}") for place, name in enumerate(names)
    ]
    (tmp_path / "list.txt").write_text("".join(separator.join(row) + "\n" for row in rows))
    found, _ = read_filelist(
        ListFile(str(tmp_path / "list.txt")), ListedFiles("/videos", [Found(name, 9) for name in names])
    )
    read = [
        (each.path, *((f"{each.start_seconds:g}", f"{each.end_seconds:g}") if ranged else ()), each.label)
        for each in found
    ]
    assert read == rows
