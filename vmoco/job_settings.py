"""The settings of ingest, embed, evaluate, register and sweep, and the errors of a job that reads settings.

One class a job, one docstring per field, which `--help` shows. `vmoco/settings.py` has the base class, and
`vmoco/config.py` the settings of pretraining; the settings of a sweep contain those, because each of its trials is a
pretraining.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from pydantic import Field, model_validator
from tyro.constructors import MISSING, ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from vmoco.config import PretrainSettings
from vmoco.presets import PRESETS
from vmoco.settings import OmittedIfDefault, Settings, Unhashed

Encoding = Literal["raw", "jpeg"]
ShortVideos = Literal["reject", "loop"]
Hdr = Literal["tonemap", "reject", "keep"]
Deinterlace = Literal["auto", "off"]
Layout = Literal["auto", "table", "filelist", "kinetics", "ssv2", "ucf101", "hmdb51", "frames", "tar"]


class IngestSettings(Settings):
    """Turns a folder of videos into a data set: Arrow shards, a manifest and a ledger of rejected videos."""

    videos: Annotated[str, Unhashed]
    """Folder or URI prefix (file://, s3://, gs://) with its subfolders; a pattern such as '/data/**/a-*.mp4'; or a list
    (.csv, .parquet, .jsonl, .txt, .tsv) of paths relative to its own folder. --layout takes more."""
    output: Annotated[str, Unhashed]
    """Folder or URI of the data set, for example s3://bucket/data. It is created if it does not exist. If it exists, it
    is continued; the settings must be the same."""
    annotations: Annotated[str | None, Unhashed] = None
    """List of the videos to take, and optionally their labels, ranges of seconds and splits: a file, or a folder of
    split files. Paths are relative to --videos. When left out, all videos are taken."""
    layout: Annotated[Layout, Unhashed] = "auto"
    """Format of --annotations, as listed above; or tar (tar files of videos) or frames (folders of numbered pictures,
    with --fps). auto recognises it, prints it, and refuses what may be two formats."""
    suffixes: Annotated[tuple[str, ...], Unhashed] = ()
    """More endings of videos, for example .mod .tod; '' takes files without an ending. Ingest prints how many files of
    which endings it does not look at."""
    num_frames: int = Field(16, ge=2)
    """Number of frames in a stored clip. Training may take shorter clips, never longer ones."""
    stride: int = Field(1, ge=1)
    """Distance between neighbouring frames of a clip, in frames of the video or of --fps. 2 takes every second one."""
    fps: float | None = Field(None, gt=0)
    """Frames per second to take, by their time stamps, for example 12.5. Use it if the videos have different rates.
    When left out, every frame is taken. Pictures have no time stamps: of a folder of pictures it is the rate."""
    short_videos: ShortVideos = "reject"
    """What to do with a video that is shorter than one clip: reject it, or repeat its frames until the clip is full."""
    hdr: Annotated[Hdr, OmittedIfDefault] = "tonemap"
    """What to do with HDR video (PQ or HLG): convert it to the range of other videos, reject it, or keep its values,
    which look washed out."""
    deinterlace: Annotated[Deinterlace, OmittedIfDefault] = "auto"
    """What to do with interlaced video: auto deinterlaces the frames that are marked as interlaced; off stores the two
    fields of a frame as they are, interleaved."""
    short_side: Annotated[int | None, Unhashed] = Field(None, ge=16)
    """Sets the height of stored frames, in pixels; the width is 4/3 of it. Replaces --height and --width."""
    height: int = Field(128, ge=16)
    """Height of stored frames, in pixels. Each frame is scaled to cover height x width, then cropped at the centre."""
    width: int = Field(171, ge=16)
    """Width of stored frames, in pixels."""
    encoding: Encoding = "raw"
    """How frames are stored: raw is fastest to read; jpeg takes about 11 times less space and is decoded during
    training."""
    jpeg_quality: int = Field(92, ge=1, le=100)
    """Quality of JPEG frames, from 1 to 100. Has no effect on raw frames."""
    max_clips_per_video: int = Field(32, ge=1)
    """Largest number of clips from one video. They are spread evenly over it."""
    held_out_percent: float = Field(10.0, ge=0, le=90)
    """Percentage of sources kept out of training, for scores. A source is a file with all its ranges, a YouTube video,
    or a group of a list. A hash of its name chooses it, so adding videos changes nothing."""
    damaged: Annotated[Literal["drop-clips", "reject"], OmittedIfDefault] = "drop-clips"
    """What to do with a video that is damaged or cut off: take the clips without a damaged frame, or reject it. The
    ledger names the seconds that are lost. Only reject decodes every frame of long videos with few clips."""
    max_damaged_percent: Annotated[float, OmittedIfDefault] = Field(50.0, ge=0, le=100)
    """Percentage of a video that may be lost to damage. A video that has lost more is rejected."""
    at_cuts: Annotated[Literal["keep", "drop", "split"], OmittedIfDefault] = "keep"
    """What to do at a cut between shots: keep the clips that cross it (see --data.max-cuts), drop them, or split: plan
    each shot by itself. split decodes every frame of a video in one task, twice where it finds cuts."""
    max_rejected_percent: Annotated[float, Unhashed] = Field(50.0, ge=0, le=100)
    """Percentage of rejected videos above which the job fails."""
    duplicates: Annotated[Literal["reject", "keep"], Unhashed] = "reject"
    """What to do with files that have the same content: reject all but the first by name, or keep all."""
    shard_megabytes: Annotated[int, Unhashed] = Field(256, ge=1)
    """Approximate size of a shard file, in MiB. One Ray task writes one shard."""
    videos_per_shard: Annotated[int, Unhashed] = Field(64, ge=1)
    """Largest number of videos in one shard. Lower it to spread a few videos over many workers."""
    part_seconds: Annotated[float, Unhashed] = Field(600.0, ge=1)
    """Several tasks decode a video of which more than 1.5 times this many seconds are decoded, about this many each."""
    seconds_per_video: Annotated[float, Unhashed] = Field(600.0, gt=0)
    """Time limit in seconds for decoding one video, or one part of a long one. A slower decoder is killed."""

    @model_validator(mode="after")
    def _check(self) -> IngestSettings:
        if self.layout == "frames" and self.fps is None:
            raise ValueError("--layout frames needs --fps, the number of pictures per second, for example --fps 25")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a stored frame in pixels."""
        return (self.short_side, round(self.short_side * 4 / 3)) if self.short_side else (self.height, self.width)

    @property
    def frame_shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C) of every clip."""
        return (self.num_frames, *self.size, 3)

    def content(self) -> dict[str, Any]:
        """The fields that decide the clips of a data set: those of the base class, with the size of stored frames."""
        found = super().content()
        if self.encoding == "raw":
            del found["jpeg_quality"]
        height, width = self.size
        return found | {"height": height, "width": width}


class PoolSettings(Settings):
    """The workers that compute embeddings."""

    max_workers: int = Field(0, ge=0)
    """Largest number of workers. 0 starts one for each free CPU, or for each free GPU with --use-gpu."""
    use_gpu: bool = False
    """Gives each worker one GPU. Otherwise workers compute on CPUs."""
    cpus_per_worker: int = Field(1, ge=1)
    """Number of CPU cores, and of threads, of each worker."""
    batch_size: int = Field(16, ge=1)
    """Number of clips that a worker embeds at once. Lower it if memory runs out."""


class EmbedSettings(PoolSettings):
    """Embeds videos, or a data set, with a pretrained encoder."""

    videos: str
    """Folder or URI prefix of videos, or a data set made by jobs/ingest.py."""
    output: str
    """Folder or URI of the table of embeddings. It is created if it does not exist. If it exists, it is continued; the
    encoder must be the same."""
    suffixes: tuple[str, ...] = ()
    """More endings of videos, for example .mod .tod; '' takes files without an ending. Has no effect on a data set."""
    max_clips_per_video: int = Field(32, ge=1)
    """Largest number of clips from one video, spread evenly over it. Has no effect on a data set, whose clips are
    fixed."""
    short_videos: ShortVideos = "reject"
    """What to do with a video that is shorter than one clip: reject it, or repeat its frames until the clip is full.
    Has no effect on a data set."""
    every_seconds: float | None = Field(None, gt=0)
    """Embeds a clip that begins every so many seconds, for example 0.5; clips may overlap, and start_seconds tells the
    time of each. When left out, clips lie side by side. Not for a data set, whose clips are fixed."""
    dense: bool = False
    """Embeds each video from start to end by clips that overlap by half, as --every-seconds of half a clip."""
    clip_seconds: float | None = Field(None, gt=0)
    """Length in seconds of the clips of --every-seconds or --dense. When left out: as in the encoder's training."""
    videos_per_part: int = Field(8, ge=1)
    """Number of videos that one task decodes and embeds. An interrupted job repeats only its unfinished tasks.
    Give 1 for videos of hours."""
    seconds_per_video: float = Field(600.0, gt=0)
    """Time limit in seconds for decoding one video. A slower decoder is killed."""
    gallery: bool = True
    """Also writes gallery.html, a page with some clips, their nearest clips, and a map of all clips."""
    queries: int = Field(12, ge=1)
    """Number of clips for which the gallery shows the nearest clips."""

    @property
    def sliding(self) -> str:
        """The flag, as it is typed, that makes a window slide over each video; empty if clips lie side by side."""
        return f"--every-seconds {self.every_seconds:g}" if self.every_seconds else "--dense" * self.dense

    @model_validator(mode="after")
    def _check_sliding(self) -> EmbedSettings:
        if self.dense and self.every_seconds:
            raise ValueError(f"--dense and {self.sliding} both tell when the next clip begins: give one of them")
        if self.clip_seconds and not self.sliding:
            raise ValueError(
                f"--clip-seconds {self.clip_seconds:g} needs --every-seconds or --dense: without these, clips are as "
                "long as in the encoder's training"
            )
        most = type(self).model_fields["max_clips_per_video"].default
        if self.sliding and self.max_clips_per_video != most:
            raise ValueError(
                f"--max-clips-per-video {self.max_clips_per_video} has no effect with {self.sliding}, which embeds "
                "every clip of a video: leave it out, or give more seconds"
            )
        return self


