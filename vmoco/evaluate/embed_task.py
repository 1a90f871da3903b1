"""The work of one actor of an embedding job: clips of a data set or of videos become a part of the table.

It does not use Ray. Clips come from the shards of a data set, or from videos that it decodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from vmoco import storage
from vmoco.data import source
from vmoco.data.decoder import Decoder, StoredClips
from vmoco.data.ledger import Damage, Loss, Rejection, VideoError, attributed
from vmoco.data.shard_reader import ClipReader
from vmoco.encoders.dense import SlidingWindow, slide
from vmoco.encoders.encoder import Encoder, VideoClips
from vmoco.evaluate.features import Frames, Window, embed_batch, embed_views, mean_colour, without_colour
from vmoco.evaluate.table import part_bytes, part_uri
from vmoco.job_settings import ShortVideos
from vmoco.seed import hash64

Made = TypeVar("Made")
_Clip = tuple[dict[str, Any], Frames]
"""A row of the table, and the frames that the encoder sees."""


@dataclasses.dataclass(frozen=True)
class Work:
    """How clips are embedded; equal for all items of a job."""

    output: str
    """Folder of the table."""
    window: Window
    """Which frames of a stored clip the encoder sees."""
    batch_size: int
    colour: bool = True
    """False removes the colour of clips first (`without_colour`)."""
    views: tuple[tuple[int, ...], ...] = ()
    """For clips of a data set: numbers of the stored frames that each view shows; `window` is not used then. A row has
    the features of all views, one after the other."""
    max_clips_per_video: int = 32
    seconds_per_video: float = 600.0
    short_videos: ShortVideos = "reject"
    sliding: SlidingWindow | None = None
    """For videos: their clips, instead of `max_clips_per_video` that lie side by side."""
    device: str = "cpu"
    num_threads: int | None = None
    """Threads of torch; None keeps the present number."""


class EmbedTask:
    """Makes parts of a table of embeddings.

    Args:
        encoder: in evaluation mode.
        work: see `Work`.
    """

    def __init__(self, encoder: Encoder, work: Work) -> None:
        if work.num_threads:
            torch.set_num_threads(work.num_threads)
        self._encoder = encoder.to(work.device).eval()
        self._decoder = Decoder()  # its process starts with the first video
        self._work = work

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Makes one part.

        Args:
            item: `part`, its name; `plan`, JSON: a data set and rows of its manifest, or a folder and videos.

        Returns:
            `clips`, their number; `error`, an error message that the user can act on, or empty.
        """
        plan = json.loads(item["plan"])
        rejected: list[Rejection] = []
        losses: list[Loss] = []
        try:
            if "videos" not in plan:
                rows, features = self._embed(self._of_data_set(plan))
            elif self._work.sliding:
                rows, features = self._slide(plan, self._work.sliding, rejected, losses)
            else:
                rows, features = self._embed(self._of_videos(plan, rejected, losses))
            content = part_bytes(rows, features, rejected=rejected, losses=losses)
            storage.write_atomic(part_uri(self._work.output, item["part"]), content)
        except (OSError, ValueError) as error:  # as a value: Ray would wrap an exception in its own stack
            return {"clips": 0, "error": str(error)}
        return {"clips": len(rows), "error": ""}

    def _embed(self, clips: Iterable[_Clip]) -> tuple[list[dict[str, Any]], npt.NDArray[np.float32]]:
        """Rows and features of clips, in batches of one size."""
        rows: list[dict[str, Any]] = []
        width = self._encoder.feature_dim * max(len(self._work.views), 1)
        parts = [torch.zeros(0, width)]  # a part may have no clips
        clips = iter(clips)
        while batch := list(itertools.islice(clips, self._work.batch_size)):
            rows += [row for row, _ in batch]
            if self._work.views:
                clips_of = [frames for _, frames in batch]
                parts.append(embed_views(self._encoder, clips_of, self._work.views, colour=self._work.colour))
                continue
            seen = [frames if self._work.colour else without_colour(frames) for _, frames in batch]
            parts.append(embed_batch(self._encoder, seen))
        return rows, torch.cat(parts).numpy()

    def _of_data_set(self, plan: dict[str, Any]) -> Iterator[_Clip]:
        shape, rows = tuple(plan["frame_shape"]), plan["rows"]
        table = pa.Table.from_pylist(rows)
        reader = ClipReader(plan["data_set"], table, frame_shape=shape, encoding=plan["encoding"], crop=True)
        seen = self._work.window.numbers(shape[0])
        for row, frames in zip(rows, reader.several(range(len(rows))), strict=True):  # all frames: for the mean colour
            shown = frames if self._work.views else frames[seen.start : seen.stop : seen.step]
            yield row | {"colour": mean_colour(frames).tolist()}, shown

    def _of_videos(self, plan: dict[str, Any], rejected: list[Rejection], losses: list[Loss]) -> Iterator[_Clip]:
        """Clips of videos that lie side by side."""

        def cut(path: str) -> VideoClips:
            return self._encoder.cut_video(
                path,
                decoder=self._decoder,
                max_clips=self._work.max_clips_per_video,
                seconds=self._work.seconds_per_video,
                short_videos=self._work.short_videos,
            )

        for video, made in self._each_video(plan, cut, rejected):
            if made.damage:
                losses.append(video.loss(made.damage))
            for place, frames in enumerate(made.frames):
                starts = (made.start_times[place], made.start_seconds[place])
                yield video.row(place, starts, made.clip_seconds) | {"colour": mean_colour(frames).tolist()}, frames

    def _slide(
        self, plan: dict[str, Any], window: SlidingWindow, rejected: list[Rejection], losses: list[Loss]
    ) -> tuple[list[dict[str, Any]], npt.NDArray[np.float32]]:
        """Rows and features of the clips of a window that slides over videos."""

        def compute(first: int, frames: Frames) -> tuple[torch.Tensor, list[list[float]]]:
            return embed_batch(self._encoder, list(frames)), [mean_colour(clip).tolist() for clip in frames]

        def over(path: str) -> tuple[StoredClips, list[tuple[torch.Tensor, list[list[float]]]], float]:
            return slide(
                self._encoder,
                path,
                window,
                compute,
                decoder=self._decoder,
                batch_size=self._work.batch_size,
                seconds=self._work.seconds_per_video,
            )

        rows: list[dict[str, Any]] = []
        parts = [torch.zeros(0, self._encoder.feature_dim)]
        for video, (cut, batches, clip_seconds) in self._each_video(plan, over, rejected):
            if cut.damage:
                losses.append(video.loss(cut.damage))
            colours = [colour for _, each in batches for colour in each]
            for place, (seconds, colour) in enumerate(zip(cut.start_seconds, colours, strict=True)):
                # In microseconds: time stamps do not tell clips apart that begin between two frames of a slow video.
                rows.append(video.row(place, (round(seconds * 1e6), seconds), clip_seconds) | {"colour": colour})
            parts += [features for features, _ in batches]
        return rows, torch.cat(parts).numpy()

    def _each_video(
        self, plan: dict[str, Any], cut: Callable[[str], Made], rejected: list[Rejection]
    ) -> Iterator[tuple[_Video, Made]]:
        """Calls `cut` with the path of each video. One that fails with any error is added to `rejected`.

        Raises:
            ScratchError: the disk for temporary files cannot be written.
        """
        for name, num_bytes in plan["videos"]:
            found = source.Found(name, num_bytes)
            try:
                with attributed("decode"), contextlib.ExitStack() as stack:
                    with attributed("read"):
                        path = stack.enter_context(source.local_copy(plan["folder"], found))
                        sha256 = source.file_sha256(path)
                    made = cut(path)
            except VideoError as error:
                why = (error.stage, error.reason, error.message, error.transient)
                rejected.append(Rejection(name, *why, entry=found.entry))
                continue
            yield _Video(found, sha256), made


@dataclasses.dataclass(frozen=True)
class _Video:
    found: source.Found
    sha256: str

    def loss(self, damage: Damage) -> Loss:
        return Loss(self.found.video_id, damage.lost, damage.percent, damage.message, entry=self.found.entry)

    def row(self, place: int, starts: tuple[int, float], clip_seconds: float) -> dict[str, Any]:
        """A row of the table without its colour; `starts` is the number that names the clip, and its second."""
        name = self.found.video_id
        return {
            "clip_id": f"{hash64(name, starts[0]):016x}",
            "video_id": name,
            "start_seconds": starts[1],
            "clip_seconds": clip_seconds,
            "held_out": False,
            "source": name,
            "row": place,
            "sha256": self.sha256,
        }
