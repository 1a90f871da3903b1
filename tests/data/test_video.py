"""Decoding: which frames, their pixels, and what is rejected."""

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
import torch

from tests.data import videos
from vmoco.data import ledger, pixels, probing, video
from vmoco.data.clips import ClipPlan, start_indices
from vmoco.data.ledger import VideoError
from vmoco.data.probing import probe
from vmoco.data.timeline import Timeline

SETTINGS: dict[str, Any] = {"num_frames": 8, "stride": 2, "height": 48, "width": 64, "max_clips": 3}


@dataclasses.dataclass
class Decoded:
    """A cut video with its pixels."""

    frames: videos.Image
    start_times: list[int]
    start_seconds: list[float]
    fps: float
    notes: tuple[str, ...]
    damage: ledger.Damage | None


def cut_clips(source: Any, *, height: int, width: int, **plan: Any) -> Decoded:
    """The clips of a video."""
    sink = videos.Kept()
    cut = video.cut_clips(source, ClipPlan(**plan), height=height, width=width, sink=sink)
    return Decoded(np.stack(sink.clips), cut.start_times, cut.start_seconds, cut.fps, cut.notes, cut.damage)


def in_memory(path: Path) -> io.BytesIO:
    source = io.BytesIO(path.read_bytes())
    source.name = path.name
    return source


ENCODINGS = {
    "h264.mp4": {},
    "h264-b-frames.mkv": {"options": {"bf": "3", "g": "12"}},
    "h264.ts": {},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "h264-10-bit.mp4": {"pix_fmt": "yuv420p10le"},
    "h264-444.mp4": {"pix_fmt": "yuv444p"},
}


def numbers(cut: Decoded) -> list[list[int]]:
    return [[videos.number_of(frame) for frame in clip] for clip in cut.frames]


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_planned_frames_are_taken(tmp_path: Path, name: str) -> None:
    """For each codec and container, the frames of the clips are exactly those that `start_indices` names."""
    options: Any = ENCODINGS[name]
    path = videos.write_video(tmp_path / name, videos.images(60), **options)
    cut = cut_clips(str(path), **SETTINGS)
    starts = start_indices(60, num_frames=8, stride=2, max_clips=3)
    assert numbers(cut) == [[start + 2 * place for place in range(8)] for start in starts]
    assert cut.fps == pytest.approx(25)
    assert len(probe(str(path)).times) == 60
    assert np.diff(cut.start_seconds) == pytest.approx(np.diff(starts) / 25)
    assert cut.frames.shape == (3, 8, 48, 64, 3)


def test_pixels_are_those_of_an_antialiased_resize(tmp_path: Path) -> None:
    """Every frame is that of a plain sequential decode, resized by torch and cropped, to within 1 of 255 on average."""
    y, x = np.mgrid[0:180, 0:320]
    moving = [
        np.stack(
            [
                127 + 100 * np.sin(x / 9 + t / 3),
                127 + 100 * np.sin(y / 7 - t / 5),
                127 + 60 * np.sin((x + y) / 15) + 40 * np.cos(t / 4),
            ],
            axis=-1,
        ).astype(np.uint8)
        for t in range(40)
    ]
    path = videos.write_video(tmp_path / "a.mp4", moving, pix_fmt="yuv444p")
    cut = cut_clips(str(path), **SETTINGS)
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    starts = start_indices(40, num_frames=8, stride=2, max_clips=3)
    for clip, start in zip(cut.frames, starts, strict=True):
        for place, got in enumerate(clip):
            whole = torch.from_numpy(plain[start + 2 * place]).permute(2, 0, 1)[None].float()
            # 320 x 180 covers 64 x 48 at a height of 48, which is a width of 85.3.
            small = torch.nn.functional.interpolate(whole, (48, 85), mode="bilinear", antialias=True)[0]
            expected = small.permute(1, 2, 0).numpy()[:, 10 : 10 + 64]
            assert np.abs(got - expected).mean() < 1.0


