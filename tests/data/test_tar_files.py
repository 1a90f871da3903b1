"""Videos in tar files: found, read in place, and every fault of a tar file is a row."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from tests.data import videos
from tests.data.test_ingest_tasks import settings
from tests.dataset import stored_frames
from tests.names import names
from tests.store import BUCKET, Store
from vmoco import storage
from vmoco.data.annotations import list_annotated
from vmoco.data.decoder import Decoder
from vmoco.data.distribute import from_table, to_table
from vmoco.data.found import Found, Pictures, TarMember
from vmoco.data.ingest import list_inputs
from vmoco.data.ingest_plan import Probed, ProbeTask, ShardPlan, Unit, plan_shards
from vmoco.data.ingest_tasks import MadeShard, make_shard, probe_videos
from vmoco.data.listing import list_footage
from vmoco.data.manifest import shard_uri
from vmoco.data.ranged_file import RangedFile
from vmoco.data.source import Listing, fetched, file_sha256, list_videos
from vmoco.data.tar_files import list_tars
from vmoco.job_settings import IngestSettings

Entry = tuple[str, bytes] | tarfile.TarInfo


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_tar(path: Path, entries: Iterable[Entry], *, form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file with these files, links and devices, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
    return path


def contents(root: str, listing: Listing) -> dict[str, bytes]:
    """The bytes that a decoder reads of each video."""
    found = {}
    for video in listing.videos:
        with fetched(root, video) as place:
            if isinstance(place, str):
                found[video.video_id] = Path(place).read_bytes()
            else:
                found[video.video_id] = RangedFile.of(place).read()  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_where_they_are(tmp_path: Path, form: int) -> None:
    """Each video has its own bytes; other members are counted by ending; hidden ones are counted."""
    long = "run/" + "x" * 90 + ".mp4"
    entries: list[Entry] = [
        ("run/a.mp4", b"first"),
        ("b.txt", b"no video"),
        (long, b"l" * 3000),
        ("._c.mp4", b"hidden"),
    ]
    entries.append(("d.DAT", b"no film"))
    write_tar(tmp_path / "in/sub/x.tar", entries, form=form)
    listing = list_tars(str(tmp_path / "in"), ["sub/x.tar"])
    assert contents(str(tmp_path / "in"), listing) == {
        "sub/x.tar/run/a.mp4": b"first",
        f"sub/x.tar/{long}": b"l" * 3000,
    }
    assert [found.num_bytes for found in listing.videos] == [5, 3000]
    assert listing.others == {".txt": 1, ".dat": 1}
    assert (listing.num_hidden, listing.rejected) == (1, ())


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    """Links to members are these members; others, devices, names that lead out, and names that are no text are rows."""
    entries: list[Entry] = [
        ("a.mp4", b"old"),
        ("/abs/b.mp4", b"absolute"),
        ("../up.mp4", b"out"),
        ("x/../../up.mp4", b"out"),
        ("./x/a.mp4", b"in a folder"),
        ("bad\udcff.mp4", b"name"),
        link("hard.mp4", "x/a.mp4", tarfile.LNKTYPE),
        link("x/soft.mp4", "../a.mp4", tarfile.SYMTYPE),
        link("gone.mp4", "nothing.mp4", tarfile.SYMTYPE),
        link("loop1.mp4", "loop2.mp4", tarfile.SYMTYPE),
        link("loop2.mp4", "loop1.mp4", tarfile.SYMTYPE),
        link("pipe.mp4", "", tarfile.FIFOTYPE),
        ("a.mp4", b"new"),
    ]
    write_tar(tmp_path / "x.tar", entries, form=tarfile.GNU_FORMAT)
    listing = list_tars(str(tmp_path), ["x.tar"])
    assert contents(str(tmp_path), listing) == {
        "x.tar/a.mp4": b"new",
        "x.tar/abs/b.mp4": b"absolute",
        "x.tar/hard.mp4": b"in a folder",
        "x.tar/x/a.mp4": b"in a folder",
        "x.tar/x/soft.mp4": b"new",
    }
    assert sorted((row.video_id, row.reason) for row in listing.rejected) == [
        ("x.tar/../up.mp4", "name-not-a-path"),
        ("x.tar/bad\\xff.mp4", "name-not-utf8"),
        ("x.tar/gone.mp4", "dangling-link"),
        ("x.tar/loop1.mp4", "dangling-link"),
        ("x.tar/loop2.mp4", "dangling-link"),
        ("x.tar/pipe.mp4", "not-a-file"),
        ("x.tar/x/../../up.mp4", "name-not-a-path"),
    ]
    assert listing.notes == (
        "1 names occur again in their tar file: the last one counts, as when it is unpacked",
        "1 names in tar files begin with /, which is left out, as when they are unpacked",
    )


def test_a_tar_file_that_is_cut_off_gives_what_is_there(tmp_path: Path) -> None:
    """Wherever it ends: the members before that, the beginning of the one that is cut, and a row unless it is whole."""
    files = [(f"{number}.mp4", bytes([number]) * (700 * number)) for number in range(4)]
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    path = tmp_path / "x.tar"
    ends = {}
    for size in range(1, len(whole), 97):
        path.write_bytes(whole[:size])
        listing = list_tars(str(tmp_path), ["x.tar"])
        found = contents(str(tmp_path), dataclass_without_empty(listing))
        for name, content in files:
            assert content.startswith(found.get(f"x.tar/{name}", b""))
        ends[size] = [row.reason for row in listing.rejected]
        complete = sum(found.get(f"x.tar/{name}") == content for name, content in files[1:])
        assert ends[size] in (["truncated-tar"], ["damaged-tar"], [])
        assert ends[size] or complete == 3, size
    assert [] in ends.values()  # only the zeros at the end are missing
    path.write_bytes(whole)
    assert list_tars(str(tmp_path), ["x.tar"]).rejected == ()


def dataclass_without_empty(listing: Listing) -> Listing:
    """Without videos of no bytes, which have a row of their own when they are read."""
    import dataclasses

    return dataclasses.replace(listing, videos=tuple(found for found in listing.videos if found.num_bytes))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    flips=strategies.lists(strategies.tuples(strategies.integers(0, 6000), strategies.integers(1, 255)), max_size=6),
    form=strategies.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_a_damaged_tar_file_never_ends_the_job(flips: list[tuple[int, int]], form: int) -> None:
    """Whatever bytes are changed, listing ends, and what it finds lies inside the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(
            Path(folder) / "x.tar", [("a.mp4", b"x" * 900), ("é" * 120 + ".mp4", b"y"), ("c.cls", b"1")], form=form
        )
        content = bytearray(path.read_bytes())
        for at, value in flips:
            content[at % len(content)] ^= value
        path.write_bytes(content)
        listing = list_tars(folder, ["x.tar"])
        for found in listing.videos:
            assert found.member is not None
            assert 0 <= found.member.offset <= found.member.offset + found.num_bytes <= max(len(content), 900)
            if found.num_bytes:
                assert len(contents(folder, Listing((found,), (), 0))[found.video_id]) == found.num_bytes


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(found=strategies.lists(names(suffix=".mp4"), min_size=1, max_size=5, unique=True))
def test_any_name_in_a_tar_file(found: list[str]) -> None:
    """Whatever characters a member's name has: it is listed under that name, and its own content is read."""
    with tempfile.TemporaryDirectory() as folder:
        write_tar(Path(folder) / "x.tar", [(name, name.encode()) for name in found])
        listing = list_tars(folder, ["x.tar"])
        assert contents(folder, listing) == {f"x.tar/{name}": name.encode() for name in found}


