"""Which frames of a video are decoded, and that its clips are those of decoding every frame."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data import videos
from tests.decoding import InProcess
from vmoco.data import probing, video
from vmoco.data.clips import ClipPlan
from vmoco.data.ledger import VideoError
from vmoco.data.parts import Part, plan_parts
from vmoco.data.ranged_file import FileRange, RangedFile
from vmoco.data.timeline import Timeline, plan_clips

MILLISECONDS = Fraction(1, 1000)


def line_of(times: Any, keyframes: Any) -> Timeline:
    origin = Fraction(int(times[0]), 1000) if len(times) else Fraction(0)
    return Timeline(times, keyframes, MILLISECONDS, 25.0, stream=1, is_exact=True, origin=origin)


def parts_of(line: Timeline, plan: ClipPlan, seconds: float) -> list[Part]:
    return plan_parts(line, plan, indices=plan_clips(line, plan), seconds=seconds)


def frames_of(part: Part, line: Timeline) -> set[int]:
    """Times of all frames that a part decodes."""
    return {int(time) for run in part.runs for time in line.times if run.start <= time <= run.last}


@given(
    total=st.integers(2, 400),
    every=st.integers(1, 90),
    seconds=st.floats(0.5, 8),
    num_frames=st.integers(2, 16),
    max_clips=st.sampled_from([1, 3, 1000]),
    first=st.integers(-1000, 1000),
)
def test_parts_hold_the_clips(
    total: int, every: int, seconds: float, num_frames: int, max_clips: int, first: int
) -> None:
    """Every clip is in one part, in order; runs begin with key frames, hold the clips, and leave frames out."""
    times = first + np.arange(total) * 40
    line, plan = line_of(times, times[::every]), ClipPlan(num_frames, max_clips=max_clips)
    parts = parts_of(line, plan, seconds)
    clips = [clip for part in parts for clip in part.clips]
    assert clips in ([], times[plan_clips(line, plan)].tolist())
    decoded: set[int] = set()
    for part in parts:
        assert part.stream == 1
        assert {run.start for run in part.runs} <= set(times[::every].tolist())
        for run in part.runs:
            assert run.num_frames == ((times >= run.start) & (times <= run.last)).sum()
        own = frames_of(part, line)
        assert all(own.issuperset(clip) for clip in part.clips)
        decoded |= own
    share = len(decoded) / total
    assert share == 0 or share <= 0.75 or (share == 1 and len(parts) > 1)


def test_clips_that_need_the_same_frames_share_a_run() -> None:
    """From the key frame before a clip to its end; what lies between two runs is left out."""
    times = np.arange(100) * 40
    line, plan = line_of(times, times[::10]), ClipPlan(4, max_clips=4)
    assert plan_clips(line, plan)[:, 0].tolist() == [10, 35, 60, 85]
    (part,) = parts_of(line, plan, 600)
    assert [(run.start // 40, run.last // 40) for run in part.runs] == [(10, 13), (30, 38), (60, 63), (80, 88)]
    near = line_of(times, times[::25])
    assert plan_clips(near, ClipPlan(2, max_clips=6))[:, 0].tolist() == [7, 24, 40, 57, 74, 90]
    (part,) = parts_of(near, ClipPlan(2, max_clips=6, end_seconds=1.2), 600)
    assert len(part.runs) == 1
    assert len(part.clips) == 6


def test_a_video_of_which_little_is_left_out_is_decoded_as_a_whole() -> None:
    """So is one that must be examined, or whose packets do not tell its frames; in parts, if it is long."""
    times = np.arange(0, 100_000, 40)
    line = line_of(times, times[::25])
    assert parts_of(line, ClipPlan(16), 600) == []
    assert len(parts_of(line, ClipPlan(16), 10)) == 10
    few = ClipPlan(16, max_clips=3)
    assert len(parts_of(line, few, 10)) == 1
    rejecting = dataclasses.replace(few, damaged="reject")
    assert parts_of(line, rejecting, 600) == []
    guessed = dataclasses.replace(line, is_exact=False)
    assert parts_of(guessed, few, 600) == []
    for found in (parts_of(line, rejecting, 10), parts_of(guessed, few, 10)):
        assert len(found) == 10
        assert len(set().union(*(frames_of(part, line) for part in found))) == len(times)


def test_many_clips_of_a_long_video_are_several_parts() -> None:
    """Each part decodes about the seconds that were asked for, also where a run is longer than that."""
    times = np.arange(0, 1_000_000, 40)
    line = line_of(times, times[::100])  # every 4 s
    spread = parts_of(line, ClipPlan(16, max_clips=100), 50)
    ranged = parts_of(line, ClipPlan(16, start_seconds=100, end_seconds=500), 50)
    for parts in (spread, ranged):
        lengths = [sum(run.last - run.start for run in part.runs) / 1000 for part in parts]
        assert max(lengths) <= 60
        assert min(lengths[:-1]) >= 30
    assert sum(len(part.clips) for part in spread) == 100
    assert [part.runs[0].start for part in ranged][:3] == [100_000, 152_000, 200_000]
    assert ranged[-1].runs[-1].last == ranged[-1].clips[-1][-1]
    assert sum(len(part.clips) for part in ranged) == 10_000 // 16


def test_clips_of_each_shot_need_the_whole_range() -> None:
    """Its run is the only part, and says where the range begins; a long range and a complete video have no parts."""
    times = np.arange(0, 100_000, 40)
    line = line_of(times, times[::25])
    plan = ClipPlan(16, max_clips=3, split_at_cuts=True)
    ranged = dataclasses.replace(plan, start_seconds=20.5, end_seconds=60)
    (part,) = parts_of(line, ranged, 30)
    assert [(run.start, run.last) for run in part.runs] == [(20_000, 59_960)]
    assert part.shots_from == 20_520
    assert parts_of(line, ranged, 10) == parts_of(line, plan, 600) == parts_of(line, plan, 10) == []


def test_what_cannot_be_split_is_not() -> None:
    """Without key frames, with frames before the first one, or without clips."""
    times, few = np.arange(0, 100_000, 40), ClipPlan(16, max_clips=3)
    assert parts_of(line_of(times[:0], times[:0]), few, 10) == []
    assert parts_of(line_of(times, times[:0]), few, 10) == []
    assert parts_of(line_of(times, times[25::25]), few, 10) == []
    assert parts_of(line_of(times[:15], times[:1]), few, 10) == []
    assert parts_of(line_of(times, times[:1]), ClipPlan(16), 10) == []


def noisy(count: int, *, height: int = 72, width: int = 96) -> list[videos.Image]:
    rng = np.random.default_rng(0)
    return [
        np.clip(image + rng.integers(-9, 9, image.shape), 0, 255).astype(np.uint8)
        for image in videos.images(count, height=height, width=width)
    ]


def remuxed(path: Path, *, late: int = 0, **container_options: str) -> Path:
    """The same pictures, written again with other options; `late` frames lie before the time at which it begins."""
    content = io.BytesIO(path.read_bytes())
    with (
        av.open(content) as source,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled", **container_options}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        step = late * source.streams.video[0].duration // source.streams.video[0].frames if late else 0
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                if step:
                    packet.pts, packet.dts = packet.pts - step, packet.dts - step
                target.mux(packet)
    return path


def without_cues(path: Path) -> Path:
    return remuxed(path, live="1")


def beginning_late(path: Path) -> Path:
    """An edit list that begins in the middle of a group of pictures."""
    return remuxed(path, late=6)


def with_a_lying_index(path: Path) -> Path:
    """The table of key frames says that each of them is the frame before."""
    content = bytearray(path.read_bytes())
    at = content.index(b"stss") + 8
    for number in range(1, int.from_bytes(content[at : at + 4], "big")):
        place = at + 4 + 4 * number
        content[place : place + 4] = (int.from_bytes(content[place : place + 4], "big") - 1).to_bytes(4, "big")
    path.write_bytes(content)
    return path


def with_a_lying_size(path: Path) -> Path:
    """The table of sizes says that a packet between the clips is shorter than it is."""
    content = bytearray(path.read_bytes())
    at = content.index(b"stsz") + 16 + 4 * 60
    content[at : at + 4] = (int.from_bytes(content[at : at + 4], "big") - 9).to_bytes(4, "big")
    path.write_bytes(content)
    return path


def with_a_double_time(path: Path) -> Path:
    """The table of durations says that a frame between the clips, the only one with a duration of its own, has none."""
    content = bytearray(path.read_bytes())
    at = content.index(b"stts") + 12 + 8 + 4
    assert int.from_bytes(content[at - 4 : at], "big") == 1
    content[at : at + 4] = bytes(4)
    path.write_bytes(content)
    return path


def hiding_a_frame(path: Path) -> Path:
    """One packet of VP8 says that its frame is not shown: the bit `show_frame` of its first byte."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [bytes(packet) for packet in container.demux(video=0)][70]
    content[content.index(packet)] &= ~0x10
    path.write_bytes(content)
    return path


