"""The settings of `jobs/ingest.py`: one docstring per field, which `--help` shows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from vmoco.settings import Settings


class IngestSettings(Settings):
    """Turns a folder of videos into a data set: Arrow shards, a manifest and a ledger of rejected videos."""

    videos: str
    """Folder or URI prefix (file://, s3://, gs://) that holds the videos; searched recursively."""
    output: str
    """Folder or URI of the data set; created if missing, continued if it was made with the same settings."""
    num_frames: int = Field(16, ge=2)
    """Frames of a stored clip."""
    stride: int = Field(1, ge=1)
    """Distance between two frames of a clip, in frames of the video."""
    height: int = Field(128, ge=16)
    """Height of a stored frame in pixels: frames are scaled to cover height x width, then centre-cropped."""
    width: int = Field(171, ge=16)
    """Width of a stored frame in pixels."""
    encoding: Literal["raw", "jpeg"] = "raw"
    """How frames are stored: raw is read by memory map, jpeg is about 11 times smaller and decoded when it is read."""
    jpeg_quality: int = Field(92, ge=1, le=100)
    """Quality of JPEG frames."""
    max_clips_per_video: int = Field(32, ge=1)
    """At most this many clips of one video, spread evenly over it."""
    held_out_percent: float = Field(10.0, ge=0, le=90)
    """Share of the videos kept from training: by a hash of the video's name, so it is stable when videos are added."""
    max_rejected_percent: float = Field(50.0, ge=0, le=100)
    """The job fails when more than this share of the videos is rejected."""
    videos_per_shard: int = Field(4, ge=1)
    """Videos whose clips share one shard file; one Ray task writes one shard."""
    seconds_per_video: float = Field(600.0, gt=0)
    """Time limit for decoding one video."""

    def content(self) -> dict[str, Any]:
        """The settings that decide the bytes of a data set; the others may change between two runs of ingest."""
        names = ["num_frames", "stride", "height", "width", "max_clips_per_video", "held_out_percent", "encoding"]
        names += ["jpeg_quality"] if self.encoding == "jpeg" else []
        return {name: getattr(self, name) for name in names}