def test_compressed_and_other_files_are_named(tmp_path: Path) -> None:
    """A compressed tar file, also under the name of a plain one, and a file that is no tar file: what to do is said."""
    plain = write_tar(tmp_path / "a.tar", [("a.mp4", b"x")])
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.tar").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "d.tar").write_bytes(b"text" * 500)
    (tmp_path / "e.tar").write_bytes(b"")
    listing = list_footage(str(tmp_path))
    assert [found.video_id for found in listing.videos] == ["a.tar/a.mp4"]
    rows = {row.video_id: (row.reason, row.message) for row in listing.rejected}
    assert {name: reason for name, (reason, _) in rows.items()} == {
        "b.tar.gz": "compressed-tar",
        "c.tar": "compressed-tar",
        "d.tar": "damaged-tar",
        "e.tar": "damaged-tar",
    }
    assert "uncompress it once, for example with gunzip, and give the .tar file" in rows["b.tar.gz"][1]
    for name in ("b.tar.gz", "c.tar", "d.tar", "e.tar"):
        with pytest.raises(ValueError, match=rf"{name}.* (gunzip|header at byte 0)"):
            list_footage(str(tmp_path / name))


def test_labels_beside_the_videos(tmp_path: Path) -> None:
    """As in WebDataset: text in .cls, and a field of .json; anything else in them is no label."""
    entries = [
        ("0.mp4", b"a"),
        ("0.cls", b"run\n"),
        ("0.json", b'{"label": "other"}'),
        ("x/1.json", b'{"caption": "x", "cls": 7}'),
        ("x/1.mp4", b"b"),
        ("x/2.json", b'{"label": ["a"]}'),
        ("x/2.mp4", b"c"),
        ("3.json", b"no json"),
        ("3.mp4", b"d"),
    ]
    write_tar(tmp_path / "x.tar", entries)
    videos = list_tars(str(tmp_path), ["x.tar"]).videos
    assert {found.path: found.label for found in videos} == {
        "x.tar/0.mp4": "run",
        "x.tar/3.mp4": None,
        "x.tar/x/1.mp4": "7",
        "x.tar/x/2.mp4": None,
    }


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