CLOSED = {"g": "12", "keyint_min": "12", "bf": "2", "sc_threshold": "0"}
VP9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "g": "12"}}
VP8 = {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8", "g": "12"}}
X265 = "keyint=12:min-keyint=12:bframes=3:log-level=none:pools=1:frame-threads=1"
SPARSE: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": CLOSED},
    "h264.mkv": {"options": CLOSED},
    "h264-10-bit.mov": {"options": CLOSED, "pix_fmt": "yuv420p10le"},
    "h264-variable.mp4": {"options": CLOSED, "pts": [n + n // 3 + 4 * (n // 50) for n in range(120)]},
    "h264-open-gop.mkv": {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": f"{X265}:open-gop=0"}},
    "hevc-open-gop.mp4": {"codec": "libx265", "options": {"x265-params": f"{X265}:open-gop=1"}},
    "hevc-open-gop.mkv": {"codec": "libx265", "options": {"x265-params": f"{X265}:open-gop=1"}},
    "vp8.webm": VP8,
    "vp9.webm": VP9,
    "vp9.mp4": VP9,
    "mpeg4.mkv": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12"}},
    "mpeg2.mkv": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ffv1.mkv": {"codec": "ffv1", "options": {"g": "12"}},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "without-cues.mkv": {"options": CLOSED, "change": without_cues},
}
# Decoded from the start after all: the run is refused, and the note says so.
REFUSED: dict[str, dict[str, Any]] = {
    "intra-refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0:scenecut=0"}},
    "open-gop-pyramid.mkv": {
        "options": {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:b-pyramid=normal:scenecut=0"}
    },
    "lying-index.mp4": {"options": CLOSED, "change": with_a_lying_index},
    "lying-index-of-mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12"}, "change": with_a_lying_index},
    "lying-index-of-vp9.mp4": {**VP9, "change": with_a_lying_index},
    "lying-index-of-hevc.mp4": {
        "codec": "libx265",
        "options": {"x265-params": f"{X265}:open-gop=0"},
        "change": with_a_lying_index,
    },
}
# The file itself tells that its frames or times are not known before they are decoded: no run is tried.
NOT_TRIED: dict[str, dict[str, Any]] = {
    "h264.ts": {"options": CLOSED},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "edit-list.mp4": {"options": CLOSED, "change": beginning_late},
    "vp8-hidden.webm": {**VP8, "change": hiding_a_frame},
}
# The file contradicts itself before anything is decoded: no run is tried, and the note says why.
CONTRADICTED: dict[str, dict[str, Any]] = {
    "lying-size.mp4": {"options": CLOSED, "change": with_a_lying_size},
    "lying-size-of-hevc.mp4": {
        "codec": "libx265",
        "options": {"x265-params": f"{X265}:open-gop=0"},
        "change": with_a_lying_size,
    },
    "double-times.mp4": {
        "options": {**CLOSED, "bf": "0"},
        "pts": [n + (n > 60) for n in range(120)],
        "change": with_a_double_time,
    },
}