def test_decoding_twice_gives_equal_bytes(tmp_path: Path) -> None:
    """From a path or from memory, the bytes are the same."""
    path = videos.write_video(tmp_path / "a.mp4", videos.images(30))
    first = cut_clips(str(path), **SETTINGS)
    second = cut_clips(in_memory(path), **SETTINGS)
    np.testing.assert_array_equal(first.frames, second.frames)
    assert (first.start_times, first.fps) == (second.start_times, second.fps)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_honoured(tmp_path: Path, rotation: int) -> None:
    """A video whose metadata asks for a turn is stored upright."""
    lying = [np.ascontiguousarray(np.rot90(image, -rotation // 90)) for image in videos.images(20)]
    path = videos.write_video(tmp_path / "a.mp4", lying, rotation=rotation)
    cut = cut_clips(str(path), **SETTINGS)
    assert numbers(cut) == [[2 + 2 * place for place in range(8)]]


# What FFmpeg's program does for a rotation (counter-clockwise, before the flips) and flips left-right and top-bottom.
ORIENTATIONS: dict[tuple[int, bool, bool], list[tuple[str, str]]] = {
    (0, False, False): [],
    (0, True, False): [("hflip", "")],
    (0, False, True): [("vflip", "")],
    (90, False, False): [("transpose", "cclock")],
    (90, True, False): [("transpose", "cclock"), ("hflip", "")],
    (90, False, True): [("transpose", "cclock"), ("vflip", "")],
    (180, False, False): [("hflip", ""), ("vflip", "")],
    (180, True, False): [("vflip", "")],
    (270, False, False): [("transpose", "clock")],
    (270, True, False): [("transpose", "clock"), ("hflip", "")],
    (270, True, True): [("transpose", "clock"), ("hflip", ""), ("vflip", "")],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_orientations_are_those_of_ffmpeg(tmp_path: Path, name: str, orientation: tuple[int, bool, bool]) -> None:
    """Turned, mirrored or both, the frames equal FFmpeg's filters, byte for byte; what is mirrored has a note."""
    rotation, *flips = orientation
    corner = np.full((72, 96, 3), 128, np.uint8)
    corner[:20, :30] = (250, 60, 60)
    frames = [np.roll(corner, 2 * step, axis=1) for step in range(10)]
    options: Any = {"pix_fmt": "yuv444p", "rotation": rotation, "flips": tuple(flips)}
    path = videos.write_video(tmp_path / name, frames, **options)
    expected = np.stack(videos.filtered(path, *ORIENTATIONS[orientation]))
    height, width = expected.shape[1:3]
    sink = videos.Kept()
    cut = video.cut_clips(str(path), ClipPlan(10), height=height, width=width, sink=sink)
    np.testing.assert_array_equal(sink.clips[0], expected)
    assert [note.partition(":")[0] for note in cut.notes] == ["mirrored"] * (sum(flips) % 2)


def two_streams(path: Path, first: dict[str, Any], second: dict[str, Any]) -> Path:
    """A file with two video streams: each has a codec, a size, frames, and perhaps a disposition."""
    with av.open(str(path), "w") as container:
        streams = []
        for each in (first, second):
            stream = container.add_stream(each["codec"], rate=25)
            stream.height, stream.width = each["frames"][0].shape[:2]
            stream.pix_fmt = each.get("pix_fmt", "yuv420p")
            stream.disposition = each.get("disposition", av.stream.Disposition(0))
            streams.append(stream)
        for stream, each in zip(streams, (first, second), strict=True):
            for number, image in enumerate(each["frames"]):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


DEFAULT = av.stream.Disposition.default
STILL = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "disposition": DEFAULT}
FILM = {"codec": "libx264", "frames": videos.images(20)}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({**STILL, "frames": videos.images(1, height=36, width=48)}, FILM, 1),
        ({**STILL, "frames": videos.images(1, height=360, width=480)}, FILM, 1),
        (FILM, {**STILL, "frames": videos.images(1, height=360, width=480)}, 0),
        ({**FILM, "frames": videos.images(20, height=36, width=48)}, FILM, 1),
        ({**FILM, "frames": videos.images(20, height=36, width=48), "disposition": DEFAULT}, FILM, 0),
        (FILM, FILM, 0),
        ({**STILL, "frames": videos.images(1)}, {**STILL, "frames": videos.images(1, height=36, width=48)}, 0),
    ],
    ids=["small-still", "large-still", "still-last", "largest", "default", "equal", "two-stills"],
)
@pytest.mark.parametrize("name", ["a.mkv", "a.mov"])
def test_the_film_is_chosen(tmp_path: Path, name: str, first: Any, second: Any, expected: int) -> None:
    """Of two streams the one that moves, then the larger or default one; the choice is noted, its frames are cut."""
    if name == "a.mov" and "disposition" not in {**first, **second}:
        expected = 0  # the muxer marks the first one as the default
    path = two_streams(tmp_path / name, first, second)
    line = probe(str(path))
    chosen = [stream["frames"] for stream in (first, second)][expected]
    assert (line.stream, len(line.times)) == (expected, len(chosen))
    assert line.notes == (f"stream-chosen: stream {expected} of 2 video streams is the film",)
    if len(chosen) > 1:
        assert numbers(cut_clips(str(path), **{**SETTINGS, "stride": 1, "num_frames": 20})) == [list(range(20))]


def test_the_shape_of_pixels_is_honoured(tmp_path: Path) -> None:
    """A video with pixels twice as wide as high is stored as it is shown."""
    wide = videos.images(20, height=72, width=192)
    squeezed = [np.ascontiguousarray(image[:, ::2]) for image in wide]
    path = videos.write_video(tmp_path / "a.mp4", squeezed, sample_aspect=Fraction(2))
    cut = cut_clips(str(path), **{**SETTINGS, "height": 36, "width": 96})
    assert numbers(cut) == [[2 + 2 * place for place in range(8)]]


@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 34), (300, 20), (72, 96)])
def test_any_size_covers_the_frame(tmp_path: Path, height: int, width: int) -> None:
    """Tiny and narrow videos are scaled up to cover the frame; a grey picture stays grey to its edges."""
    grey = [np.full((height, width, 3), 100, np.uint8)] * 20
    path = videos.write_video(tmp_path / "a.mkv", grey, codec="ffv1", pix_fmt="yuv444p")
    assert np.abs(cut_clips(str(path), **SETTINGS).frames.astype(int) - 100).max() <= 2