def made(chosen: IngestSettings, decoder: Decoder, **changes: Any) -> tuple[list[Probed], MadeShard]:
    """The videos that the settings name, looked at and cut into one shard."""
    root, listing = list_inputs(chosen)
    probed = probe_videos(ProbeTask(listing.videos), root=root, output=chosen.output, settings=chosen, decoder=decoder)
    (plan,) = plan_shards([each for each in probed if not each.rejection], chosen)
    return probed, make_shard(plan, root=root, output=chosen.output, settings=chosen, decoder=decoder)


def pixels(chosen: IngestSettings, shard: MadeShard) -> dict[tuple[str, float], bytes]:
    """The frames of each clip, by the name of the video and the second."""
    clips = stored_frames(shard_uri(chosen.output, shard.name))
    return {
        (row["video_id"].rpartition("/")[2], row["start_seconds"]): clip.tobytes()
        for row, clip in zip(shard.rows, clips, strict=True)
    }


@pytest.mark.parametrize("place", ["local", "store"])
def test_clips_are_those_of_the_unpacked_videos(tmp_path: Path, store: Store, decoder: Decoder, place: str) -> None:
    """From a tar file on disk and in a store: the clips, hashes and notes of the same files in a folder."""
    files = [
        videos.write_video(tmp_path / "in/a.mp4", videos.images(30)),
        videos.write_video(tmp_path / "in/b.mkv", videos.images(40), codec="mpeg4"),
        videos.write_video(tmp_path / "in/c.h264", videos.images(20)),
        videos.truncate(videos.write_video(tmp_path / "in/d.ts", videos.images(60)), 0.6),
    ]
    tar = write_tar(tmp_path / "tars/x.tar", [(f"run/{path.name}", path.read_bytes()) for path in files])
    root = str(tar.parent)
    if place == "store":
        root = f"s3://{BUCKET}/tars"
        storage.write_atomic(f"{root}/x.tar", tar.read_bytes())
    plain = settings(tmp_path, output=str(tmp_path / "plain"))
    packed = settings(tmp_path, videos=f"{root}/x.tar", output=str(tmp_path / "packed"))
    (before, unpacked), (after, from_tar) = made(plain, decoder), made(packed, decoder)
    assert [each.sha256 for each in after] == [each.sha256 for each in before]
    assert [each.notes for each in after] == [each.notes for each in before]
    assert pixels(packed, from_tar) == pixels(plain, unpacked)
    assert len({row["video_id"] for row in from_tar.rows}) == 4
    assert from_tar.rows[0]["video_id"] == "x.tar/run/a.mp4"
    assert not list(Path(tempfile.gettempdir()).glob("vmoco-video-*"))


