"""Clips of folders of numbered pictures: those of a video of the same frames, and none with a damaged picture."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from tests.data import videos
from tests.data.test_ingest_tasks import settings
from tests.data.test_tar_files import made, pixels
from tests.dataset import stored_frames
from tests.store import BUCKET, Store
from vmoco import storage
from vmoco.data import pictures, video
from vmoco.data.clips import ClipPlan
from vmoco.data.decoder import Decoder
from vmoco.data.frame_folder import list_frame_folders
from vmoco.data.ledger import VideoError
from vmoco.data.manifest import shard_uri
from vmoco.data.parts import plan_parts
from vmoco.data.source import PictureFolder, ranged
from vmoco.data.timeline import plan_clips

SIZE: dict[str, Any] = {"height": 24, "width": 32}


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    started = Decoder()
    yield started
    started.close()


def encoded(image: videos.Image, kind: str, *, orientation: int = 1, **options: Any) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    if orientation != 1:
        exif[0x112] = orientation
        options["exif"] = exif
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def write_pictures(folder: Path, images: list[videos.Image], name: str = "frame_{:06d}.png", first: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    kind = "PNG" if name.endswith("png") else "JPEG"
    for number, image in enumerate(images, start=first):
        (folder / name.format(number)).write_bytes(encoded(image, kind, **({"quality": 95} if kind == "JPEG" else {})))
    return folder


def in_colour(count: int, *, height: int = 72, width: int = 96) -> list[videos.Image]:
    """Numbered frames with colour, so that a wrong conversion shows."""
    frames = videos.images(count, height=height, width=width)
    for frame in frames:
        frame[: height // 6] = (200, 40, 60)
        frame[-height // 6 :] = np.linspace((20, 90, 160), (230, 180, 40), width).astype(np.uint8)
    return frames


def folder_of(path: Path, fps: float = 25) -> PictureFolder:
    listing = list_frame_folders(str(path), fps)
    (found,) = listing.videos
    source = ranged(listing.root, found)
    assert isinstance(source, PictureFolder)
    return source


def cut(path: Path, plan: ClipPlan, *, fps: float = 25) -> tuple[list[videos.Image], video.Cut]:
    kept = videos.Kept()
    done = pictures.cut(folder_of(path, fps), plan, part=None, sink=kept, **SIZE)
    return kept.clips, done


def cut_video(path: Path, plan: ClipPlan) -> tuple[list[videos.Image], video.Cut]:
    kept = videos.Kept()
    done = video.cut_clips(str(path), plan, sink=kept, **SIZE)
    return kept.clips, done


PLANS = [
    ClipPlan(4),
    ClipPlan(4, stride=3, max_clips=2),
    ClipPlan(5, fps=25, stride=2),
    ClipPlan(4, start_seconds=0.2, end_seconds=0.83),
    ClipPlan(40, short="loop"),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_clips_are_those_of_a_video_without_loss(tmp_path: Path, plan: ClipPlan) -> None:
    """PNG pictures give the pixels, seconds and rate of the FFV1 video of the same frames at that rate."""
    frames = in_colour(33)
    film = videos.write_video(tmp_path / "a.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    expected, whole = cut_video(film, plan)
    clips, done = cut(write_pictures(tmp_path / "a", frames), plan)
    assert len(clips) == len(expected) > 0
    for clip, other in zip(clips, expected, strict=True):
        assert np.abs(clip.astype(int) - other).max() <= 1  # swscale rounds rgb24 and bgr0 alike to a grey level
    assert done.start_seconds == pytest.approx(whole.start_seconds, abs=1e-3)
    assert done.fps == pytest.approx(whole.fps)


def test_clips_are_those_of_the_same_pictures_in_a_container(tmp_path: Path) -> None:
    """JPEG pictures, put into AVI as they are: the same bytes. Of the frames that were coded they are near."""
    frames = in_colour(30)
    folder = write_pictures(tmp_path / "a", frames, "img_{}.jpg")
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 72, "yuvj420p"
        for number in range(30):
            packet = av.Packet((folder / f"img_{number + 1}.jpg").read_bytes())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, 25), stream
            container.mux(packet)
    for plan in PLANS[:4]:
        (clips, done), (expected, whole) = cut(folder, plan), cut_video(tmp_path / "a.avi", plan)
        assert np.array_equal(clips, expected)
        assert done.start_seconds == whole.start_seconds
    exact, _ = cut(write_pictures(tmp_path / "png", frames), PLANS[0])
    assert np.abs(np.array(cut(folder, PLANS[0])[0], int) - np.array(exact)).mean() < 3


def test_only_pictures_of_clips_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long folder, a few."""
    folder = write_pictures(tmp_path / "a", videos.images(60))
    read, real = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: read.append(uri) or real(uri))
    clips, _ = cut(folder, ClipPlan(4, max_clips=2))
    assert [videos.number_of(frame) for frame in clips[0]] == [13, 14, 15, 16]
    assert len(read) == 8