def test_a_wrong_count_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packets and frames differ, the clips are spread over the frames that are really there."""
    path = str(videos.write_video(tmp_path / "a.mp4", videos.images(60)))
    right = cut_clips(path, **SETTINGS)
    honest = probing._probe
    for wrong in (0, 50, 61, 200):

        def lying(*arguments: Any, wrong: int = wrong) -> Timeline:
            return dataclasses.replace(honest(*arguments), times=np.arange(wrong) * 512)

        monkeypatch.setattr(probing, "_probe", lying)
        cut = cut_clips(path, **SETTINGS)
        np.testing.assert_array_equal(cut.frames, right.frames)
        assert cut.start_times == right.start_times


def test_variable_frame_rate(tmp_path: Path) -> None:
    """The rate is the mean over the video, and a clip's start is its own time stamp."""
    stamps = [2 * number if number < 20 else 40 + number for number in range(40)]
    path = videos.write_video(tmp_path / "a.mp4", videos.images(40), pts=stamps, options={"bf": "0"})
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "max_clips": 2})
    starts = start_indices(40, num_frames=8, stride=1, max_clips=2)
    assert numbers(cut) == [list(range(start, start + 8)) for start in starts]
    assert cut.start_seconds == pytest.approx([stamps[start] / 25 for start in starts])
    assert cut.fps == pytest.approx(39 / (stamps[-1] / 25))


def test_a_target_rate_goes_by_time_stamps(tmp_path: Path) -> None:
    """Where frames come at 25 a second and then at 12.5, a rate of 12.5 takes every second one, and then every one."""
    stamps = [number if number < 20 else 20 + 2 * (number - 20) for number in range(40)]
    path = videos.write_video(tmp_path / "a.mp4", videos.images(40), pts=stamps, options={"bf": "0"})
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "num_frames": 10, "fps": 12.5})
    assert numbers(cut) == [list(range(0, 20, 2)), list(range(20, 30)), list(range(30, 40))]
    assert cut.start_seconds == pytest.approx([0, 20 / 25, 40 / 25])


def test_a_high_rate_repeats_frames(tmp_path: Path) -> None:
    """Above the rate of the video each frame is taken several times, also where two clips share one."""
    path = videos.write_video(tmp_path / "a.mkv", videos.images(6))
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "num_frames": 5, "fps": 75})
    assert numbers(cut) == [[0, 0, 0, 1, 1], [2, 2, 2, 3, 3], [4, 4, 4, 5, 5]]


def test_short_videos_loop_where_asked(tmp_path: Path) -> None:
    """The frames of a short video follow each other over and over."""
    path = videos.write_video(tmp_path / "a.mp4", videos.images(5))
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "short": "loop"})
    assert numbers(cut) == [[0, 1, 2, 3, 4, 0, 1, 2]]


