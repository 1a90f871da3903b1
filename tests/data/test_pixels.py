"""Stored pictures equal those of FFmpeg's own filters: interlaced, HDR, and every kind of pixel."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.data import videos
from tests.data.test_hdr import COLOURS, FFMPEG
from vmoco.data import probing, video
from vmoco.data.clips import ClipPlan
from vmoco.data.ledger import VideoError
from vmoco.data.parts import plan_parts
from vmoco.data.pixels import Scaler
from vmoco.data.timeline import plan_clips

SIZE, LARGE = (72, 96), (288, 384)
# The flags of our scaler. Chroma is sited as it sites it: at the left for a quarter of the samples, as in H.264.
SCALE = ("scale", "flags=bilinear+full_chroma_int+accurate_rnd+bitexact:in_chroma_loc=left")


def cut(path: Path, frames: int, size: tuple[int, int] = SIZE, **plan: Any) -> tuple[videos.Image, tuple[str, ...]]:
    """The first clip of a video at its own size, and the notes."""
    sink = videos.Kept()
    made = video.cut_clips(str(path), ClipPlan(frames, **plan), height=size[0], width=size[1], sink=sink)
    return sink.clips[0], made.notes


def moving(count: int, *, height: int = SIZE[0], width: int = SIZE[1]) -> list[videos.Image]:
    """A coloured pattern that moves to the right by 3 pixels a frame."""
    y, x = np.mgrid[0:height, 0:width]
    return [
        np.stack([127 + 100 * np.sin((x - 3 * t) / 7 + y / (9 + 5 * c)) for c in range(3)], axis=-1).astype(np.uint8)
        for t in range(count)
    ]


def interlaced(path: Path, count: int, *, codec: str, pix_fmt: str, top_first: bool = True, **options: str) -> Path:
    """A video whose frames hold two fields each, of two pictures of `moving`."""
    pictures = moving(2 * count)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"flags": "+ildct+ilme", **options})
        stream.height, stream.width, stream.pix_fmt = *SIZE, pix_fmt
        graph = av.filter.Graph()
        size: dict[str, Any] = {"width": SIZE[1], "height": SIZE[0], "format": "rgb24"}
        nodes = [graph.add_buffer(**size, time_base=Fraction(1, 25)), graph.add("format", pix_fmt)]
        nodes.append(graph.add("setfield", "tff" if top_first else "bff"))
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        for number in range(count):
            first, second = pictures[2 * number], pictures[2 * number + 1]
            woven = (first if top_first else second).copy()
            woven[1::2] = (second if top_first else first)[1::2]
            frame = av.VideoFrame.from_ndarray(woven, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            graph.push(frame)
            container.mux(stream.encode(graph.pull()))
        container.mux(stream.encode(None))
    return path


INTERLACED: dict[str, dict[str, Any]] = {
    "mpeg2.mpg": {"codec": "mpeg2video", "pix_fmt": "yuv420p"},
    "mpeg2-422.ts": {"codec": "mpeg2video", "pix_fmt": "yuv422p"},
    "h264.mp4": {"codec": "libx264", "pix_fmt": "yuv420p", "x264-params": "tff=1"},
    "h264-bottom.mkv": {"codec": "libx264", "pix_fmt": "yuv444p", "x264-params": "bff=1", "top_first": False},
    "h264-10-bit.mkv": {"codec": "libx264", "pix_fmt": "yuv422p10le", "x264-params": "tff=1"},
    "mpeg4.avi": {"codec": "mpeg4", "pix_fmt": "yuv420p"},
}


@pytest.mark.parametrize("name", INTERLACED)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_interlaced_frames_are_deinterlaced(tmp_path: Path, name: str, count: int) -> None:
    """Each frame equals that of FFmpeg's bwdif, to within 1 of 255, also the first and the last one."""
    path = interlaced(tmp_path / name, count, **INTERLACED[name])
    found, notes = cut(path, count)
    expected = videos.filtered(path, ("bwdif", "mode=send_frame:deint=interlaced"), SCALE)
    assert np.abs(found.astype(int) - np.stack(expected)).max() <= 1
    assert notes == ("deinterlaced: its frames are interlaced",)


def test_deinterlacing_can_be_switched_off(tmp_path: Path) -> None:
    """Then the fields stay interleaved: combed, and far from what the filter makes of them; progressive is as ever."""
    path = interlaced(tmp_path / "a.mkv", 8, codec="mpeg2video", pix_fmt="yuv422p")
    whole, notes = cut(path, 8, deinterlace="off")
    assert notes == ()
    assert np.abs(whole.astype(int) - cut(path, 8)[0]).mean() > 2
    plain = videos.write_video(tmp_path / "plain.mkv", moving(8), codec="mpeg2video", pix_fmt="yuv422p")
    np.testing.assert_array_equal(cut(plain, 8, deinterlace="off")[0], cut(plain, 8)[0])
    assert cut(plain, 8)[1] == ()