def test_parts_of_a_long_video_are_read_from_the_tar_file(tmp_path: Path, decoder: Decoder) -> None:
    """A long video in a tar file is cut in parts, to the clips of the file."""
    path = videos.write_video(tmp_path / "in/a.mp4", videos.images(120), options={"g": "10", "keyint_min": "10"})
    write_tar(tmp_path / "tars/x.tar", [("0.txt", b"before"), ("a.mp4", path.read_bytes())])
    plain = settings(tmp_path, part_seconds=1, output=str(tmp_path / "plain"))
    packed = settings(tmp_path, part_seconds=1, videos=str(tmp_path / "tars"), output=str(tmp_path / "packed"))
    probed, shard = made(packed, decoder)
    assert len(probed[0].parts) == 2
    assert pixels(packed, shard) == pixels(plain, made(plain, decoder)[1])


def test_lists_find_members_by_their_path_or_name(tmp_path: Path) -> None:
    """Kinetics, ssv2, UCF101 and filelists name videos as they were before they were packed."""
    root = tmp_path / "in"
    write_tar(
        root / "part_0.tar", [("abcdefghijk_000001_000011.mp4", b"a"), ("./k/ABCDEFGHIJK_000002_000012.mp4", b"b")]
    )
    write_tar(
        root / "part_1.tar", [("UCF-101/Archery/v_Archery_g01_c01.avi", b"c"), ("74225.webm", b"d"), ("x y.mp4", b"e")]
    )
    lists = tmp_path / "lists"
    (lists / "ucf").mkdir(parents=True)
    (lists / "kinetics.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nrun,abcdefghijk,1,11,train\njump,ABCDEFGHIJK,2,12,train\n"
        "swim,notthere012,2,12,train\n"
    )
    (lists / "ssv2-train.json").write_text('[{"id": "74225", "template": "Holding [something]"}]')
    (lists / "ucf/trainlist01.txt").write_text("Archery/v_Archery_g01_c01.avi 1\n")
    (lists / "list.txt").write_text("x y.mp4 3\nv_Archery_g01_c01 4\nsome/where/74225.webm 5\nother/x y.mp4 6\n")
    cases = {
        "kinetics.csv": {
            "part_0.tar/abcdefghijk_000001_000011.mp4": "run",
            "part_0.tar/k/ABCDEFGHIJK_000002_000012.mp4": "jump",
        },
        "ssv2-train.json": {"part_1.tar/74225.webm": "Holding something"},
        "ucf": {"part_1.tar/UCF-101/Archery/v_Archery_g01_c01.avi": "Archery"},
    }
    for name, expected in cases.items():
        listing = list_annotated(str(root), str(lists / name), "auto")
        assert {found.path: found.label for found in listing.videos} == expected, name
        assert all(found.member for found in listing.videos)
        assert listing.notes[0] == f"{root} is read as --layout tar: 2 tar files with 5 videos"
    (lists / "list.txt").write_text(
        "x y.mp4 3\nv_Archery_g01_c01 4\nsome/where/74225.webm 5\nother/v_Archery_g01_c01.avi 6\n"
    )
    listing = list_annotated(str(root / "part_1.tar"), str(lists / "list.txt"), "auto")
    assert {found.path: found.label for found in listing.videos} == {
        "part_1.tar/74225.webm": "5",
        "part_1.tar/UCF-101/Archery/v_Archery_g01_c01.avi": "4",
        "part_1.tar/x y.mp4": "3",
    }
    # Folders that contradict each other are two videos.
    assert [row.video_id for row in listing.rejected] == ["other/v_Archery_g01_c01.avi"]