def make(path: Path, count: int = 120, **options: Any) -> Path:
    change: Callable[[Path], Path] = options.pop("change", lambda made: made)
    return change(videos.write_video(path, noisy(count), **options))


def both(path: Path, plan: ClipPlan) -> list[tuple[video.Cut, videos.Image]]:
    """The clips by runs, and by decoding every frame."""
    found = []
    for cut in (video.cut_clips, video.cut_whole):
        sink = videos.Kept()
        made = cut(str(path), plan, height=48, width=64, sink=sink)
        found.append((made, np.stack(sink.clips)))
    return found


PLANS = [
    ClipPlan(6, stride=2, max_clips=3),
    ClipPlan(5, max_clips=4, fps=10.0),
    ClipPlan(4, max_clips=20, start_seconds=1.7, end_seconds=3.3, max_damaged_percent=100),
]


@pytest.mark.parametrize("name", [*SPARSE, *REFUSED, *NOT_TRIED, *CONTRADICTED])
def test_runs_give_the_clips_of_the_whole(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each codec and container, the very bytes and times; what cannot be decoded from the middle is found out."""
    path = make(tmp_path / name, **{**SPARSE, **REFUSED, **NOT_TRIED, **CONTRADICTED}[name])
    begun: list[str] = []
    honest = {name: getattr(video, name) for name in ("cut_part", "_cut_undamaged")}

    def counting(name: str) -> Callable[..., video.Cut]:
        def cut(*arguments: Any, **options: Any) -> video.Cut:
            begun.append(name)
            made: video.Cut = honest[name](*arguments, **options)
            return made

        return cut

    for each in honest:
        monkeypatch.setattr(video, each, counting(each))
    outcomes = set()
    for plan in PLANS:
        begun.clear()
        (cut, pixels), (whole, expected) = both(path, plan)
        np.testing.assert_array_equal(pixels, expected)
        assert (cut.start_times, cut.start_seconds, cut.fps) == (whole.start_times, whole.start_seconds, whole.fps)
        refused = cut.notes[:1] if cut.notes and cut.notes[0].startswith("decoded-whole") else ()
        assert (cut.damage, cut.notes) == (whole.damage, (*refused, *whole.notes))
        tried = "cut_part" in begun
        outcomes.add(("refused" if refused else "sparse") if tried else "contradicted" if refused else "not tried")
        assert len(begun) == (3 if tried and refused else 2)
    if name in REFUSED:  # a plan may be lucky
        assert "refused" in outcomes <= {"refused", "sparse"}
    else:
        kinds = {"sparse": SPARSE, "not tried": NOT_TRIED, "contradicted": CONTRADICTED}
        assert outcomes == {kind for kind, names in kinds.items() if name in names}


@pytest.mark.parametrize("name", CONTRADICTED)
def test_a_file_that_contradicts_itself_is_noted_where_it_matters(tmp_path: Path, name: str) -> None:
    """Probing for ingest gives the note, and none where every frame is decoded by plan."""
    path = make(tmp_path / name, **CONTRADICTED[name])
    decoder = InProcess()
    for plan, kinds in ((PLANS[0], ["decoded-whole"]), (ClipPlan(6), []), (ClipPlan(6, damaged="reject"), [])):
        found = decoder.probe(str(path), plan, part_seconds=600, seconds=60)
        notes = [note for note in found.notes if not note.startswith("header-says-more")]
        assert ([note.partition(":")[0] for note in notes], found.parts) == (kinds, ())


def superframe(*frames: bytes) -> bytes:
    """Frames of VP9 as one packet."""
    mark = bytes([0xC0 | 1 << 3 | len(frames) - 1])
    return b"".join([*frames, mark, *(len(frame).to_bytes(2, "little") for frame in frames), mark])


def test_the_shown_frames_of_vp9_are_counted() -> None:
    """By the header of each frame, also in superframes and in profile 3; what is no frame shows none."""
    key, hidden, again = b"\x82\x49\x83", b"\x84\x00\x00", b"\x88\x00"
    third, third_hidden = b"\xb1\x00", b"\xb0\x00"
    counts = {
        key: 1,
        hidden: 0,
        again: 1,
        third: 1,
        third_hidden: 0,
        superframe(hidden, key): 1,
        superframe(key, again): 2,
        superframe(hidden): 0,
        b"\x00": 0,
        b"\xff": 0,
    }
    for content, count in counts.items():
        assert probing._shown_by_vp9(av.Packet(content)) == count, content


def test_only_the_bytes_around_the_clips_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file in a store, the index and a stretch for each run; the pixels are those of the whole."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (240, 320, 3), np.uint8) for _ in range(10)] * 30
    path = videos.write_video(tmp_path / "a.mov", images, codec="mjpeg", pix_fmt="yuvj444p")
    size, read = path.stat().st_size, []
    assert size > 8 * 2**20
    honest = RangedFile.read

    def counting(file: RangedFile, size: int = -1) -> bytes:
        content = honest(file, size)
        read.append(len(content))
        return content

    monkeypatch.setattr(RangedFile, "read", counting)
    plan = ClipPlan(4, max_clips=2)
    (part,) = parts_of(probing.probe(str(path)), plan, 600)
    sinks = videos.Kept(), videos.Kept()
    for source, sink in zip((str(path), RangedFile.of(FileRange(str(path), size))), sinks, strict=True):
        video.cut_part(source, part, plan, height=48, width=64, sink=sink)
    np.testing.assert_array_equal(*(np.stack(sink.clips) for sink in sinks))
    assert 0 < sum(read) < 0.6 * size


def with_noise_in(content: bytes, packet: bytes) -> bytes:
    """Noise in the middle of the data of a picture, where only its decoder looks."""
    at = content.index(packet) + len(packet) // 2
    noise = np.random.default_rng(0).bytes(len(packet) // 4)
    return content[:at] + noise + content[at + len(noise) :]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_damage_at_a_clip_is_found_and_damage_elsewhere_changes_nothing(tmp_path: Path, name: str) -> None:
    """Where a run is damaged, clips, notes and lost seconds are those of every frame; elsewhere nobody looks."""
    plan = ClipPlan(6, max_clips=2)
    path = make(tmp_path / name, options=CLOSED)
    content, sound = path.read_bytes(), both(path, plan)[0][1]
    with av.open(str(path)) as container:
        packets = [
            (packet.pts * packet.time_base * 25, bytes(packet)) for packet in container.demux(video=0) if packet.size
        ]
    for number in (24, 48):
        (packet,) = [each for time, each in packets if round(time) == number]
        path.write_bytes(with_noise_in(content, packet))
        (cut, pixels), (whole, expected) = both(path, plan)
        np.testing.assert_array_equal(pixels, expected)
        assert cut.start_times == whole.start_times
        assert whole.damage is not None
        kinds = [note.partition(":")[0] for note in cut.notes]
        if number == 24:
            np.testing.assert_array_equal(pixels, sound[1:])
            assert (cut.damage, kinds) == (whole.damage, ["decoded-whole", "damaged"])
        else:
            np.testing.assert_array_equal(pixels, sound)
            assert (cut.damage, kinds) == (None, [])
        strict = dataclasses.replace(plan, damaged="reject")
        with pytest.raises(VideoError, match="decode-error"):
            video.cut_clips(str(path), strict, height=48, width=64, sink=videos.Kept())


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_damage_of_the_container_is_decoded_as_a_whole(tmp_path: Path, name: str) -> None:
    """Noise from one packet to another, between the clips: frames are missing from the list, and the clips the same."""
    path = videos.corrupt(make(tmp_path / name, options=CLOSED), start=0.45, end=0.5)
    (cut, pixels), (whole, expected) = both(path, ClipPlan(6, max_clips=2))
    np.testing.assert_array_equal(pixels, expected)
    assert (cut.start_times, cut.damage, cut.notes[1:]) == (whole.start_times, whole.damage, whole.notes)
    assert [note.partition(":")[0] for note in cut.notes] == ["decoded-whole", "damaged"]
