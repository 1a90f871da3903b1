"""What one task of ingest does, without Ray."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from tests.data import videos
from tests.data.test_ledger import STRANGE as UNUSUAL
from tests.dataset import stored_frames
from tests.decoding import InProcess
from tests.names import FOLDER, names
from vmoco.data import ledger, source
from vmoco.data.annotations import list_annotated
from vmoco.data.decoder import Contents, Decoder, StoredClips
from vmoco.data.distribute import from_table, to_table
from vmoco.data.found import Found
from vmoco.data.held_out import is_held_out
from vmoco.data.ingest_plan import Probed, ProbeTask, ShardPlan, plan_shards
from vmoco.data.ingest_tasks import MadeShard, make_shard, probe_videos
from vmoco.data.ledger import ScratchError, VideoError
from vmoco.data.manifest import shard_uri
from vmoco.data.ranged_file import FileRange, RangedFile
from vmoco.data.shard import read_rows
from vmoco.data.source import list_videos
from vmoco.job_settings import IngestSettings


def settings(root: Path, **changes: Any) -> IngestSettings:
    values: dict[str, Any] = {
        "num_frames": 4,
        "height": 24,
        "width": 32,
        "max_clips_per_video": 3,
        "part_seconds": 600,
        "held_out_percent": 0,
    }
    return IngestSettings(**{"videos": str(root / "in"), "output": str(root / "out"), **values, **changes})


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


def probed(chosen: IngestSettings, decoder: Decoder) -> list[Probed]:
    """All videos, looked at."""
    found = list(list_videos(chosen.videos).videos)
    return probe_videos(
        ProbeTask(tuple(found)), root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder
    )


def make(chosen: IngestSettings, decoder: Decoder) -> MadeShard:
    """All videos in one shard, those that are none too."""
    good = [Probed(found, "hash") for found in list_videos(chosen.videos).videos]
    (plan,) = plan_shards(good, chosen)
    return make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    videos.write_video(tmp_path / "in/a.mp4", videos.images(30))
    videos.truncate(videos.write_video(tmp_path / "in/b.mp4", videos.images(30)), 0.5)
    videos.write_video(tmp_path / "in/c.avi", videos.images(12), codec="mpeg4")
    return tmp_path


def test_a_shard_holds_the_clips_and_accounts_for_all_videos(root: Path, decoder: Decoder) -> None:
    """Clips are in the order of the videos, each with the right frames; the broken video is in the metadata."""
    made = make(settings(root, stride=2), decoder)
    assert [(row["video_id"], row["row"]) for row in made.rows] == [("a.mp4", i) for i in range(3)] + [("c.avi", 3)]
    assert [(row.video_id, row.reason) for row in made.rejected] == [("b.mp4", "cannot-open")]
    assert len({row["clip_id"] for row in made.rows}) == 4
    uri = shard_uri(str(root / "out"), made.name)
    assert [found.video_id for found in read_rows(uri).metadata.videos] == ["a.mp4", "b.mp4", "c.avi"]
    numbers = [[videos.number_of(frame) for frame in clip] for clip in stored_frames(uri)]
    assert numbers == [[start + 2 * place for place in range(4)] for start in (1, 11, 21, 2)]
    assert made.rows[0]["fps"] == pytest.approx(12.5)


def test_a_shard_that_is_there_is_reused(root: Path, monkeypatch: pytest.MonkeyPatch, decoder: Decoder) -> None:
    """A second call decodes nothing and returns the same rows; a damaged shard is made again."""
    first = make(settings(root), decoder)
    path = Path(shard_uri(str(root / "out"), first.name))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[first.rows[1]["offset"] + 7] ^= 1
    for damaged in (whole[:-3], bytes(flipped)):
        path.write_bytes(damaged)
        assert make(settings(root), decoder) == first
        assert path.read_bytes() == whole
    monkeypatch.setattr(decoder, "cut", None)
    assert make(settings(root), decoder) == dataclasses.replace(first, reused=True)


def test_what_is_unusual_is_noted(root: Path, decoder: Decoder) -> None:
    """What probing found and what was done to the pixels stands in each row of the video, also where it is reused."""
    videos.write_video(root / "in/mirrored.mkv", videos.images(40), flips=(True, False))
    content = bytearray((root / "in/mirrored.mkv").read_bytes())
    at = content.index(b"\x44\x89\x88") + 3  # the length in the header
    content[at : at + 8] = b"\x41\x4b" + bytes(6)  # 3.5e6
    (root / "in/mirrored.mkv").write_bytes(content)
    (root / "in/b.mp4").unlink()
    chosen = settings(root)
    (plan,) = plan_shards(probed(chosen, decoder), chosen)
    made, again = (
        make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder) for _ in range(2)
    )
    notes = {row["video_id"]: row["notes"] for row in made.rows}
    says = "header-says-more: it ends at 1.60 s, and the header promises 3538.94 s"
    assert notes.pop("mirrored.mkv") == f"{says}; mirrored: its display matrix mirrors the picture"
    assert set(notes.values()) == {None}
    assert again.reused
    assert again.rows == made.rows


def hurry(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    """From now on every video takes too long."""

    def late(*_: Any, **__: Any) -> None:
        raise VideoError("decode", "timeout", "not done", transient=True)

    monkeypatch.setattr(decoder, action, late)


def test_a_video_that_claims_to_last_for_years_is_decoded(root: Path, decoder: Decoder) -> None:
    """The time limit grows with the length that time stamps give, and stays one that the system allows."""
    chosen = settings(root)
    good = [Probed(found, "hash", duration=1e9) for found in list_videos(chosen.videos).videos]
    (plan,) = plan_shards(good, chosen)
    made = make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)
    assert {row["video_id"] for row in made.rows} == {"a.mp4", "c.avi"}


def test_what_was_transient_is_tried_again(root: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard with a video that ran out of time is made anew, and then equals one that never had the trouble."""
    with monkeypatch.context() as patch:
        hurry(decoder, patch, "cut")
        hurried = make(settings(root), decoder)
    assert {row.reason for row in hurried.rejected} == {"timeout"}
    assert hurried.rows == []
    made = make(settings(root), decoder)
    assert made.name == hurried.name
    assert len(made.rows) == 6
    elsewhere = make(settings(root, output=str(root / "undisturbed")), decoder)
    left, right = (Path(shard_uri(str(root / name), made.name)) for name in ("out", "undisturbed"))
    assert left.read_bytes() == right.read_bytes()
    assert made == elsewhere


