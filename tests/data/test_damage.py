"""Damaged videos: clips without damage are kept, no other ones, and what was lost is named."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests import fuzz
from tests.data import videos
from vmoco.data import damage, opening, probing, video
from vmoco.data.clips import ClipPlan
from vmoco.data.collector import Collector
from vmoco.data.damage import Survey
from vmoco.data.ledger import Damage, VideoError
from vmoco.data.timeline import Timeline

FRAMES, KEY_FRAMES = 120, 12
SPAN = 4
PLAN = ClipPlan(SPAN)


def cut(path: Path, **plan: Any) -> tuple[video.Cut, list[videos.Image]]:
    """Clips of SPAN frames that follow each other."""
    sink = videos.Kept()
    made = video.cut_clips(str(path), ClipPlan(SPAN, **plan), height=48, width=64, sink=sink)
    return made, sink.clips


def noisy(path: Path, **options: Any) -> Path:
    """A video whose packets all hold much picture data."""
    rng = np.random.default_rng(0)
    images = [(image + rng.integers(-20, 20, image.shape)).clip(0, 255) for image in videos.images(FRAMES)]
    given = {"g": str(KEY_FRAMES), **options.pop("options", {})}
    if options.get("codec", "libx264") == "libx264":
        given.setdefault("x264-params", "mbtree=0")  # with it, the same pictures give other bytes each time
    return videos.write_video(path, [image.astype(np.uint8) for image in images], **options, options=given)


def packets(path: Path) -> list[tuple[int, int, float, bool]]:
    """Place in the file, size, time and kind of each packet."""
    with av.open(str(path)) as container:
        found = [packet for packet in container.demux(video=0) if packet.size]
        return [
            (packet.pos or 0, packet.size, float((packet.pts or 0) * packet.time_base), packet.is_keyframe)
            for packet in found
        ]


def spoil(path: Path, number: int, *, share: float = 1.0) -> None:
    """Fills most of a packet with noise, from its end."""
    at, size, _, _ = packets(path)[number]
    content = bytearray(path.read_bytes())
    at += size - int(size * share)
    content[at : at + int(size * share)] = np.random.default_rng(number).bytes(int(size * share))
    path.write_bytes(bytes(content))


SPOILED: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": {"bf": "2"}},
    "h264-open.mp4": {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}},
    "h264.mkv": {},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:min-keyint=12:log-level=none"}},
    "hevc-open.mp4": {"codec": "libx265", "options": {"x265-params": "open-gop=1:keyint=12:log-level=none"}},
    "mpeg2.mp4": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ffv1.mkv": {"codec": "ffv1", "options": {"slicecrc": "1"}},
}


@pytest.mark.parametrize("name", SPOILED)
def test_clips_without_damage_are_kept(tmp_path: Path, name: str) -> None:
    """Of one spoiled packet: each clip before it and from the second key frame after it on, with its very pixels."""
    path = noisy(tmp_path / name, **SPOILED[name])
    whole, clips = cut(path)
    assert whole.damage is None
    number, times = 52, [time for _, _, time, _ in packets(path)]
    spoil(path, number)
    made, kept = cut(path)
    original = dict(zip(whole.start_times, clips, strict=True))
    for start, clip in zip(made.start_times, kept, strict=True):
        np.testing.assert_array_equal(clip, original[start])
    assert made.damage is not None
    # A packet may be decoded some frames before it is shown.
    assert made.damage.lost[0][0] == pytest.approx(times[number], abs=0.17)
    seconds, lost = sorted(whole.start_seconds), set(whole.start_seconds) - set(made.start_seconds)
    before, after = times[number] - 0.5, times[number] + 2 * KEY_FRAMES / 25
    assert all(before < start < after for start in lost), (lost, times[number])
    assert lost, "the damage is in some clip"
    assert len(seconds) == FRAMES // SPAN
    with pytest.raises(VideoError, match=r"^decode: decode-error: "):
        cut(path, damaged="reject")


def fast_start(path: Path) -> Path:
    return noisy(path, container_options={"movflags": "faststart"})


CUT_OFF: dict[str, tuple[Callable[[Path], Path], float]] = {
    "fast-start.mp4": (fast_start, FRAMES / 25),
    "cut.mkv": (noisy, FRAMES / 25),
    "cut.flv": (noisy, FRAMES / 25),
    "cut.avi": (lambda path: noisy(path, codec="mjpeg", pix_fmt="yuvj420p"), FRAMES / 25),
}


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_file_that_is_cut_off_gives_the_clips_before_the_cut(tmp_path: Path, name: str) -> None:
    """All that lie before it, with the pixels of the complete file; what is lost goes on to where the header ends."""
    make, seconds = CUT_OFF[name]
    path = make(tmp_path / name)
    frames = cut_frames(path)
    offset = min(time for _, _, time, _ in packets(path))
    videos.truncate(path, 0.7)
    made, clips = cut(path)
    assert made.damage is not None
    (start, _), end = made.damage.lost[0], made.damage.lost[-1][1]
    assert end == pytest.approx(seconds + offset, abs=0.1)
    assert 0.6 * seconds < start < 0.8 * seconds
    assert made.damage.percent == pytest.approx(100 * (1 - (start - offset) / seconds), abs=3)
    assert len(clips) >= (start - offset) * 25 // SPAN - 1
    for clip in clips:
        assert any(np.array_equal(clip, frames[at : at + SPAN]) for at in range(FRAMES - SPAN + 1))
    assert max(made.start_seconds) + SPAN / 25 <= start + 1e-3
    with pytest.raises(VideoError, match=r"^probe: truncated: "):
        cut(path, damaged="reject")
    with pytest.raises(VideoError, match=r"^probe: truncated: more than 20 %: \d\d\.\d % is lost \(seconds "):
        cut(path, max_damaged_percent=20)


def cut_frames(path: Path) -> videos.Image:
    """All frames of a whole video, scaled as clips are."""
    return np.concatenate(cut(path)[1])


def test_a_report_in_the_log_alone_is_damage(tmp_path: Path) -> None:
    """FFV1 shows a slice with a wrong checksum all the same, and only its log tells."""
    path = noisy(tmp_path / "a.mkv", codec="ffv1", options={"slicecrc": "1", "g": "1", "level": "3"})
    at, size, _, _ = packets(path)[50]
    content = bytearray(path.read_bytes())
    content[at + size // 2] ^= 4
    path.write_bytes(bytes(content))
    with av.open(str(path)) as container:
        assert not any(frame.is_corrupt for frame in container.decode(video=0))
    made, clips = cut(path)
    assert made.damage is not None
    assert made.damage.lost == ((2.0, 2.04),)
    assert len(clips) == FRAMES // SPAN - 1
    with pytest.raises(VideoError, match=r"decode-error: ffv1: .*CRC"):
        cut(path, damaged="reject")


def test_nothing_without_damage_is_an_error_with_the_seconds(tmp_path: Path) -> None:
    """A video that has no clip left is rejected for what is wrong with it, however much may be lost."""
    path = noisy(tmp_path / "a.mkv", codec="ffv1", options={"slicecrc": "1", "g": "1", "level": "3"})
    for number in range(1, FRAMES, SPAN - 1):
        spoil(path, number, share=0.3)
    with pytest.raises(VideoError, match=r"decode-error: no clip is without damage: 3\d\.\d % is lost \(seconds 0.04-"):
        cut(path)


def test_a_report_without_a_loss_is_noted(tmp_path: Path) -> None:
    """A file that ends in the middle of something after its last frame gives all clips, and says so."""
    path = noisy(tmp_path / "a.webm", codec="libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    whole, clips = cut(path)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(bytes.fromhex("1c53bb6b")) + 9])  # in the index, which comes last
    made, kept = cut(path)
    np.testing.assert_array_equal(kept, clips)
    assert (made.start_times, whole.damage) == (whole.start_times, None)
    assert made.damage is not None
    assert (made.damage.lost, made.damage.percent) == ((), 0.0)
    assert str(made.damage).startswith("nothing is lost: ")


def test_a_range_counts_alone(tmp_path: Path) -> None:
    """What is lost outside the asked range does not count; a clean range of a damaged file has nothing lost."""
    path = noisy(tmp_path / "a.mp4")
    spoil(path, 80)
    made, clips = cut(path, end_seconds=2.0)
    assert made.damage is None
    assert len(clips) == 50 // SPAN
    with pytest.raises(VideoError, match=r"more than 50 %: "):
        cut(path, start_seconds=80 / 25, end_seconds=84 / 25)


def surveyed(times: list[int], frames: list[int], unit: Fraction = Fraction(1)) -> Survey:
    """The survey of a video whose clock starts with its first frame."""
    line = Timeline(np.array(times, np.int64), np.empty(0, np.int64), unit, 1.0)
    return Survey(line, np.array(frames, np.int64), "x")


def test_a_clip_lies_in_one_stretch() -> None:
    """A clip is dropped if a lost frame lies between its first and its last one, also where it takes none of them."""
    found = surveyed(list(range(8)), [0, 1, 2, -1, 3, 4, 5, 6])
    clips = np.array([[0, 2], [1, 2], [2, 4], [3, 5], [4, 6], [5, 7]])
    assert clips[found.is_sound(clips)].tolist() == [[0, 2], [1, 2], [4, 6], [5, 7]]
    assert found.is_sound(np.empty((0, 2), np.int64)).tolist() == []


def test_times_that_are_shown_twice(tmp_path: Path) -> None:
    """Damaged files with a piece of themselves spliced in: two recordings, and no clip mixes the frames of both."""
    path = noisy(tmp_path / "a.ts")
    frames, content = cut_frames(path), path.read_bytes()
    twelfth = len(content) // 188 // 12 * 188
    for first, last in ((4, 8), (3, 6), (3, 9), (6, 9), (2, 10)):
        begin, end = first * twelfth, last * twelfth
        path.write_bytes(content[:end] + content[begin : begin + 7] + content[begin:])
        made, clips = cut(path)
        assert made.damage is not None
        assert len(clips) > 20
        assert all(is_in(frames, clip) for clip in clips)


def is_in(frames: videos.Image, clip: videos.Image) -> bool:
    """Whether the clip is a stretch of these frames."""
    return any(np.array_equal(clip, frames[at : at + SPAN]) for at in range(len(frames) - SPAN + 1))


OPEN = {"codec": "mpeg2video", "options": {"bf": "2"}}  # two frames are shown before each key frame


@pytest.mark.parametrize(
    ("options", "early", "lost"), [({}, 5, 5), ({}, 0, 0), (OPEN, 0, 2)], ids=["no key", "key", "open"]
)
def test_a_recording_that_begins_amid_its_pictures(
    tmp_path: Path, options: dict[str, Any], early: int, lost: int
) -> None:
    """Its first frames refer to what is not there, and a decoder takes the frames of the recording before instead.

    `early` frames before a key frame.
    """
    path = noisy(tmp_path / "a.ts", **options)
    frames, content = cut_frames(path), path.read_bytes()
    begin = [number for number, (_, _, _, key) in enumerate(packets(path)) if key][3] - early
    places = [place for place in range(0, len(content), 188) if b"\x00\x00\x01\xe0" in content[place : place + 188]]
    assert len(places) == FRAMES
    path.write_bytes(content + content[places[begin] :])
    made, clips = cut(path)
    assert all(is_in(frames, clip) for clip in clips)
    assert len(clips) >= (2 * FRAMES - begin - lost) // SPAN - 3
    assert (made.damage is not None) == (lost > 0)
    if made.damage is not None:
        assert sum(end - start for start, end in made.damage.lost) * 25 == pytest.approx(lost, abs=1)
        assert "lacks the frames that its first ones refer to" in str(made.damage)


def test_frames_that_come_in_another_order_than_their_times() -> None:
    """A survey tells."""
    assert not surveyed([0, 1, 2], [0, 2, 1]).ordered
    assert surveyed([0, 1, 2, 3], [0, -1, 1, 2]).ordered


def test_what_is_lost_is_measured_in_time() -> None:
    """Frames count for as long as they are shown; the promised end counts too, and touching stretches are one."""
    found = surveyed([0, 10, 20, 60, 70, 80], [0, 1, -1, -1, 2, 3], Fraction(1, 10))
    assert damage.assess(found, PLAN, promised=None, message="") == Damage(((2.0, 7.0),), 55.56, "x")
    assert damage.assess(found, PLAN, promised=11.0, message="").lost == ((2.0, 7.0), (9.0, 11.0))
    early = ClipPlan(SPAN, end_seconds=4.0)
    assert damage.assess(found, early, promised=11.0, message="").lost == ((2.0, 6.0),)


def test_two_readings_that_differ_are_an_error(tmp_path: Path) -> None:
    """Pixels are taken only if the second reading finds what the first one found."""
    path = noisy(tmp_path / "a.mp4")
    spoil(path, 52)
    taken = videos.Kept()
    line = probing.probe(str(path))
    with opening.errors("decode", "x") as log, opening.open_video(str(path)) as container:
        found = damage.survey(container, opening.video_stream(container, line.stream), log, line)
    spoil(path, 20)
    collector = Collector(np.empty((0, 0), np.int64), taken, PLAN, height=48, width=64)
    with opening.errors("decode", "x") as log, opening.open_video(str(path)) as container:
        stream = opening.video_stream(container, line.stream)
        with pytest.raises(VideoError, match="the frames change between two readings"):
            damage.take_again(container, stream, log, collector=collector, found=found)


def test_interlaced_and_damaged(tmp_path: Path) -> None:
    """Clips are deinterlaced as in the whole video, but for those that touch what is lost, which they must not see."""
    path = noisy(tmp_path / "a.mkv", options={"x264-params": "tff=1"})
    whole, clips = cut(path)
    assert whole.notes == ("deinterlaced: its frames are interlaced",)
    original = dict(zip(whole.start_times, clips, strict=True))
    spoil(path, 52)
    made, kept = cut(path)
    assert made.damage is not None
    assert made.notes == (f"damaged: {made.damage.percent:.1f} % of it is lost", *whole.notes)
    assert 15 < len(kept) < len(clips)
    ((low, high),) = made.damage.lost
    for start, seconds, clip in zip(made.start_times, made.start_seconds, kept, strict=True):
        if not low - 0.25 < seconds < high + 0.05:
            np.testing.assert_array_equal(clip, original[start])


def joined(path: Path) -> tuple[Path, int]:
    """Two equal recordings, one after the other, and the number of packets of one."""
    content = noisy(path).read_bytes()
    path.write_bytes(content * 2)
    return path, FRAMES


@pytest.mark.parametrize("half", [0, 1])
def test_joined_recordings_with_damage_in_one(tmp_path: Path, half: int) -> None:
    """The clips of the other one are all kept, and the lost seconds count on the line of time of both."""
    path, length = joined(tmp_path / "a.ts")
    whole, clips = cut(path)
    original = dict(zip(whole.start_times, clips, strict=True))
    at, size, _, _ = packets(path)[52]
    content = bytearray(path.read_bytes())
    at += half * len(content) // 2
    content[at + 200 : at + size] = bytes(size - 200)
    path.write_bytes(bytes(content))
    made, kept = cut(path)
    for start, clip in zip(made.start_times, kept, strict=True):
        np.testing.assert_array_equal(clip, original[start])
    assert made.damage is not None
    first = whole.start_seconds[0]
    assert all(-0.1 < low - first - (52 + half * length) / 25 + 0.5 < 1 for low, _ in made.damage.lost[:1])
    assert all(high - low < 1.1 for low, high in made.damage.lost)
    lost = [start - first for start in whole.start_seconds if start not in made.start_seconds]
    assert 1 <= len(lost) <= 8
    assert all(half * length / 25 <= start < (half + 1) * length / 25 for start in lost)
    assert [note.partition(":")[0] for note in probing.probe(str(path)).notes] == ["joined"]


def test_a_transport_stream_that_is_cut_off(tmp_path: Path) -> None:
    """It has no length in its header: the clips before the last, incomplete packet are there."""
    path = noisy(tmp_path / "a.ts")
    whole, clips = cut(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.6)])
    made, kept = cut(path)
    assert 0.5 * len(clips) < len(kept) < 0.65 * len(clips)
    frames = np.concatenate(clips)
    for start, clip in zip(made.start_seconds, kept, strict=True):
        number = round((start - whole.start_seconds[0]) * 25)
        np.testing.assert_array_equal(clip, frames[number : number + SPAN])


def test_hdr_and_damaged(tmp_path: Path) -> None:
    """Both are in the notes; HDR that is not wanted is rejected for that."""
    path = noisy(tmp_path / "a.mkv", pix_fmt="yuv420p10le", options={"x264-params": "transfer=smpte2084"})
    whole, clips = cut(path)
    spoil(path, 52)
    made, kept = cut(path)
    assert [note.partition(":")[0] for note in made.notes] == ["damaged", "tone-mapped"]
    original = dict(zip(whole.start_times, clips, strict=True))
    for start, clip in zip(made.start_times, kept, strict=True):
        np.testing.assert_array_equal(clip, original[start])
    with pytest.raises(VideoError, match=r"^decode: hdr: "):
        cut(path, hdr="reject")


def test_a_long_video_that_is_cut_off_is_not_split(tmp_path: Path) -> None:
    """Its parts would decode without an error, and nobody would say that its end is missing."""
    path = noisy(tmp_path / "a.mkv")
    assert len(probing.probe(str(path)).keyframes) == FRAMES // KEY_FRAMES
    videos.truncate(path, 0.7)
    line = probing.probe(str(path))
    assert line.broken is not None
    assert len(line.keyframes) == 0
    made, _ = cut(path)
    assert [note.partition(":")[0] for note in made.notes] == ["cut-off"]


def test_no_kept_clip_holds_a_frame_that_was_reported(tmp_path: Path) -> None:
    """Every codec and container, every mutation: a decoder that never stops has no report on any kept clip."""
    seeds = fuzz.make_seeds(tmp_path / "seeds")
    mutants = fuzz.write_mutants(tmp_path / "in", seeds, 252)
    plan = ClipPlan(fuzz.NUM_FRAMES, stride=fuzz.STRIDE)
    damaged = kept = 0
    for name in sorted(mutants):
        sink = videos.Kept()
        try:
            made = video.cut_clips(str(tmp_path / "in" / name), plan, height=24, width=32, sink=sink)
        except VideoError:
            continue
        if made.damage:
            reported = fuzz.reported_seconds(tmp_path / "in" / name)
            damaged, kept = damaged + 1, kept + len(sink.clips)
            for start in made.start_seconds:
                held = fuzz.held(reported, start, fps=made.fps)
                assert not held, (name, start, held, made.damage)
    assert damaged > 60
    assert kept > 100