def test_a_range_of_a_video(tmp_path: Path) -> None:
    """Only what is shown in the range is cut; an empty one says so."""
    path = videos.write_video(tmp_path / "a.mp4", videos.images(60))
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "start_seconds": 0.4, "end_seconds": 1.04})
    assert numbers(cut) == [list(range(10, 18)), list(range(18, 26))]
    with pytest.raises(VideoError, match="60 frames in the range that was asked for, and a clip spans 8"):
        cut_clips(str(path), **{**SETTINGS, "stride": 1, "start_seconds": 2.3})


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts", "a.mpg"])
@pytest.mark.parametrize("late", [0, 30])
def test_seconds_count_on_the_clock_of_the_container(tmp_path: Path, name: str, late: int) -> None:
    """Sound first, and pictures from second 1.2 on: a range means what a player shows in it; so without sound."""
    path = tmp_path / name
    mpeg = name == "a.mpg"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video" if mpeg else "libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 72, 96, "yuv420p"
        sound = container.add_stream("mp2", rate=48000, layout="mono") if late else None
        for number in range(40 if sound else 0):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
            tone.sample_rate, tone.pts, tone.time_base = 48000, 1152 * number, Fraction(1, 48000)
            container.mux(sound.encode(tone) if sound else [])
        for number, image in enumerate(videos.images(60)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number + late, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    start = 20 / 25 + late / 25 - 0.02
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "start_seconds": start, "end_seconds": start + 0.32})
    assert numbers(cut) == [list(range(20, 28))]


def joined(path: Path, *lengths: int, **options: Any) -> Path:
    """Recordings one after the other, byte by byte; their frames are numbered on."""
    content, first = b"", 0
    for length in lengths:
        frames = videos.images(first + length)[first:]
        content += videos.write_video(path.with_name(f"part-{path.name}"), frames, **options).read_bytes()
        first += length
    path.write_bytes(content)
    return path


JOINED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "two.ts": ((40, 60), {"options": {"bf": "2"}}),
    "three.ts": ((30, 19, 45), {}),
    "short.ts": ((5, 40), {}),
    "hevc.ts": (
        (40, 40),
        {"codec": "libx265", "options": {"x265-params": "log-level=none:pools=1:frame-threads=1"}},
    ),
    "mpeg2.ts": ((40, 30), {"codec": "mpeg2video", "options": {"bf": "2"}}),
    "mpeg2.mpg": ((40, 30), {"codec": "mpeg2video"}),
}


@pytest.mark.parametrize("name", JOINED)
def test_joined_recordings(tmp_path: Path, name: str) -> None:
    """Each recording gives its own clips, none crosses a seam, and times go on from one to the next."""
    lengths, options = JOINED[name]
    path = joined(tmp_path / name, *lengths, **options)
    line = probe(str(path))
    starts = np.cumsum([0, *lengths])
    assert line.seams == tuple(starts[1:-1])
    assert line.notes == (f"joined: {len(lengths)} recordings, one after the other",)
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "max_clips": 99})
    expected = []
    for first, length in zip(starts, lengths, strict=False):
        doubtful = [number - first for number in line.doubtful if first <= number < first + length]
        whole = min(doubtful, default=length)
        assert whole >= length - 4
        own = start_indices(whole, num_frames=8, stride=1, max_clips=99)
        expected += [list(range(first + start, first + start + 8)) for start in own]
    assert numbers(cut) == expected
    assert np.diff(cut.start_seconds) == pytest.approx(np.diff([clip[0] for clip in expected]) / 25, abs=0.002)


def test_the_end_of_a_joined_recording_may_be_incomplete(tmp_path: Path) -> None:
    """MPEG-TS counts its packets, and the count jumps at a seam: the frames there may be cut off, and are left out."""
    path = joined(tmp_path / "a.ts", 40, 40)
    assert probe(str(path)).doubtful == (38, 39)
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "num_frames": 39})
    assert numbers(cut) == [list(range(40, 79))]


def test_time_stamps_that_wrap(tmp_path: Path) -> None:
    """MPEG-TS counts to 2**33 (26.5 hours) and starts again: the video goes on as if nothing had happened."""
    wrapping = 2**33 * 25 // 90_000 - 20 - 35  # FFmpeg's muxer adds 1.4 s
    path = videos.write_video(tmp_path / "a.ts", videos.images(60), pts=[wrapping + number for number in range(60)])
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "max_clips": 99})
    assert numbers(cut) == [
        list(range(start, start + 8)) for start in start_indices(60, num_frames=8, stride=1, max_clips=99)
    ]
    assert np.diff(cut.start_seconds) == pytest.approx(np.diff([clip[0] for clip in numbers(cut)]) / 25, abs=0.002)