def test_one_name_in_two_tar_files_is_ambiguous(tmp_path: Path) -> None:
    """A list that means one of several members by its name alone gets a row that says so."""
    for part in (0, 1):
        write_tar(tmp_path / f"{part}.tar", [("000.mp4", bytes([part])), (f"{part}.mp4", b"x")])
    (tmp_path / "list.txt").write_text("000.mp4 a\n0.mp4 b\n1.tar/000.mp4 c\n")
    listing = list_annotated(str(tmp_path), str(tmp_path / "list.txt"), "filelist")
    assert [(found.path, found.label) for found in listing.videos] == [("0.tar/0.mp4", "b"), ("1.tar/000.mp4", "c")]
    assert [(row.video_id, row.reason) for row in listing.rejected] == [("000.mp4", "ambiguous")]


def test_an_entry_stays_when_the_tar_file_is_packed_again(tmp_path: Path) -> None:
    """The same member at another byte is the same video, so a rerun reads it no more; of another size it is not."""
    entries = []
    for before, content in ((b"", b"content"), (b"x" * 4000, b"content"), (b"", b"longer content")):
        write_tar(tmp_path / "x.tar", [("0.txt", before), ("a.mp4", content)])
        (found,) = list_tars(str(tmp_path), ["x.tar"]).videos
        entries.append(found.entry)
    assert entries[0] == entries[1] != entries[2]


def test_a_tar_file_that_shrinks_after_listing_is_a_row(tmp_path: Path) -> None:
    """It is told as a change, and not as damage of the video."""
    write_tar(tmp_path / "x.tar", [("a.mp4", b"x" * 9000)])
    (found,) = list_tars(str(tmp_path), ["x.tar"]).videos
    (tmp_path / "x.tar").write_bytes(b"short")
    with pytest.raises(Exception, match=r"changed: it ended at byte \d+ of its tar file, which has 5 bytes now"):
        contents(str(tmp_path), Listing((found,), (), 0))


def test_a_range_has_the_hash_of_the_file(tmp_path: Path) -> None:
    """Of several pieces too."""
    content = bytes(range(256)) * 40_000
    (tmp_path / "a").write_bytes(content)
    write_tar(tmp_path / "x.tar", [("a.mp4", content)])
    (found,) = list_tars(str(tmp_path), ["x.tar"]).videos
    with fetched(str(tmp_path), found) as place:
        assert file_sha256(place) == file_sha256(str(tmp_path / "a"))  # type: ignore[arg-type]


def test_tar_files_beside_videos_stay_left_out(tmp_path: Path) -> None:
    """A folder with video files is read as before, and says that --layout tar takes the others."""
    write_tar(tmp_path / "x.tar", [("b.mp4", b"b")])
    (tmp_path / "a.mp4").write_bytes(b"a")
    assert list_footage(str(tmp_path)).videos == list_videos(str(tmp_path)).videos
    assert [found.video_id for found in list_footage(str(tmp_path), "tar").videos] == ["x.tar/b.mp4"]


def test_places_go_to_the_tasks_and_back() -> None:
    """Ray's tables keep the place in a tar file, the pictures of a folder, and neither."""
    videos = (
        Found("x.tar/a.mp4", 5, member=TarMember("x.tar", 512)),
        Found("run/clip", 9, label="run", pictures=Pictures(29.97, "img_", "png")),
        Found("b.mp4", 7),
    )
    assert from_table(to_table([ProbeTask(videos)], ProbeTask), ProbeTask) == [ProbeTask(videos)]
    plan = ShardPlan("name", tuple(Unit(found, "hash") for found in videos))
    assert from_table(to_table([plan], ShardPlan), ShardPlan) == [plan]
    assert len({found.entry for found in videos}) == 3