class DedupSettings(PoolSettings):
    """Finds clips of a data set that are copies of each other."""

    data: str
    """Folder or URI of a data set made by jobs/ingest.py."""
    output: str
    """Folder or URI for the results and the table of embeddings. It is created if it does not exist. If it exists, its
    embeddings are used again; the encoder must be the same."""
    candidates: int = Field(40, ge=1)
    """Number of nearest clips of other videos with which each clip is compared. Raise it if many videos show one scene,
    or if there are many copies of one video."""
    min_similarity: float = Field(0.5, ge=-1, le=1)
    """Least cosine of two embeddings, less their mean, for which the pictures are compared. Lower values find more, and
    take longer."""
    min_agreement: float = Field(0.26, gt=0, le=1)
    """Least agreement of what moves in two clips to call them copies, from 0 to 1. Raise it if the page shows pairs
    that are no copies; lower it if copies of poor quality are missed."""
    pairs: int = Field(24, ge=0)
    """Number of pairs that the page shows."""


Protocol = Literal["label-free", "knn", "probe", "retrieval", "finetune", "motion"]


class FinetuneSettings(Settings):
    """Fine-tuning of all weights, the usual protocol for UCF101 and HMDB51."""

    group = "finetune"

    epochs: int = Field(50, ge=1)
    """Number of passes over the training videos, each with one clip of every video. The last weights are tested, not
    the best ones."""
    batch_size: int = Field(32, ge=2)
    """Number of clips in one step."""
    learning_rate: float = Field(0.01, gt=0)
    """Learning rate of SGD with momentum 0.9. It falls to zero on a cosine."""
    weight_decay: float = Field(1e-4, ge=0)
    """L2 penalty of SGD."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Probability that a feature is dropped before the classifier."""
    min_area: float = Field(0.3, gt=0, le=1)
    """Smallest part of the frame's area that a random crop covers, from 0 to 1."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Probability that a training clip is mirrored left to right. Set 0 if left and right differ in meaning."""
    clips_per_video: int = Field(10, ge=1)
    """Number of clips of a test video, spread evenly over it, whose predictions are averaged."""