def pictures_of(path: Path, **options: Any) -> tuple[bytes, list[int]]:
    """The bytes of a film in MPEG-TS, and the place at which each of its pictures begins."""
    content = videos.write_video(path, videos.images(60), **{"options": {"bf": "2"}, **options}).read_bytes()
    places = [place for place in range(len(content)) if content.startswith(b"\x00\x00\x01\xe0", place)]
    assert len(places) == 60
    return content, places


def test_a_missing_time_stamp_is_that_between_its_neighbours(tmp_path: Path) -> None:
    """Of one picture in MPEG-TS: the same frames at the same rate as with it."""
    content, places = pictures_of(tmp_path / "whole.ts")
    whole = cut_clips(str(tmp_path / "whole.ts"), **{**SETTINGS, "stride": 1, "max_clips": 99})
    for picture in (0, 30, 58):
        lacking = bytearray(content)
        lacking[places[picture] + 7] &= 0x3F  # neither of the two stamps
        (tmp_path / "a.ts").write_bytes(lacking)
        line = probe(str(tmp_path / "a.ts"))
        assert (line.seams, line.broken, len(line.times)) == ((), None, 60)
        assert line.fps == pytest.approx(25, rel=0.02)
        cut = cut_clips(str(tmp_path / "a.ts"), **{**SETTINGS, "stride": 1, "max_clips": 99})
        assert numbers(cut) == numbers(whole)
        assert cut.start_seconds == pytest.approx(whole.start_seconds, abs=0.05)


def test_pictures_that_decode_in_another_order_than_they_are_shown(tmp_path: Path) -> None:
    """Whole pictures are missing without a report: the decoder finds a seam, and the note says so."""
    content, places = pictures_of(tmp_path / "whole.ts", options={"bf": "2", "g": "11"})
    first, second = (places[picture] // 188 * 188 for picture in (13, 24))
    shorter, counts = bytearray(content[:first] + content[second:]), dict.fromkeys(range(2**13), 0)
    for place in range(0, len(shorter), 188):  # the counter of each kind of packet, so that nothing is missing
        kind = int.from_bytes(shorter[place + 1 : place + 3], "big") & 0x1FFF
        shorter[place + 3] = shorter[place + 3] & 0xF0 | counts[kind] % 16
        counts[kind] += 1
    (tmp_path / "a.ts").write_bytes(shorter)
    assert probe(str(tmp_path / "a.ts")).seams == ()
    cut = cut_clips(str(tmp_path / "a.ts"), **{**SETTINGS, "stride": 1, "max_clips": 99})
    assert cut.notes == ("joined: 2 recordings, one after the other",)


def promising(path: Path, *, share: float = 1.0, **options: Any) -> Path:
    """A Matroska file whose header promises an hour, cut to a share of its bytes."""
    content = bytearray(videos.write_video(path, videos.images(60), **options).read_bytes())
    at = content.index(b"\x44\x89\x88") + 3
    content[at : at + 8] = np.array(3.6e6, ">f8").tobytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_a_header_that_promises_more_is_noted(tmp_path: Path, name: str) -> None:
    """Where the file is whole, all its frames are taken; where its end is missing too, it is truncated."""
    options = {"codec": "libvpx"} if name == "a.webm" else {}
    path = promising(tmp_path / name, **options)
    assert probe(str(path)).notes == ("header-says-more: it ends at 2.40 s, and the header promises 3600.00 s",)
    assert len(cut_clips(str(path), **{**SETTINGS, "max_clips": 99}).frames) == 4
    with pytest.raises(VideoError, match="truncated: it ends at"):
        probe(str(promising(tmp_path / name, share=0.7, **options)), damaged="reject")


@pytest.mark.parametrize("frames", ["2", "16"])
def test_frames_that_avi_counts_and_does_not_hold(tmp_path: Path, frames: str) -> None:
    """The muxer counts the empty places of reordered frames: the video is whole, and its frames are in order."""
    path = videos.write_video(tmp_path / "a.avi", videos.images(60), options={"bf": frames, "b-adapt": "0"})
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "max_clips": 99})
    assert numbers(cut) == [
        list(range(start, start + 8))
        for start in start_indices(len(probe(str(path)).times), num_frames=8, stride=1, max_clips=99)
    ]
    assert (np.diff(cut.start_seconds) > 0).all()


