"""Which files are videos, by their endings and first bytes, and what is said of the others."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av
import pytest

from tests.data import videos
from tests.data.test_ingest_tasks import settings
from tests.dataset import stored_frames
from vmoco import storage
from vmoco.data.decoder import Decoder
from vmoco.data.endings import EXTENSIONS, Wanted, left_out
from vmoco.data.ingest_plan import Probed, plan_shards
from vmoco.data.ingest_tasks import make_shard
from vmoco.data.manifest import shard_uri
from vmoco.data.source import list_videos

MPEG_HEAD = bytes.fromhex("000001ba2100010001c33367")
VIDEO_CD = b"RIFF\0\0\0\0CDXAfmt "


def write_dav(path: Path, frames: list[videos.Image]) -> None:
    """A recording of a Dahua recorder, one H.264 frame in each of its packets; FFmpeg reads these and writes none."""
    bare = videos.write_video(path.with_suffix(".h264"), frames, options={"bf": "0", "g": "1"})
    with av.open(str(bare)) as container:
        packets = [bytes(packet) for packet in container.demux() if packet.size]
    about = bytes([0x81, 0, 2, 25, 0x82, 0, 0, 0, *struct.pack("<HH", 96, 72)])  # H.264, 25 frames a second, 96 x 72
    made = b""
    for number, packet in enumerate(packets):
        length = 24 + len(about) + len(packet) + 8
        counts = (0xFD, 1, 0, 0, number, length, 0, number * 40 % 1000, len(about), 0)
        made += struct.pack("<4sBBBBIIIHBB", b"DHAV", *counts) + about + packet + struct.pack("<4sI", b"dhav", length)
    bare.unlink()
    path.write_bytes(made)


def test_what_is_left_out_is_counted_by_ending(tmp_path: Path) -> None:
    """Every file that is not hidden is a video or is counted; --suffixes takes more endings, in any case."""
    for name in ("a.mp4", "b.TXT", "c.txt", "sub/d.MOD", "README", ".hidden.txt", "sub/e.h265"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listing = list_videos(str(tmp_path))
    assert [found.video_id for found in listing.videos] == ["a.mp4", "sub/e.h265"]
    assert listing.left_out == (
        "4 files are not looked at: .txt 2, without ending 1, .mod 1; add endings of videos with --suffixes"
    )
    more = list_videos(str(tmp_path), ("mod", ""))
    assert [found.video_id for found in more.videos] == ["README", "a.mp4", "sub/d.MOD", "sub/e.h265"]
    assert more.others == {".txt": 2}
    assert list_videos(f"{tmp_path}/sub/*", (".mod",)).left_out == ""
    with pytest.raises(ValueError, match=r"no videos .*; 1 file is not looked at: \.mod 1; add endings of videos"):
        list_videos(f"{tmp_path}/sub/*.MOD")


def test_many_endings_are_shortened() -> None:
    """Ten are named, the most frequent first."""
    wanted = Wanted()
    for number in range(13):
        wanted.takes(f"x.{number:02}")
    wanted.takes("y.12")
    assert wanted.others[".12"] == 2
    listed = left_out(wanted.others)
    assert listed.startswith("14 files are not looked at: .12 2, .00 1, .01 1,")
    assert " and 3 more endings; " in listed


@pytest.mark.parametrize("suffix", [".tar.gz", "a/b", "..mp4"])
def test_what_is_no_ending_is_refused(suffix: str) -> None:
    """The message has the value as it was typed, and what is allowed."""
    with pytest.raises(ValueError, match=rf"^--suffixes {suffix!r} is not an ending: give one .* such as .mod$"):
        Wanted([suffix])


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_a_dat_file_is_a_video_if_it_begins_as_one(tmp_path: Path, remote: bool, request: Any) -> None:
    """Films of Video CDs are taken, as they are on the disc and ripped; other .dat files are counted."""
    if remote:
        request.getfixturevalue("store")
    root = "s3://bucket/in" if remote else str(tmp_path)
    for name, content in {"AVSEQ01.DAT": VIDEO_CD, "b.dat": MPEG_HEAD, "c.dat": b"some table", "d.dat": b""}.items():
        storage.write_atomic(f"{root}/{name}", content)
    listing = list_videos(root)
    assert [found.video_id for found in listing.videos] == ["AVSEQ01.DAT", "b.dat"]
    assert listing.others == {".dat": 2}
    assert len(list_videos(root, [".dat"]).videos) == 4


def test_bare_streams_discs_and_recorders_give_their_frames(tmp_path: Path) -> None:
    """H.264 and HEVC without a container, MPEG-1 of a Video CD and a recorder's .dav: each gives its own frames."""
    folder, images = tmp_path / "in", videos.images(16)
    quiet = {"x265-params": "log-level=none:pools=1:frame-threads=1"}
    videos.write_video(folder / "a.h264", images)
    videos.write_video(folder / "b.hevc", images, codec="libx265", options=quiet).rename(folder / "b.265")
    videos.write_video(folder / "c.mpg", images, codec="mpeg1video").rename(folder / "c.DAT")
    write_dav(folder / "d.dav", images)
    chosen = settings(tmp_path, num_frames=8)
    found = list_videos(chosen.videos).videos
    assert {Path(video.path).suffix.lower() for video in found} <= set(EXTENSIONS)
    (plan,) = plan_shards([Probed(video, "hash") for video in found], chosen)
    decoder = Decoder()
    made = make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)
    decoder.close()
    assert made.rejected == ()
    clips = stored_frames(shard_uri(chosen.output, made.name))
    assert [row["video_id"] for row in made.rows] == [
        name for name in ("a.h264", "b.265", "c.DAT", "d.dav") for _ in "ab"
    ]
    # A bare stream has no time stamps: frames are counted at its rate.
    assert [row["start_seconds"] for row in made.rows][:4] == pytest.approx([0.0, 0.32, 0.0, 0.32])
    assert {row["fps"] for row in made.rows[:4]} == {25.0}
    for place, clip in enumerate(clips):
        assert [videos.number_of(frame) for frame in clip] == list(range(8 * (place % 2), 8 * (place % 2) + 8))