def test_a_file_that_vanished_is_transient(root: Path, decoder: Decoder) -> None:
    """A video removed between listing and reading is in the ledger, to be tried again."""
    chosen = settings(root)
    (plan,) = plan_shards([Probed(Found("gone.mp4", 5))], chosen)
    made = make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)
    assert [(row.reason, row.transient) for row in made.rejected] == [("missing", True)]


def test_a_place_that_cannot_be_written_is_an_error(root: Path, decoder: Decoder) -> None:
    """The error is a sentence, not a rejected video."""
    (root / "out").touch()
    with pytest.raises(ValueError, match=r"cannot write .*\.arrow: "):
        make(settings(root), decoder)


def test_the_name_of_a_shard_follows_from_what_goes_in(tmp_path: Path) -> None:
    """Other videos, sizes, labels, contents or settings give another name; plans survive their way as text."""
    chosen = settings(tmp_path, videos_per_shard=2)
    videos = [Probed(Found(f"{number}.mp4", number), f"hash {number}", 1) for number in range(5)]
    plans = list(plan_shards(videos, chosen))
    assert [[unit.found.num_bytes for unit in plan.units] for plan in plans] == [[0, 1], [2, 3], [4]]
    names = {plan.name for plan in plans}
    for changed in (
        plan_shards(videos[:1], chosen),
        plan_shards(videos[:2], settings(tmp_path, num_frames=5)),
        plan_shards([Probed(Found("0.mp4", 9), "hash 0", 1), videos[1]], chosen),
        plan_shards([Probed(Found("0.mp4", 0, label="x"), "hash 0", 1), videos[1]], chosen),
        plan_shards([Probed(Found("0.mp4", 0), "another", 1), videos[1]], chosen),
    ):
        names.add(next(changed).name)
    assert len(names) == 8
    assert next(plan_shards(videos[:2], settings(tmp_path, videos_per_shard=9))).name == plans[0].name
    assert from_table(to_table(plans, ShardPlan), ShardPlan) == plans