def test_frames_keep_their_numbers(tmp_path: Path) -> None:
    """Though a frame waits for the next one, each clip has its own frames and their times."""
    path = interlaced(tmp_path / "a.mkv", 40, codec="mpeg2video", pix_fmt="yuv422p")
    every, _ = cut(path, 40)
    sink = videos.Kept()
    made = video.cut_clips(str(path), ClipPlan(6, stride=2), height=SIZE[0], width=SIZE[1], sink=sink)
    starts = np.rint(np.array(made.start_seconds) * 25).astype(int)
    assert len(starts) == 3
    for clip, start in zip(sink.clips, starts, strict=True):
        np.testing.assert_array_equal(clip, every[start : start + 12 : 2])


def test_a_long_interlaced_video_is_decoded_as_a_whole(tmp_path: Path) -> None:
    """The first frame of a run needs the frame before it, so a run says that it cannot be cut, and the note says so."""
    path = interlaced(tmp_path / "a.mkv", 60, codec="mpeg2video", pix_fmt="yuv420p", g="10")
    line = probing.probe(str(path))
    few = ClipPlan(8, max_clips=2)
    (part,) = plan_parts(line, few, indices=plan_clips(line, few), seconds=600)
    with pytest.raises(VideoError, match="not-seekable: interlaced frames"):
        video.cut_part(str(path), part, few, height=SIZE[0], width=SIZE[1], sink=videos.Kept())
    sink, off = videos.Kept(), ClipPlan(8, max_clips=2, deinterlace="off")
    video.cut_part(str(path), part, off, height=SIZE[0], width=SIZE[1], sink=sink)
    assert len(sink.clips) == len(part.clips)
    made = video.cut_clips(str(path), few, height=SIZE[0], width=SIZE[1], sink=videos.Kept())
    assert [note.partition(":")[0] for note in made.notes] == ["decoded-whole", "deinterlaced"]


