"""What one actor of an embedding job does: keeps the encoder, reads clips, writes one part of the table at a time.

Knows nothing of Ray. A clip comes from a shard, or from a video that is decoded here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vmoco import storage
from vmoco.data import fetch, source
from vmoco.data.decoder import Decoder
from vmoco.data.ledger import Rejection, VideoError
from vmoco.data.shard import ShardReader
from vmoco.encoders.encoder import Encoder
from vmoco.evaluate.colour import mean_colour, without_colour
from vmoco.evaluate.features import Window, embed_batch
from vmoco.evaluate.table import part_bytes, part_uri
from vmoco.seed import hash64

Frames = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Work:
    """How clips are embedded, the same for all items of a job."""

    output: str
    """Folder of the table."""
    window: Window
    """Which frames of a stored clip the encoder sees."""
    batch_size: int
    colour: bool = True
    """False shows the encoder the clips `without_colour`."""
    max_clips_per_video: int = 32
    seconds_per_video: float = 600.0
    device: str = "cpu"
    num_threads: int | None = None
    """Of torch; None leaves them as they are."""


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
            item: `part`, its name; `plan`, JSON: the URI of a shard and rows of its manifest, or a folder and videos.

        Returns:
            `clips`, the number of them; `error`, what a person has to mend, or empty.
        """
        plan = json.loads(item["plan"])
        rejected: list[Rejection] = []
        try:
            if "shard" in plan:
                rows, features = self._embed(_of_shard(plan))
            else:
                rows, features = self._embed(self._of_videos(plan, rejected))
            content = part_bytes(rows, features, rejected=rejected)
            storage.write_atomic(part_uri(self._work.output, item["part"]), content)
        except ValueError as error:  # as a value: an exception in a task ends the job with Ray's stack around it
            return {"clips": 0, "error": str(error)}
        return {"clips": len(rows), "error": ""}

    def _embed(
        self, clips: Iterator[tuple[dict[str, Any], Frames]]
    ) -> tuple[list[dict[str, Any]], npt.NDArray[np.float32]]:
        """Rows and features of clips, in batches of one size."""
        rows: list[dict[str, Any]] = []
        parts = [torch.zeros(0, self._encoder.feature_dim)]  # a part may have no clip
        batch: list[Frames] = []
        for row, frames in clips:
            seen = self._work.window.of(frames) if "shard" in row else frames
            row = {name: value for name, value in row.items() if name != "shard"}
            rows.append(row | {"colour": mean_colour(frames).tolist()})
            batch.append(seen if self._work.colour else without_colour(seen))
            if len(batch) == self._work.batch_size:
                parts.append(embed_batch(self._encoder, batch))
                batch.clear()
        if batch:
            parts.append(embed_batch(self._encoder, batch))
        return rows, torch.cat(parts).numpy()

    def _of_videos(self, plan: dict[str, Any], rejected: list[Rejection]) -> Iterator[tuple[dict[str, Any], Frames]]:
        for name, num_bytes in plan["videos"]:
            found = source.Found(name, num_bytes)
            try:
                with fetch.local_copy(plan["folder"], found) as path:
                    sha256 = fetch.file_sha256(path)
                    cut = self._encoder.cut_video(
                        path,
                        decoder=self._decoder,
                        max_clips=self._work.max_clips_per_video,
                        seconds=self._work.seconds_per_video,
                    )
            except VideoError as error:
                why = (error.stage, error.reason, error.message, error.transient)
                rejected.append(Rejection(name, *why, entry=found.entry))
                continue
            for place, frames in enumerate(cut.frames):
                yield (
                    {
                        "clip_id": f"{hash64(name, cut.start_times[place]):016x}",
                        "video_id": name,
                        "start_seconds": cut.start_seconds[place],
                        "clip_seconds": cut.clip_seconds,
                        "held_out": False,
                        "source": name,
                        "row": place,
                        "sha256": sha256,
                    },
                    frames,
                )


def _of_shard(plan: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Frames]]:
    with local_shard(plan["shard"]) as reader:
        for row in plan["rows"]:
            height, width = row.pop("height"), row.pop("width")
            frames = reader.frames(row["row"])[:, :height, :width]  # what is left is padding
            yield row | {"shard": True}, frames


@contextlib.contextmanager
def local_shard(uri: str) -> Iterator[ShardReader]:
    """A reader of a shard wherever it lies: a remote one is copied to this machine's disk, and removed again."""
    if storage.local_path(uri) is not None:
        with ShardReader(uri) as reader:
            yield reader
        return
    with tempfile.NamedTemporaryFile(suffix=".arrow") as copy:
        copy.write(storage.read_bytes(uri))
        copy.flush()
        with ShardReader(copy.name) as reader:
            yield reader