def test_shards_come_near_the_size_that_is_aimed_at(tmp_path: Path) -> None:
    """Neighbours share a shard until the next one would make it too large; a video that is too large has its own."""
    clip_bytes = 4 * 512 * 512 * 3
    chosen = settings(tmp_path, height=512, width=512, shard_megabytes=12)  # four clips
    counts = [1, 2, 1, 1, 9, 3, 1, 4]
    plans = list(plan_shards([Probed(Found(f"{n}.mp4", n), "", count) for n, count in enumerate(counts)], chosen))
    assert clip_bytes * 4 == 12 * 2**20
    groups = [[counts[unit.found.num_bytes] for unit in plan.units] for plan in plans]
    assert groups == [[1, 2, 1], [1], [9], [3, 1], [4]]


def test_a_long_video_is_the_same_in_parts(root: Path, decoder: Decoder) -> None:
    """Cut in parts, spread over shards, a video gives the clips, times and pixels that it gives as a whole."""
    coding = {"g": "10", "bf": "2", "keyint_min": "10", "sc_threshold": "0"}
    videos.write_video(root / "in/long.mp4", videos.images(250), options=coding)
    found = {}
    for seconds in (600, 1):
        chosen = settings(
            root, part_seconds=seconds, videos_per_shard=1, max_clips_per_video=20, output=f"{root}/{seconds}"
        )
        (long,) = [each for each in probed(chosen, decoder) if each.found.video_id == "long.mp4"]
        assert len(long.parts) == (10 if seconds == 1 else 0)
        plans = list(plan_shards([long], chosen))
        made = [
            make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)
            for plan in plans
        ]
        assert len(made) == (10 if seconds == 1 else 1)
        rows = [row for each in made for row in each.rows]
        found[seconds] = [[row[name] for name in ("clip_id", "start_seconds", "fps", "sha256")] for row in rows]
    assert len(found[600]) == 20
    assert sorted(found[1]) == sorted(found[600])


def test_runs_change_nothing_but_a_note(root: Path, decoder: Decoder) -> None:
    """Clips of runs are those of every frame, also where the runs fail: then a note of the video says why."""
    coding = {"g": "10", "bf": "2", "keyint_min": "10", "sc_threshold": "0"}
    videos.write_video(root / "in/runs.mp4", videos.images(100), options=coding)
    refresh = {"x264-params": "intra-refresh=1:keyint=12:bframes=0:scenecut=0"}
    videos.write_video(root / "in/whole.mp4", videos.images(100), options=refresh)
    found = {}
    for whole in (False, True):
        chosen = settings(root, output=f"{root}/{whole}")
        both = [each for each in probed(chosen, decoder) if each.found.video_id in ("runs.mp4", "whole.mp4")]
        assert [len(each.parts) for each in both] == [1, 1]
        (plan,) = plan_shards(both, chosen, whole=whole)
        made = make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)
        assert made.rejected == ()
        found[whole] = [[row[name] for name in ("clip_id", "start_seconds", "fps", "sha256")] for row in made.rows]
        kinds = {row["video_id"]: (row["notes"] or "").partition(":")[0] for row in made.rows}
        assert kinds == {"runs.mp4": "", "whole.mp4": "" if whole else "decoded-whole"}
    assert len(found[True]) == 6
    assert found[False] == found[True]