def hdr_video(
    path: Path, *, transfer: int, primaries: int, codec: str = "libx265", pix_fmt: str = "yuv444p10le"
) -> Path:
    """A patch of each of COLOURS, 6 x 4 of them, as HDR."""
    patches = np.array(COLOURS, np.uint16).reshape(4, 6, 3).repeat(SIZE[0] // 4, 0).repeat(SIZE[1] // 6, 1)
    with av.open(str(path), "w") as container:
        options = {"x265-params": "log-level=none:pools=1:frame-threads=1:qp=1"} if codec == "libx265" else {}
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *SIZE, pix_fmt
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, primaries, 9
        context.color_range = 1
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(patches, format="rgb48le").reformat(
                format=pix_fmt, dst_colorspace=9, dst_color_range=1, interpolation="POINT"
            )
            frame.pts, frame.time_base = number, Fraction(1, 25)
            frame.colorspace, frame.color_range = 9, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def patch_centres(picture: videos.Image) -> videos.Image:
    """The colour in the middle of each patch, in the order of COLOURS."""
    return picture[SIZE[0] // 8 :: SIZE[0] // 4, SIZE[1] // 12 :: SIZE[1] // 6].reshape(-1, 3)


@pytest.mark.parametrize(("transfer", "number"), [("pq", 16), ("hlg", 18)])
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.mp4", "libx265", "yuv444p10le"), ("a.mkv", "libx265", "yuv420p10le"), ("b.mkv", "ffv1", "yuv444p16le")],
)
def test_hdr_videos_look_as_ffmpeg_shows_them(
    tmp_path: Path, transfer: str, number: int, name: str, codec: str, pix_fmt: str
) -> None:
    """From the file to the stored picture: within 5 of 255 of FFmpeg's filters for 10 bits, 2 for 16; it is noted."""
    path = hdr_video(tmp_path / name, transfer=number, primaries=9, codec=codec, pix_fmt=pix_fmt)
    found, notes = cut(path, 4)
    expected = np.frombuffer(bytes.fromhex(FFMPEG[transfer, "bt2020"]), np.uint8).reshape(-1, 3)  # type: ignore[index]
    difference = np.abs(patch_centres(found[1]).astype(int) - expected)
    assert difference.max() <= (2 if codec == "ffv1" else 5), difference
    assert notes == (f"tone-mapped: its colours are HDR ({transfer.upper()})",)


def test_hdr_can_be_rejected_or_kept(tmp_path: Path) -> None:
    """Rejected, the reason names the option; kept, the codes are stored as they are; other videos are as ever."""
    path = hdr_video(tmp_path / "a.mkv", transfer=16, primaries=9, codec="ffv1", pix_fmt="yuv444p16le")
    with pytest.raises(VideoError, match=r"decode: hdr: its colours are HDR \(PQ\), and --hdr is reject"):
        cut(path, 4, hdr="reject")
    kept, notes = cut(path, 4, hdr="keep")
    assert notes == ()
    assert np.abs(patch_centres(kept[0]).astype(int) - np.array(COLOURS) / 257).max() <= 2
    plain = videos.write_video(tmp_path / "plain.mp4", moving(4))
    every = [cut(plain, 4, hdr=policy) for policy in ("reject", "keep", "tonemap")]
    for found, notes in every:
        np.testing.assert_array_equal(found, every[0][0])
        assert notes == ()


# Kinds of pixels: encoder, format, what the stream says of its matrix and range, and how near FFmpeg's own RGB is.
KINDS: dict[str, tuple[str, str, int, int, int]] = {
    "alpha.mov": ("png", "rgba", 2, 0, 0),
    "alpha-yuv.mkv": ("ffv1", "yuva420p", 2, 0, 0),
    "palette.gif": ("gif", "rgb8", 2, 0, 0),
    "grey.mkv": ("ffv1", "gray", 2, 0, 0),
    "grey-10-bit.mkv": ("ffv1", "gray10le", 2, 0, 1),
    "grey-16-bit.mkv": ("ffv1", "gray16le", 2, 0, 1),
    "black-and-white.mov": ("png", "monob", 2, 0, 0),
    "rgb.mkv": ("ffv1", "bgr0", 2, 0, 0),
    "rgb-planes.avi": ("magicyuv", "gbrp", 2, 0, 0),
    "rgb-16-bit.mkv": ("ffv1", "gbrp16le", 2, 0, 1),
    "rgb-48.mov": ("png", "rgb48be", 2, 0, 1),
    "9-bit.mkv": ("ffv1", "yuv420p9le", 2, 0, 0),
    "12-bit.mkv": ("ffv1", "yuv422p12le", 2, 0, 0),
    "16-bit.mkv": ("ffv1", "yuv444p16le", 2, 0, 0),
    "410.mkv": ("ffv1", "yuv410p", 2, 0, 0),
    "411.mkv": ("ffv1", "yuv411p", 2, 0, 0),
    "440.mkv": ("ffv1", "yuv440p", 2, 0, 0),
    "packed.mkv": ("rawvideo", "yuyv422", 2, 0, 0),
    "full-range.mkv": ("ffv1", "yuv444p", 2, 2, 0),
    "full-range-jpeg.avi": ("mjpeg", "yuvj420p", 2, 2, 0),
    "limited-709.mkv": ("ffv1", "yuv444p", 1, 1, 0),
    "full-709.mkv": ("ffv1", "yuv420p", 1, 2, 0),
    "fcc.mkv": ("ffv1", "yuv444p", 4, 1, 0),
    "bt601.mkv": ("ffv1", "yuv444p", 6, 1, 0),
    "smpte240.mkv": ("ffv1", "yuv444p", 7, 1, 0),
    "bt2020.mkv": ("ffv1", "yuv444p10le", 9, 1, 0),
    "unspecified.mkv": ("ffv1", "yuv444p", 2, 1, 0),
    "reserved-matrix.mkv": ("ffv1", "yuv444p", 3, 1, 0),
    "identity-matrix.mkv": ("ffv1", "yuv444p", 0, 1, 0),
}


ROOT = Path(__file__).parents[2]
WITHOUT_CPU_FLAGS = """
import ctypes, sys
from pathlib import Path
import av
(library,) = {line.split()[-1] for line in open("/proc/self/maps") if "libavutil" in line}
utilities = ctypes.CDLL(library)
assert utilities.av_get_cpu_flags() != 0
utilities.av_force_cpu_flags(0)
from tests.data.test_pixels import digest
for path in sys.argv[1:]:
    print(digest(Path(path)))
assert utilities.av_get_cpu_flags() == 0
"""


def digest(path: Path) -> str:
    """Of the frames of a video, at their own size and at a smaller one."""
    return hashlib.sha256(b"".join(cut(path, 5, size)[0].tobytes() for size in (LARGE, SIZE))).hexdigest()


def psnr(one: videos.Image, other: videos.Image) -> float:
    """In dB."""
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


def write_kind(path: Path, codec: str, pix_fmt: str, *, matrix: int, range_: int, size: tuple[int, int] = SIZE) -> Path:
    """Five frames of `moving`, whose stream and frames state a matrix and a range."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, range_
        for number, image in enumerate(moving(5, height=size[0], width=size[1])):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            frame.colorspace, frame.color_range = matrix, range_
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_pixel_is_as_ffmpeg_shows_it(tmp_path: Path, name: str) -> None:
    """The stored RGB equals that of FFmpeg's own filters, to within the difference that KINDS states."""
    codec, pix_fmt, matrix, range_, tolerance = KINDS[name]
    path = write_kind(tmp_path / name, codec, pix_fmt, matrix=matrix, range_=range_)
    found, notes = cut(path, 5)
    # These encoders do not say where chroma samples lie, and then FFmpeg's filter and ours agree without being told.
    expected = np.stack(videos.filtered(path, (SCALE[0], SCALE[1].removesuffix(":in_chroma_loc=left"))))
    assert np.abs(found.astype(int) - expected).max() <= tolerance
    assert found.std() > 20, "a picture"
    assert notes == ()


@pytest.mark.parametrize("name", KINDS)
def test_a_frame_that_shrinks_is_scaled_in_its_planes(tmp_path: Path, name: str) -> None:
    """At most one level from FFmpeg's scaling to RGB at once, which others are equal to, and 50 dB from a resize."""
    codec, pix_fmt, matrix, range_, tolerance = KINDS[name]
    path = write_kind(tmp_path / name, codec, pix_fmt, matrix=matrix, range_=range_, size=LARGE)
    found, _ = cut(path, 5)
    flags = SCALE[1].removesuffix(":in_chroma_loc=left")
    at_once = np.stack(videos.filtered(path, ("scale", f"w={SIZE[1]}:h={SIZE[0]}:{flags}")))
    in_planes = pix_fmt.startswith("yuv") and pix_fmt != "yuva420p"
    assert np.abs(found.astype(int) - at_once).max() <= max(tolerance, in_planes)
    assert not in_planes or (found != at_once).any(), "the rounding of planes"
    whole = torch.from_numpy(np.stack(videos.filtered(path, (SCALE[0], flags)))).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(whole, SIZE, mode="bilinear", antialias=True)
    expected = resized.permute(0, 2, 3, 1).round().numpy()
    # Each bit of black and white is a jump, and chroma of a quarter of the columns depends on how it is widened.
    least = {"black-and-white.mov": 30, "410.mkv": 34, "411.mkv": 37, "palette.gif": 48}.get(name, 50)
    assert psnr(found, expected) >= least


def test_scaling_gives_the_same_bytes_on_every_cpu(tmp_path: Path) -> None:
    """With all of FFmpeg's code for this CPU switched off, also in the planes of a frame that shrinks."""
    paths = [
        write_kind(tmp_path / name, codec, pix_fmt, matrix=matrix, range_=range_, size=LARGE)
        for name, (codec, pix_fmt, matrix, range_, _) in KINDS.items()
    ]
    command = [sys.executable, "-c", WITHOUT_CPU_FLAGS, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=True)
    assert done.stdout.splitlines() == [digest(path) for path in paths]


@pytest.mark.parametrize(("matrix", "read_as"), [(8, 2), (10, 9), (11, 2), (12, 2), (14, 2)])
def test_a_matrix_that_ffmpeg_does_not_convert_is_noted(tmp_path: Path, matrix: int, read_as: int) -> None:
    """FFmpeg's program fails on it. The video is stored as if it stated none, or the nearest one, and has a note."""
    found, notes = cut(write_kind(tmp_path / "a.mkv", "ffv1", "yuv444p", matrix=matrix, range_=1), 5)
    expected, none = cut(write_kind(tmp_path / "b.mkv", "ffv1", "yuv444p", matrix=read_as, range_=1), 5)
    np.testing.assert_array_equal(found, expected)
    assert notes == (f"unknown-matrix: FFmpeg does not convert from its colour matrix {matrix}",)
    assert none == ()


def test_frames_with_exif_are_shown() -> None:
    """Side data of a kind that PyAV cannot name does not reject a video; its orientation counts."""
    image = Image.fromarray(np.repeat(np.arange(0, 240, 5, dtype=np.uint8)[:, None, None], 48, 1).repeat(3, 2))
    exif = Image.Exif()
    exif[0x112] = 3
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=95)
    (frame,) = av.CodecContext.create("mjpeg", "r").decode(av.Packet(file.getvalue()))
    stored = Scaler(height=48, width=48).scale(frame)
    assert np.abs(stored.astype(int) - np.asarray(image)[::-1, ::-1]).mean() < 3