def damage_some(folder: Path, numbers: set[int], how: str) -> None:
    for number in numbers:
        path = folder / f"frame_{number:06d}.png"
        content = path.read_bytes()
        if how == "missing":
            path.unlink()
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "cut off":
            path.write_bytes(content[: len(content) * 2 // 3])
        elif how == "no picture":
            path.write_bytes(b"no picture")
        else:  # one byte
            path.write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])


@pytest.mark.parametrize("how", ["missing", "empty", "cut off", "no picture", "one byte"])
@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(numbers=strategies.sets(strategies.integers(2, 29), min_size=1, max_size=9))
def test_no_clip_holds_a_damaged_picture(tmp_path_factory: pytest.TempPathFactory, how: str, numbers: set[int]) -> None:
    """Kept are the clips of the whole folder that have only sound pictures; the lost seconds are those of others."""
    folder = write_pictures(tmp_path_factory.mktemp("in") / "a", videos.images(31), first=0)
    plan = ClipPlan(4, max_damaged_percent=100)
    whole, _ = cut(folder, plan)
    damage_some(folder, numbers, how)
    sound = [clip for clip in whole if not numbers & {videos.number_of(frame) for frame in clip}]
    if not sound:
        with pytest.raises(VideoError, match="no clip is without damage"):
            cut(folder, plan)
        return
    clips, done = cut(folder, plan)
    assert np.array_equal(clips, sound)
    touched = numbers & {videos.number_of(frame) for clip in whole for frame in clip}
    if how == "missing" or touched:
        assert done.damage is not None
        lost = {
            place for place in range(31) if any(start <= place / 25 + 1e-6 < end for start, end in done.damage.lost)
        }
        assert lost == numbers
        assert done.damage.percent == pytest.approx(100 * len(numbers) / 31, abs=0.01)
    with pytest.raises(VideoError) as refused:
        cut(folder, ClipPlan(4, damaged="reject")) if how == "missing" or touched else cut(folder, ClipPlan(99))
    assert refused.value.reason in ("missing-pictures", "decode-error", "too-few-frames")


