"""The settings of `jobs/ingest.py`: one docstring per field, which `--help` shows.

The settings of `jobs/embed.py`: one docstring per field, which `--help` shows.

The settings of `jobs/evaluate.py`: one docstring per field, which `--help` shows.

How an encoder is published: the flags of `jobs/register.py`.

The settings of `jobs/sweep.py`: what is tried, how it is chosen, and the pretraining that every trial is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from vmoco.config import PretrainSettings, Settings
from vmoco.presets import PRESETS

Encoding = Literal["raw", "jpeg"]
Layout = Literal["table", "kinetics", "ucf101", "hmdb51"]


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
    def frame_shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C) of every clip."""
        return (self.num_frames, *self.size, 3)

    def content(self) -> dict[str, Any]:
        """The settings that decide the clips of a data set; the others may change between two runs of ingest."""
        names = ["num_frames", "stride", "fps", "short_videos", "max_clips_per_video", "held_out_percent", "encoding"]
        names += ["jpeg_quality"] if self.encoding == "jpeg" else []
        height, width = self.size
        return {**{name: getattr(self, name) for name in names}, "height": height, "width": width}


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


Protocol = Literal["label-free", "knn", "probe", "retrieval", "finetune"]


class FinetuneSettings(Settings):
    """Fine-tuning all weights, as for UCF101 and HMDB51."""

    epochs: int = Field(50, ge=1)
    """Passes over the training videos, one clip of each in a pass; the last weights are tested, not the best ones."""
    batch_size: int = Field(32, ge=2)
    """Clips in one step."""
    learning_rate: float = Field(0.01, gt=0)
    """Of SGD with momentum 0.9; falls to zero on a cosine."""
    weight_decay: float = Field(1e-4, ge=0)
    """L2 penalty."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Before the classifier."""
    min_area: float = Field(0.3, gt=0, le=1)
    """Smallest share of the frame's area that a random crop keeps."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Share of training clips mirrored left to right; 0 where left and right have a meaning."""
    clips_per_video: int = Field(10, ge=1)
    """Clips of a test video whose predictions are averaged, spread evenly over it."""


class EvaluateSettings(PoolSettings):
    """Evaluates a pretrained encoder by the field's protocols."""

    data: str
    """Data set made by jobs/ingest.py."""
    protocols: tuple[Protocol, ...] = ()
    """What is measured; when left out, all but fine-tuning that the data set has labels for."""
    splits: tuple[Literal[1, 2, 3], ...] = ()
    """Official splits of the data set; all that it has when left out, and training against held-out without any."""
    reference: bool = False
    """Also evaluate random initialisation and torchvision's supervised Kinetics weights of the same network."""
    k: int = Field(200, ge=1)
    """Neighbours that vote in kNN."""
    temperature: float = Field(0.07, gt=0)
    """Of the votes in kNN."""
    max_probe_clips: int = Field(200_000, ge=10)
    """Training clips of the linear probe, which holds them in memory, spread evenly over all."""
    finetune: FinetuneSettings = FinetuneSettings()
    features: str | None = None
    """Folder or URI for the tables of features, reachable from all nodes. Default: $VMOCO_HOME/features."""
    record: bool = True
    """Note the scores with the registered version, where the encoder is one."""
    seed: int = 0
    """Of fine-tuning and of random initialisation."""


@dataclass(frozen=True)
class RegisterOptions:
    """How an encoder is published."""

    name: str
    """Registered name."""
    alias: str = "candidate"
    """A further alias of the version; it is the candidate in any case."""
    onnx: bool = False
    """Also write encoder.onnx, checked against the encoder."""
    score: bool = True
    """Score a run's encoder on the held-out videos of its data set, without labels."""
    data_licence: str = ""
    """Note on the videos that travels with the encoder."""


Metric = Literal["retrieval", "effective_rank", "knn"]


class SweepSettings(Settings):
    """A sweep over settings of a pretraining."""

    space: str = "ratio-decay"
    """What is tried: ratio-decay (drop ratio x kind of decay), or a YAML file of dotted fields and their values."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """Every combination, or `samples` of them: drawn at random, or by Optuna, which learns from the scores."""
    samples: int = Field(16, ge=1)
    """Trials of a search that is not a grid; a sweep that is submitted again with more goes on with more."""
    metric: Metric = "retrieval"
    """The score that chooses, higher is better; knn needs labels."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """Train every trial to its end; or stop the worse ones early at 1/3, 1/9, ... of their steps; or train a population
    of `samples` whose worst copy the best every pbt-steps and change its settings: what wins is a schedule of them."""
    asha_grace_steps: int = Field(100, ge=1)
    """With asha: steps that each trial gets in any case; scores come at checkpoints, train.checkpoint-every apart."""
    pbt_steps: int = Field(100, ge=1)
    """With pbt: steps of a generation; each begins new runs, so some minutes of training at least."""
    max_concurrent: int = Field(0, ge=0)
    """Trials at once; 0 is as many as the cluster holds."""
    table_seconds: float = Field(30.0, ge=0)
    """Least time between two tables of the trials in the log."""
    pretrain: Annotated[PretrainSettings, tyro.conf.arg(name="")]
    """The pretraining; run.name names the sweep, tracking.register-as its best encoder."""


SWEEPS = {name: (about, SweepSettings(pretrain=settings)) for name, (about, settings) in PRESETS.items()}
"""The presets of `jobs/pretrain.py`, to start a sweep from."""