class EvaluateSettings(PoolSettings):
    """Evaluates a pretrained encoder by the field's protocols."""

    data: str
    """Folder or URI of a data set made by jobs/ingest.py."""
    protocols: tuple[Protocol, ...] = ()
    """What to measure, for example knn probe. label-free and motion need no labels. When left out: all that the labels
    of the data set allow, except finetune and motion."""
    splits: tuple[Literal[1, 2, 3], ...] = ()
    """Official splits to use, for example 1 2 3. When left out: all splits of the data set. If it has none, its
    held-out videos are the test set."""
    reference: bool = False
    """Also evaluates two encoders of the same network for comparison: one with random weights, and torchvision's, which
    was trained with the labels of Kinetics."""
    k: int = Field(200, ge=1)
    """Number of nearest training clips that vote in kNN."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the votes in kNN. Lower values weigh the nearest clips more."""
    max_probe_clips: int = Field(200_000, ge=10)
    """Largest number of training clips for the linear probe, spread evenly over all. Lower it if memory runs out."""
    finetune: FinetuneSettings = FinetuneSettings()
    features: str | None = None
    """Folder or URI for tables of features, for example s3://bucket/features. All nodes must reach it. When left out:
    $VMOCO_HOME/features."""
    record: bool = True
    """Saves the scores with the registered version, if the encoder is a registered one (models:/...)."""
    scores: str | None = None
    """File or URI of a JSON file to write the scores to, for example scores.json."""
    seed: int = 0
    """Every random draw of fine-tuning and of random weights depends on this number."""