def test_a_store_that_fails_changes_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever read of the runs fails, the video is rejected for now; the next try writes the bytes of no failure."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (160, 224, 3), np.uint8) for _ in range(10)] * 30
    path = videos.write_video(tmp_path / "in/a.mov", images, codec="mjpeg", pix_fmt="yuvj444p")
    video_file = FileRange(str(path), path.stat().st_size)  # as if the folder were in a store
    monkeypatch.setattr(source, "ranged", lambda root, found: video_file)
    honest, decoder, reads, failing = RangedFile.read, InProcess(), 0, 0

    def read(file: RangedFile, size: int = -1) -> bytes:
        nonlocal reads
        reads += 1
        if reads == failing:
            raise VideoError("read", "read-error", "AWS Error NETWORK_CONNECTION", transient=True)
        return honest(file, size)

    monkeypatch.setattr(RangedFile, "read", read)
    chosen = settings(tmp_path, max_clips_per_video=2)
    (plan,) = plan_shards(probed(chosen, decoder), chosen)

    def made(number: int) -> MadeShard:
        nonlocal reads, failing
        reads, failing = 0, number
        output = str(tmp_path / "out")
        return make_shard(plan, root=chosen.videos, output=output, settings=chosen, decoder=decoder)

    expected = made(0)
    assert [row["notes"] for row in expected.rows] == [None, None]
    assert reads >= 3
    for number in range(1, reads + 1):
        shutil.rmtree(tmp_path / "out/shards")
        failed = made(number)
        (rejection,) = failed.rejected
        assert (failed.rows, rejection.reason, rejection.transient) == ([], "read-error", True)
        assert made(0) == expected