def test_a_bare_stream_has_seconds(tmp_path: Path) -> None:
    """Its frames have no stamps, and are counted at the rate that the stream states."""
    path = videos.write_video(tmp_path / "a.h264", videos.images(60))
    cut = cut_clips(str(path), **{**SETTINGS, "stride": 1, "fps": 12.5, "start_seconds": 0.4})
    assert numbers(cut) == [list(range(start, start + 16, 2)) for start in (10, 26, 42)]
    assert cut.start_seconds == pytest.approx([0.4, 1.04, 1.68])


def noisy(path: Path, **options: Any) -> Path:
    """A video with so much detail that every part of the file is picture data."""
    rng = np.random.default_rng(0)
    frames = [
        np.clip(image + rng.integers(-40, 40, image.shape), 0, 255).astype(np.uint8) for image in videos.images(60)
    ]
    return videos.write_video(path, frames, **options)


def text(path: Path) -> Path:
    path.write_text("this is no video\n" * 100)
    return path


def playlist(path: Path) -> Path:
    other = videos.write_video(path.with_name("other.ts"), videos.images(60))
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{other}\n#EXT-X-ENDLIST\n")
    return path


BROKEN: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "text.mp4": (text, "probe", "cannot-open"),
    "playlist.mp4": (playlist, "probe", "cannot-open"),
    "audio.mp4": (videos.write_audio, "probe", "no-video-stream"),
    "one-frame.mp4": (lambda path: videos.write_video(path, videos.images(1)), "clip", "too-few-frames"),
    "short.mp4": (lambda path: videos.write_video(path, videos.images(14)), "clip", "too-few-frames"),
    "no-index.mp4": (lambda path: videos.truncate(noisy(path), 0.6), "probe", "cannot-open"),
    "cut.mkv": (lambda path: videos.truncate(noisy(path), 0.6), "probe", "truncated"),
    "cut.webm": (lambda path: videos.truncate(noisy(path, codec="libvpx"), 0.6), "probe", "truncated"),
    "cut.avi": (
        lambda path: videos.truncate(noisy(path, codec="mjpeg", pix_fmt="yuvj420p"), 0.6),
        "probe",
        "truncated",
    ),
    "cut-fast-start.mp4": (
        lambda path: videos.truncate(noisy(path, container_options={"movflags": "faststart"}), 0.6),
        "probe",
        "truncated",
    ),
    "cut-header.mp4": (lambda path: videos.truncate(noisy(path), 0.001), "probe", "cannot-open"),
    "damaged-h264.mp4": (lambda path: videos.corrupt(noisy(path)), "decode", "decode-error"),
    "damaged-mpeg4.avi": (lambda path: videos.corrupt(noisy(path, codec="mpeg4")), "decode", "decode-error"),
    "damaged-vp9.mp4": (lambda path: videos.corrupt(noisy(path, codec="libvpx-vp9")), "decode", "decode-error"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_videos_are_rejected(tmp_path: Path, name: str) -> None:
    """Each kind of broken file has its reason where damage is rejected, the same from memory, without a place in it."""
    make, stage, reason = BROKEN[name]
    path = make(tmp_path / name)
    said = []
    for source in (str(path), in_memory(path)):
        with pytest.raises(VideoError) as caught:
            cut_clips(source, **SETTINGS, damaged="reject")
        assert (caught.value.stage, caught.value.reason) == (stage, reason), caught.value
        assert not caught.value.transient
        said.append(caught.value.message)
    assert said[0] == said[1]
    assert said[0]
    assert str(tmp_path) not in said[0]


def test_a_huge_frame_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame above the limit, as coded or as scaled, is rejected before memory is taken for it."""
    path = videos.write_video(tmp_path / "a.mp4", videos.images(20))
    monkeypatch.setattr(probing, "MAX_PIXELS", 96 * 72 - 1)
    with pytest.raises(VideoError, match=r"probe: frame-too-large: 96 x 72") as caught:
        cut_clips(str(path), **SETTINGS)
    monkeypatch.undo()
    monkeypatch.setattr(pixels, "MAX_PIXELS", 100_000)
    with pytest.raises(VideoError, match=r"decode: frame-too-large: 96 x 72 would be 1067 x 800 scaled") as caught:
        cut_clips(str(path), **{**SETTINGS, "height": 800, "width": 64})
    assert not caught.value.transient