def test_a_folder_that_has_lost_more_is_rejected(tmp_path: Path) -> None:
    """--max-damaged-percent counts missing pictures; the sentence names their numbers."""
    folder = write_pictures(tmp_path / "a", videos.images(20))
    for number in (7, 11, 12, 13):
        (folder / f"frame_{number:06d}.png").unlink()
    with pytest.raises(
        VideoError, match=r"missing-pictures: more than 10 %: 20.0 % is lost .*4 of 20 pictures are miss"
    ):
        cut(folder, ClipPlan(4, max_damaged_percent=10))
    with pytest.raises(VideoError, match=r"missing-pictures: 4 of 20 pictures are missing: number 7, 11-13"):
        pictures.probe(folder_of(folder), damaged="reject")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_that_is_cut_off_is_damaged(kind: str) -> None:
    """Wherever it ends, progressive or not: never a frame."""
    image = in_colour(6)[5]
    many = [encoded(image, kind, **options) for options in ([{}, {"progressive": True}] if kind == "JPEG" else [{}])]
    decoder = pictures._Decoder(PictureFolder("", folder_kind(kind), 0))
    for content in many:
        assert decoder.decode("whole", content).width == 96
        for size in [*range(0, len(content) - 20, max(1, len(content) // 60)), *range(len(content) - 20, len(content))]:
            with pytest.raises(VideoError) as caught:
                decoder.decode("frame_1.jpg", content[:size])
            assert caught.value.reason == "decode-error"
            assert caught.value.message.startswith("frame_1.jpg: ")


def folder_kind(kind: str) -> Any:
    from vmoco.data.found import Pictures

    return Pictures(25, "frame_", "jpeg" if kind == "JPEG" else "png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_are_shown_as_their_exif_orientation_says(tmp_path: Path, kind: str) -> None:
    """All eight orientations in one folder, turned and mirrored ones mixed: each frame looks as Pillow shows it."""
    from PIL import ImageOps

    (tmp_path / "a").mkdir()
    expected = []
    for number, orientation in enumerate([1, 2, 3, 4, 5, 6, 7, 8, 3, 2]):
        content = encoded(in_colour(1, height=72, width=72)[0], kind, orientation=orientation)
        (tmp_path / f"a/{number}.{kind.lower()}").write_bytes(content)
        expected.append(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    kept = videos.Kept()
    pictures.cut(folder_of(tmp_path / "a"), ClipPlan(10), part=None, sink=kept, height=72, width=72)
    for frame, image in zip(kept.clips[0], expected, strict=True):
        assert np.abs(frame.astype(int) - np.asarray(image)).mean() < 3


def test_pictures_of_several_sizes_are_noted(tmp_path: Path) -> None:
    """Each is scaled to cover the stored size, as frames of a video that changes its size."""
    write_pictures(tmp_path / "a", videos.images(8))
    (tmp_path / "a/frame_000003.png").write_bytes(encoded(videos.numbered_image(2, height=144, width=192), "PNG"))
    clips, done = cut(tmp_path / "a", ClipPlan(4))
    assert [videos.number_of(frame) for clip in clips for frame in clip] == list(range(8))
    assert done.notes == ("sizes-differ: its pictures have 2 sizes, such as 96x72, 192x144",)


def test_numbers_may_go_up_in_steps(tmp_path: Path) -> None:
    """Every fifth number: nothing is missing, and it is noted."""
    (tmp_path / "a").mkdir()
    for number, image in enumerate(videos.images(8)):
        (tmp_path / f"a/{number * 5 + 2:05d}.png").write_bytes(encoded(image, "PNG"))
    clips, done = cut(tmp_path / "a", ClipPlan(4), fps=6)
    assert [videos.number_of(frame) for clip in clips for frame in clip] == list(range(8))
    assert done.fps == 6
    assert pictures.probe(folder_of(tmp_path / "a")).notes == ("numbers-step: the numbers of its pictures go up by 5",)


@pytest.mark.parametrize("place", ["local", "store"])
def test_a_task_of_ingest_reads_folders(tmp_path: Path, store: Store, place: str) -> None:
    """From disk and from a store: rows, labels, parts of a long folder, a ledger row for the missing picture."""
    write_pictures(tmp_path / "in/run/one", videos.images(6), "img_{:05d}.jpg")
    write_pictures(tmp_path / "in/jump/two", videos.images(22))
    write_pictures(tmp_path / "in/jump/gap", videos.images(9))
    (tmp_path / "in/jump/gap/frame_000002.png").unlink()
    root = str(tmp_path / "in")
    if place == "store":
        root = f"s3://{BUCKET}/in"
        for path in (tmp_path / "in").rglob("*.*g"):
            storage.write_atomic(f"{root}/{path.relative_to(tmp_path / 'in')}", path.read_bytes())
    values: dict[str, Any] = {"videos": root, "layout": "frames", "fps": 10}
    chosen = settings(tmp_path, **values, part_seconds=1, output=str(tmp_path / "out"))
    decoder = Decoder()  # its process takes the address of the store from the environment
    probed, shard = made(chosen, decoder)
    assert {each.found.video_id: len(each.parts) for each in probed} == {"jump/gap": 0, "jump/two": 2, "run/one": 0}
    assert {(row["video_id"], row["label"], row["fps"]) for row in shard.rows} == {
        ("jump/gap", "jump", 10.0),
        ("jump/two", "jump", 10.0),
        ("run/one", "run", 10.0),
    }
    for row, clip in zip(shard.rows, stored_frames(shard_uri(chosen.output, shard.name)), strict=True):
        first = round(row["start_seconds"] * 10)
        assert [videos.number_of(frame) for frame in clip] == list(range(first, first + 4))
    (loss,) = shard.losses
    assert (loss.video_id, loss.lost) == ("jump/gap", ((0.1, 0.2),))
    whole = settings(tmp_path, **values, output=str(tmp_path / "whole"))
    assert pixels(whole, made(whole, decoder)[1]) == pixels(chosen, shard)
    decoder.close()


def test_a_part_with_a_damaged_picture_is_not_seekable(tmp_path: Path, decoder: Decoder) -> None:
    """So that the folder is decoded in one go, which finds all that is lost."""
    folder = write_pictures(tmp_path / "in/a", videos.images(90))
    path = folder / "frame_000047.png"
    path.write_bytes(path.read_bytes()[:-40] + b"\0" * 40)
    chosen = settings(tmp_path, layout="frames", fps=25, part_seconds=1, max_clips_per_video=30)
    probed, shard = made(chosen, decoder)
    assert len(probed[0].parts) == 4
    assert [row.reason for row in shard.rejected] == ["not-seekable"]
    whole = settings(tmp_path, layout="frames", fps=25, max_clips_per_video=30, output=str(tmp_path / "whole"))
    _, shard = made(whole, decoder)
    assert shard.losses[0].lost == ((1.84, 1.88),)


def test_a_part_that_cannot_be_read_for_now_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that fails to be read does not make a part one that cannot be decoded alone, which is for good."""
    source = folder_of(write_pictures(tmp_path / "in/a", videos.images(90)))
    line, plan = pictures.probe(source), ClipPlan(4)
    part, *_ = plan_parts(line, plan, indices=plan_clips(line, plan), seconds=1)

    def fail(uri: str) -> bytes:
        raise OSError(f"AWS Error NETWORK_CONNECTION: {uri}")

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(VideoError, match="read: read-error: AWS Error") as caught:
        pictures.cut(source, plan, part=part, sink=videos.Kept(), **SIZE)
    assert caught.value.transient


def test_a_folder_that_changes_is_told(tmp_path: Path) -> None:
    """A picture more than when it was listed, or a folder that is gone."""
    folder = folder_of(write_pictures(tmp_path / "a", videos.images(8)))
    (tmp_path / "a/frame_000009.png").write_bytes(b"x")
    with pytest.raises(VideoError, match=r"changed: \d+ bytes of pictures when it was listed"):
        pictures.probe(folder)
    for path in (tmp_path / "a").iterdir():
        os.remove(path)
    (tmp_path / "a").rmdir()
    with pytest.raises(VideoError, match="missing: it was listed, but is gone"):
        pictures.probe(folder)