def test_results_of_a_first_look_are_kept(root: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look at the same videos reads nothing, unless one of the results may change."""
    (root / "in/d.mp4").write_text("no video")
    first = probed(settings(root), decoder)
    assert [each.num_clips for each in first] == [3, 0, 3, 0]
    assert [each.rejection and each.rejection.reason for each in first] == [None, "cannot-open", None, "cannot-open"]
    hashes = [hashlib.sha256((root / "in" / each.found.path).read_bytes()).hexdigest() for each in first]
    assert [each.sha256 for each in first] == hashes
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "probe", None)
        assert probed(settings(root), decoder) == first
    shutil.rmtree(root / "out")
    with monkeypatch.context() as patch:
        hurry(decoder, patch, "probe")
        hurried = probed(settings(root), decoder)
    assert {each.rejection.reason for each in hurried if each.rejection} == {"timeout"}
    assert probed(settings(root), decoder) == first


def test_rows_read_back_are_those_returned(root: Path, decoder: Decoder) -> None:
    """What goes into the manifest is what the shard says of itself."""
    made = make(settings(root), decoder)
    there = read_rows(shard_uri(str(root / "out"), made.name)).table.to_pylist()
    names = there[0].keys()
    assert [{name: row[name] for name in names} for row in made.rows] == there


def test_what_an_earlier_shard_left_in_the_scratch_file_is_not_seen(root: Path) -> None:
    """A smaller shard after a larger one, by the same decoder, is that of a fresh one: the file is written over."""
    larger = settings(root, output=str(root / "larger"), height=96, width=128)
    files = []
    for name, before in (("fresh", []), ("used", [larger])):
        decoder = Decoder()
        for chosen in [*before, settings(root, output=str(root / name))]:
            made = make(chosen, decoder)
        files.append((made.file, made.rejected))
        decoder.close()
    assert files[0] == files[1]


STRANGE = [
    ValueError("bad"),
    KeyError("name"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    RuntimeError("\udcff is no text"),
    OSError(""),
    IndexError(),
    AssertionError(),
    MemoryError(),
]


class Reader:
    """A decoder that takes any file for a video of one clip."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = open(scratch, "w+b")  # noqa: SIM115 -- lives as long as this object

    def probe(self, path: str, *_: Any, **__: Any) -> Contents:
        assert Path(path).read_bytes()
        return Contents(1, (), 1.0)

    def cut(self, path: str, *_: Any, offset: int, **__: Any) -> StoredClips:
        size = 4 * 24 * 32 * 3
        os.pwrite(self.scratch.fileno(), Path(path).read_bytes()[:1] * size, offset)
        return StoredClips([0], [0.0], 25.0, [size])


@pytest.mark.parametrize("error", STRANGE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["copy", "hash", "probe", "cut"])
def test_every_error_of_a_video_is_its_ledger_row(
    root: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    """Whatever is raised while one video is copied, hashed, probed or cut: its row is transient, the others are cut."""
    target: Any = decoder if place in ("probe", "cut") else source
    name = {"copy": "local_copy", "hash": "file_sha256"}.get(place, place)
    honest = getattr(target, name)

    def strange(*positional: Any, **named: Any) -> Any:
        if any("b.mp4" in str(value) for value in positional):
            raise error
        return honest(*positional, **named)

    monkeypatch.setattr(target, name, strange)
    chosen = settings(root)
    if place in ("probe", "hash"):
        rejections = [each.rejection for each in probed(chosen, decoder)]
        assert [rejection is None for rejection in rejections] == [True, False, True]
        (rejection,) = filter(None, rejections)
    else:
        made = make(chosen, decoder)
        assert {row["video_id"] for row in made.rows} == {"a.mp4", "c.avi"}
        (rejection,) = made.rejected
    stage = {"probe": "probe", "cut": "decode"}.get(place, "read")
    assert (rejection.video_id, rejection.stage, rejection.transient) == ("b.mp4", stage, True)
    assert rejection.reason == "unexpected-error"
    assert rejection.message.startswith(f"{type(error).__name__}: ")
    rejection.message.encode()  # so it can be written to the ledger


def raised() -> strategies.SearchStrategy[BaseException]:
    """Errors of every built-in type, with any message; none that means the end of the process."""

    def types(base: type[BaseException]) -> Iterator[type[BaseException]]:
        for each in base.__subclasses__():
            if each.__module__ == "builtins" and each not in (KeyboardInterrupt, SystemExit, GeneratorExit):
                yield each
                yield from types(each)

    plain = sorted(
        {each for each in types(BaseException) if not issubclass(each, BaseExceptionGroup | UnicodeError)}, key=str
    )
    text = strategies.text(max_size=20)
    errors: list[strategies.SearchStrategy[BaseException]] = [
        strategies.builds(lambda kind, message: kind(message), strategies.sampled_from(plain), text),
        strategies.builds(
            lambda kind, message: OSError(kind, message), strategies.sampled_from(list(errno.errorcode)), text
        ),
        strategies.builds(lambda message: UnicodeDecodeError("utf-8", b"\xff", 0, 1, message), text),
        strategies.builds(lambda message: BaseExceptionGroup("all", [ValueError(message), MemoryError()]), text),
        strategies.sampled_from(UNUSUAL),
        strategies.builds(lambda text: VideoError("read", "read-error", text, transient=True), text),
    ]
    return strategies.one_of(errors)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    found=strategies.lists(names(suffix=".mp4"), min_size=1, max_size=4, unique=True),
    error=raised(),
    data=strategies.data(),
)
def test_no_name_and_no_error_of_a_reader_ends_a_task(
    found: list[str], error: BaseException, data: strategies.DataObject
) -> None:
    """For any names and any error of one video: it has a ledger row, the others are cut, all is written and read."""
    place = data.draw(strategies.sampled_from(["copy", "hash", "probe", "cut"]))
    broken = data.draw(strategies.sampled_from(found))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = Path(folder, FOLDER)
        chosen = settings(root)
        (root / "in").mkdir(parents=True)
        for name in found:
            (root / "in" / name).write_bytes(name.encode())
        reader = Reader(scratch=Path(folder, "scratch"))
        failing = {"copy": (source, "local_copy"), "hash": (source, "file_sha256")}.get(place, (reader, place))
        honest = getattr(*failing)

        def strange(*positional: Any, **named: Any) -> Any:
            if any(
                str(getattr(value, "path", value)).endswith(f"/in/{broken}") or getattr(value, "path", "") == broken
                for value in positional
            ):
                raise error
            return honest(*positional, **named)

        patch.setattr(*failing, strange)
        results = probed(chosen, reader)  # type: ignore[arg-type]
        rejections = [each.rejection for each in results if each.rejection]
        made = [
            make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=reader)  # type: ignore[arg-type]
            for plan in plan_shards([each for each in results if not each.rejection], chosen)
        ]
        rejections += [row for each in made for row in each.rejected]
        assert [row.video_id for row in rejections] == [broken]
        assert sorted(row["video_id"] for each in made for row in each.rows) == sorted(set(found) - {broken})
        ledger.write(chosen.output, rejections)
        assert ledger.read(chosen.output)[0].video_id == broken
        for each in made:
            stored_frames(shard_uri(chosen.output, each.name))