class RegisterSettings(Settings):
    """Name, alias, description and checks of a registered encoder."""

    name: str
    """Name of the registered encoder, for example videomoco-kinetics."""
    alias: str = "candidate"
    """One more alias of the new version, for example best-of-march. It always gets the alias candidate too."""
    onnx: bool = False
    """Also exports the encoder as encoder.onnx, and checks that this file gives the same features."""
    score: bool = True
    """Scores the encoder of a run on the held-out videos of its data set. Needs no labels. Set --no-score if these
    videos are gone."""
    data_licence: str = ""
    """Owner and licence of the videos, for example 'CC BY 4.0, by us'. This text is saved with the encoder."""


Metric = Literal["retrieval", "arrow", "speed", "order", "knn"]
MOTION_PROBES = ("speed", "order")
"""Metrics of checkpoints that are measured only with `--evaluation.motion`."""


class SweepSettings(Settings):
    """A sweep over settings of pretraining."""

    space: str = "ratio-decay"
    """What to try: ratio-decay (drop ratios x kinds of decay), or a YAML file. Each line of the file is a field with
    its values, for example 'moco.decay: [0.99, 1.0]'."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """How to choose combinations: grid takes all of them; random and optuna take --samples of them. optuna learns from
    the scores of earlier trials."""
    samples: int = Field(16, ge=1)
    """Number of trials, if --search is not grid. Submit the sweep again with a larger number to add trials."""
    metric: Metric = "retrieval"
    """Score that chooses the best trial; higher is better. arrow, speed and order say whether an encoder sees motion
    (vmoco/METHOD.md compares them); speed and order set --evaluation.motion. knn needs labels."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """What happens to bad trials. none: nothing. asha: they stop at 1/3, 1/9, ... of their steps. pbt: --samples trials
    train together, and every --pbt-steps the worst copy the best and change their settings."""
    asha_grace_steps: int = Field(100, ge=1)
    """With asha: number of steps that every trial gets. Scores come with checkpoints, every --train.checkpoint-every
    steps."""
    pbt_steps: int = Field(100, ge=1)
    """With pbt: number of steps between two copies. Each starts new runs, so give it some minutes of training."""
    max_concurrent: int = Field(0, ge=0)
    """Largest number of trials at the same time. 0 runs as many as the cluster has resources for."""
    table_seconds: float = Field(30.0, ge=0)
    """Shortest time between two tables of the trials in the log, in seconds."""
    pretrain: Annotated[PretrainSettings, tyro.conf.arg(name="")]
    """The settings of all trials. --run.name names the sweep, --tracking.register-as its best encoder."""


SWEEPS = {name: (about, SweepSettings(pretrain=settings)) for name, (about, settings) in PRESETS.items()}
"""The presets of `jobs/pretrain.py`, to start a sweep from."""


class _NotAllowedError(Exception):
    """The message of a ValueError, in a type that tyro does not catch."""


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Where tyro reads settings inside this context, a value that is not allowed is a ValueError with its message.

    Otherwise tyro prints the message in a box and puts an internal name before it (`__tyro-dummy-inner__.moco`).
    """
    registry = ConstructorRegistry()
    registry.struct_rule(_settings_rule)
    try:
        with registry:
            yield
    except _NotAllowedError as error:
        raise ValueError(str(error)) from None


def _settings_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """How tyro builds settings: from the fields of the class, as its own rule for pydantic does, apart from errors."""
    if not (isinstance(info.type, type) and issubclass(info.type, Settings)):
        return None
    kind = info.type
    hints = get_type_hints(kind, include_extras=True)

    def build(**values: Any) -> Settings:
        try:
            return kind(**values)
        except ValueError as error:
            raise _NotAllowedError(str(error)) from None

    build.__doc__ = kind.__doc__  # the help shows it above the flags of a group
    fields = []
    for name, field in kind.model_fields.items():
        default = MISSING if field.is_required() else field.default
        if isinstance(info.default, Settings):  # of a preset
            default = getattr(info.default, name)
        fields.append(StructFieldSpec(name=name, type=hints[name], default=default, helptext=field.description))
    return StructConstructorSpec(instantiate=build, fields=tuple(fields))
