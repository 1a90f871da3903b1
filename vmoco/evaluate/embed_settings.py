"""The settings of `jobs/embed.py`: one docstring per field, which `--help` shows."""

from __future__ import annotations

from pydantic import Field

from vmoco.settings import Settings


class PoolSettings(Settings):
    """The workers that embed."""

    max_workers: int = Field(0, ge=0)
    """At most so many workers; 0 is one for each free CPU, or GPU."""
    use_gpu: bool = False
    """One GPU for each worker."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores, and threads, of each worker."""
    batch_size: int = Field(16, ge=1)
    """Clips in one forward."""


class EmbedSettings(PoolSettings):
    """Embeds videos, or a data set, with a pretrained encoder."""

    videos: str
    """Data set made by jobs/ingest.py, or folder or URI prefix that holds videos."""
    output: str
    """Folder or URI of the table of embeddings; continued if it was made with the same encoder."""
    max_clips_per_video: int = Field(32, ge=1)
    """At most this many clips of one video, spread evenly over it; a data set has its own."""
    videos_per_part: int = Field(8, ge=1)
    """Videos that one task decodes and embeds; an interrupted job loses no more than its unfinished tasks."""
    seconds_per_video: float = Field(600.0, gt=0)
    """Time limit for decoding one video."""
    gallery: bool = True
    """Also write gallery.html: queries with their nearest clips, and a map of all clips."""
    queries: int = Field(12, ge=1)
    """Clips in the gallery that are looked up."""