def test_a_full_scratch_disk_ends_the_job(root: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes no pixels is no video's fault: the error says so, and no shard is written."""
    with open("/dev/full", "r+b") as full:
        monkeypatch.setattr(decoder, "scratch", full)
        decoder.close()
        with pytest.raises(ScratchError, match=r"cannot write pixels to /.*: .*; free space there, or set TMPDIR"):
            make(settings(root), decoder)
    decoder.close()
    assert not (root / "out").exists()


@pytest.mark.parametrize("content", ["", "[", '{"old": 1}', "[]", '[{"found": {"video_id": "a.mp4"}}]', "\\udcff"])
def test_results_of_another_format_are_probed_again(root: Path, decoder: Decoder, content: str) -> None:
    """What a killed run of another version has left does not crash this one, and is replaced."""
    first = probed(settings(root), decoder)
    (path,) = (root / "out/probes").iterdir()
    (root / "in/b.mp4").unlink()
    videos.write_video(root / "in/b.mp4", videos.images(30))
    path.rename(path.with_suffix(".old"))
    second = probed(settings(root), decoder)
    assert second != first
    (path,) = (root / "out/probes").glob("*.json")
    path.write_text(content)
    assert probed(settings(root), decoder) == second


def test_whole_sources_are_held_out(tmp_path: Path, decoder: Decoder) -> None:
    """All ranges of a file, all entries of a group, and all clips of a YouTube video stand on one side."""
    names = [f"{number}.mp4" for number in range(4)]
    video = videos.write_video(tmp_path / "in/0.mp4", videos.images(24))
    for name in names[1:]:
        (tmp_path / "in" / name).write_bytes(video.read_bytes())
    by_file = ["path,start_seconds,end_seconds,video_id,group"]
    by_file += [f"{name},{0.2 * part:.1f},{0.2 * part + 0.2:.1f},," for name in names for part in range(4)]
    by_group = [line.replace(",,", ",,patient 7") for line in by_file]
    for lines, sources in ((by_file, names), (by_group, ["patient 7"])):
        listed = tmp_path / "list.csv"
        listed.write_text("\n".join(lines) + "\n")
        found = list_annotated(str(tmp_path / "in"), str(listed), "table").videos
        assert len(found) == 16
        chosen = settings(tmp_path, output=str(tmp_path / sources[0]), held_out_percent=50)
        (plan,) = plan_shards([Probed(each, "hash") for each in found], chosen)
        made = make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)
        assert len(made.rows) == 16
        assert {(row["source"], row["held_out"]) for row in made.rows} == {
            (source, is_held_out(source, 50)) for source in sources
        }
    # The rule decides a column of the shard, so a shard that an earlier version left behind has another name.
    earlier = [Probed(dataclasses.replace(each, source=None), "hash") for each in found]
    assert next(plan_shards(earlier, chosen)).name != plan.name


def test_the_shards_of_complete_files_stay_the_same(root: Path, decoder: Decoder) -> None:
    """Their metadata do not name a source, so old and new versions write equal bytes and find each other's shards."""
    made = make(settings(root), decoder)
    assert b'"source"' not in Path(shard_uri(str(root / "out"), made.name)).read_bytes()
    assert [row["source"] for row in made.rows] == [None] * len(made.rows)
