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
from vmoco.data import damage, video
from vmoco.data.clips import ClipPlan
from vmoco.data.damage import Survey
from vmoco.data.ledger import Damage, VideoError

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


@pytest.mark.parametrize("line", ["concealing 9 DC, 9 AC errors in P frame", "Packet corrupt (stream = 0)"])
def test_what_the_log_reports_counts(line: str) -> None:
    """Errors count, and lower lines that speak of damage; not other lower lines, other streams or metadata."""
    error, info = av.logging.ERROR, av.logging.INFO
    assert damage.report_in([(info, "h264", line)]) == f"h264: {line}"
    assert damage.report_in([(error, "h264", "no frame!\n")]) == "h264: no frame!"
    assert damage.report_in([(error, "aac", "no frame!")], ignored=frozenset({"aac"})) is None
    assert damage.report_in([(error, "h264", "SEI type 5 size 9 truncated at 8"), (info, "h264", "Reinit")]) is None
    log = [(error, "h264", "no frame!")]
    damage.report_in(log)
    assert not log


def test_a_clip_lies_in_one_stretch() -> None:
    """A clip is dropped if a lost frame lies between its first and its last one, also where it takes none of them."""
    found = Survey(np.arange(8), np.array([0, 1, 2, -1, 3, 4, 5, 6]), "x")
    clips = np.array([[0, 2], [1, 2], [2, 4], [3, 5], [4, 6], [5, 7]])
    assert found.keep(clips).tolist() == [[0, 2], [1, 2], [4, 6], [5, 7]]
    assert found.keep(np.empty((0, 2), np.int64)).tolist() == []


def test_overlapping_times_are_rejected(tmp_path: Path) -> None:
    """A damaged file with a piece of itself spliced in shows times twice; its clips would be of mixed frames."""
    path = noisy(tmp_path / "a.ts")
    content = path.read_bytes()
    packet = 188
    third = len(content) // packet // 3 * packet
    path.write_bytes(content[: 2 * third] + content[third : 2 * third + 7] + content[third:])
    with pytest.raises(VideoError, match=r"^clip: bad-timestamps: "):
        cut(path)
    assert not Survey(np.arange(3), np.array([0, 2, 1]), "x").ordered
    assert Survey(np.arange(4), np.array([0, -1, 1, 2]), "x").ordered


def test_what_is_lost_is_measured_in_time() -> None:
    """Frames count for as long as they are shown; the promised end counts too, and touching stretches are one."""
    found = Survey(np.array([0, 10, 20, 60, 70, 80]), np.array([0, 1, -1, -1, 2, 3]), "x")
    unit = Fraction(1, 10)
    assert damage.assess(found, unit, PLAN, promised=None, message="") == Damage(((2.0, 7.0),), 55.56, "x")
    assert damage.assess(found, unit, PLAN, promised=11.0, message="").lost == ((2.0, 7.0), (9.0, 11.0))
    early = ClipPlan(SPAN, end_seconds=4.0)
    assert damage.assess(found, unit, early, promised=11.0, message="").lost == ((2.0, 6.0),)


def test_two_readings_that_differ_are_an_error(tmp_path: Path) -> None:
    """Pixels are taken only if the second reading finds what the first one found."""
    path = noisy(tmp_path / "a.mp4")
    spoil(path, 52)
    taken = videos.Kept()
    with video.errors("decode", "x") as log, video.open_video(str(path)) as container:
        found = damage.survey(container, video.video_stream(container), log)
    spoil(path, 20)
    with video.errors("decode", "x") as log, video.open_video(str(path)) as container:
        collector = video._Collector(np.empty((0, 0), np.int64), taken, height=48, width=64)
        with pytest.raises(VideoError, match="the frames change between two readings"):
            damage.take_again(container, video.video_stream(container), log, taker=collector, found=found)


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
            reported = np.array(fuzz.reported_seconds(tmp_path / "in" / name))
            damaged, kept = damaged + 1, kept + len(sink.clips)
            for start in made.start_seconds:
                held = reported[(reported >= start - 1e-3) & (reported <= start + fuzz.SECONDS + 1e-3)]
                assert not len(held), (name, start, held, made.damage)
    assert damaged > 60
    assert kept > 100
