"""The settings of `jobs/ingest.py`: one docstring per field, which `--help` shows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from vmoco.data.annotations import Layout
from vmoco.data.frames import Encoding, Shape
from vmoco.settings import Settings


class IngestSettings(Settings):
    """Turns a folder of videos into a data set: Arrow shards, a manifest and a ledger of rejected videos."""

    videos: str
    """Folder or URI prefix (file://, s3://, gs://) of the videos, searched recursively; a pattern (`/data/**/a-*.mp4`);
    or a list (.csv, .parquet, .jsonl) of paths below its own folder."""
    output: str
    """Folder or URI of the data set; created if missing, continued if it was made with the same settings."""
    annotations: str | None = None
    """List of the videos to take and what is known of them; None takes all that are there. Labels are optional."""
    layout: Layout = "table"
    """What --annotations is: a table (CSV, Parquet or JSON lines with path and optionally start_seconds, end_seconds,
    label, video_id, split), the CSV of kinetics, or the folder of official split files of ucf101 or hmdb51."""
    num_frames: int = Field(16, ge=2)
    """Frames of a stored clip."""
    stride: int = Field(1, ge=1)
    """Distance between two frames of a clip, in frames of the video, or of --fps."""
    fps: float | None = Field(None, gt=0)
    """Take frames at this rate, by their time stamps, also where the rate varies; None takes every frame."""
    short_videos: Literal["reject", "loop"] = "reject"
    """A video shorter than one clip is rejected with its reason, or gives one clip of its frames over and over."""
    short_side: int | None = Field(None, ge=16)
    """Short side of a stored frame in pixels, in place of height and width: frames are so high, and 4/3 as wide."""
    height: int = Field(128, ge=16)
    """Height of a stored frame in pixels: frames are scaled to cover height x width, then centre-cropped."""
    width: int = Field(171, ge=16)
    """Width of a stored frame in pixels."""
    encoding: Encoding = "raw"
    """How frames are stored: raw is read by memory map, jpeg is about 11 times smaller and decoded when it is read."""
    jpeg_quality: int = Field(92, ge=1, le=100)
    """Quality of JPEG frames."""
    max_clips_per_video: int = Field(32, ge=1)
    """At most this many clips of one video, spread evenly over it."""
    held_out_percent: float = Field(10.0, ge=0, le=90)
    """Share of the videos kept from training: by a hash of the video's name, so it is stable when videos are added."""
    max_rejected_percent: float = Field(50.0, ge=0, le=100)
    """The job fails when more than this share of the videos is rejected."""
    duplicates: Literal["reject", "keep"] = "reject"
    """Whether a file with the same content as another one is rejected; the first name is kept."""
    shard_megabytes: int = Field(256, ge=1)
    """Size of a shard file to aim at; one Ray task writes one shard."""
    videos_per_shard: int = Field(64, ge=1)
    """At most this many videos share a shard."""
    part_seconds: float = Field(600.0, ge=1)
    """A video longer than one and a half times this is decoded in parts of this length, by several tasks."""
    seconds_per_video: float = Field(600.0, gt=0)
    """Time limit for decoding one video, or each --part-seconds of a long one; a decoder that hangs is killed then."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a stored frame in pixels."""
        return (self.short_side, round(self.short_side * 4 / 3)) if self.short_side else (self.height, self.width)

    @property
    def frame_shape(self) -> Shape:
        """(T, H, W, C) of every clip."""
        return (self.num_frames, *self.size, 3)

    def content(self) -> dict[str, Any]:
        """The settings that decide the clips of a data set; the others may change between two runs of ingest."""
        names = ["num_frames", "stride", "fps", "short_videos", "max_clips_per_video", "held_out_percent", "encoding"]
        names += ["jpeg_quality"] if self.encoding == "jpeg" else []
        height, width = self.size
        return {**{name: getattr(self, name) for name in names}, "height": height, "width": width}
