"""The base of every group of settings: frozen, checked, and written as the same bytes wherever it is saved.

Settings live with the noun that they are about: of a pretraining run in `vmoco/config.py`, of an ingest in
`vmoco/job_settings.py`.


Settings of where a run runs and reports: they decide no number of it, so a resumed run may change them.

Every setting of a pretraining run: frozen models, one docstring per field, which `--help` shows.

A run is described by one `PretrainSettings`; its canonical JSON is saved, the same bytes, in the checkpoint, in
MLflow and with the encoder. The content hash leaves out what does not change the numbers (where it runs, where it
reports), so a resumed run may change its number of workers but not its method.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Settings(BaseModel):
    """A frozen group of settings that answers a bad value with one sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            group = type(self).__name__.removesuffix("Settings").lower()
            prefix = "" if group in ("ingest", "pretrain") else f"{group}."
            raise ValueError("; ".join(_sentence(problem, prefix) for problem in error.errors())) from None

    def canonical_json(self) -> str:
        """The settings as JSON with sorted keys: equal settings give equal bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1)


def _sentence(problem: Any, prefix: str) -> str:
    field = prefix + ".".join(str(part).replace("_", "-") for part in problem["loc"])
    if problem["type"] == "value_error":  # raised by a check below: already a sentence
        return str(problem["ctx"]["error"])
    said = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{field} {problem['input']!r} is not allowed: {said}"


class ScalingSettings(Settings):
    """Where it runs. Changing it does not change the order of the batches, their augmentation or the queue."""

    num_workers: int = Field(1, ge=1)
    """Ray Train workers: one per GPU, or processes on CPUs."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest workers that it goes on with while nodes are missing. Default: num-workers, so it waits for nodes."""
    resize_seconds: float = Field(60.0, ge=1)
    """With min-workers: how often it looks for nodes to grow again; growing restarts from the last checkpoint."""
    use_gpu: bool = False
    """One GPU per worker, nccl between them; otherwise CPUs and gloo."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores, and threads, of each worker."""
    max_failures: int = Field(3, ge=0)
    """How often a run restarts from one checkpoint after a worker or node was lost. Each new checkpoint counts anew."""
    wait_for_nodes: bool = False
    """Wait for an autoscaler to bring what the cluster lacks, instead of refusing to start."""


class EvaluationSettings(Settings):
    """The look at each new checkpoint, in a Ray task of its own beside training; it chooses the best checkpoint."""

    enabled: bool = True
    """Whether checkpoints are scored."""
    num_cpus: int = Field(1, ge=0)
    """CPU cores kept free for it; 0 shares those of the workers, for small machines."""
    use_gpu: bool = False
    """A GPU kept free for it; otherwise it computes on CPUs."""
    max_videos: int = Field(500, ge=2)
    """Held-out videos that take part, up to 8 clips of each."""


class TrackingSettings(Settings):
    """Where it reports. The tracker's address is MLFLOW_TRACKING_URI, or a database in $VMOCO_HOME."""

    experiment: str = "vmoco"
    """MLflow experiment of the run."""
    register_as: str | None = None
    """Name under which the finished encoder is registered."""
    alias: str = "candidate"
    """Alias given to the registered version."""
    data_licence: str = ""
    """What the videos may be used for, and whose they are: a note that travels with the encoder."""


Fill = Literal["mean", "zero"]
AgeUnit = Literal["step", "key"]
Estimator = Literal["mask", "pixel_sum"]
DecayOn = Literal["logit", "exp"]
DecaySchedule = Literal["constant", "linear", "cosine", "step", "adversarial"]
BeforeStart = Literal["whole", "random"]
Positives = Literal["same_clip", "two_clips"]
Backbone = Literal["r3d_18", "r2plus1d_18", "mc3_18", "s3d", "r3d_nano", "r2plus1d_nano"]
Precision = Literal["auto", "bf16", "fp32"]


# Fields that decide no number of a run: where things lie, how often it reports, what it keeps.
_SILENT = {
    "data": {"uri", "batches_ahead", "cache", "cache_gib"},
    "train": {"stop_after", "log_every", "checkpoint_every", "keep_checkpoints", "keep_best"},
}


class RunSettings(Settings):
    """The run: its name, seed and storage."""

    name: str | None = None
    """Name of the run; the name of an unfinished run resumes it. Default: PRESET-DATE-TIME."""
    storage: str | None = None
    """Folder or URI for checkpoints, reachable from all nodes. Default: $VMOCO_HOME/runs (~/.vmoco/runs)."""
    fork: str | None = None
    """Checkpoint of another run to begin from, with its step: a folder or URI that its checkpoints.json lists."""
    seed: int = 0
    """Every random draw follows from this number."""


class DataSettings(Settings):
    """Which clips are trained on."""

    uri: str = ""
    """Data set made by jobs/ingest.py. Required."""
    num_frames: int = Field(16, ge=2)
    """T: frames of a training clip; a window at a seeded place of a stored clip."""
    stride: int = Field(1, ge=1)
    """Distance between two frames of a training clip, in stored frames."""
    draws_per_video: int = Field(1, ge=1)
    """Clips drawn from each video in one epoch."""
    positives: Positives = "same_clip"
    """What the key shows: the frames of its query (paper), or another clip of its video (rho-MoCo, rho = 2)."""
    batches_ahead: int = Field(3, ge=1)
    """Batches that the loader reads ahead of the step."""
    cache: str | None = None
    """Folder on each node's own disk for clips of a remote data set. Default: $VMOCO_HOME/cache (~/.vmoco/cache)."""
    cache_gib: float = Field(50.0, gt=0)
    """Most that the cache holds on one node, in GiB; the clips that were not read for longest go first."""


class AugmentSettings(Settings):
    """One draw per clip and view: all frames of a clip are changed alike. The defaults are MoCo v1's (paper)."""

    size: int = Field(112, ge=16)
    """Height and width of a training clip in pixels."""
    min_area: float = Field(0.2, gt=0, le=1)
    """Smallest share of the frame's area that a random crop keeps."""
    grey_probability: float = Field(0.2, ge=0, le=1)
    """Share of clips turned grey."""
    brightness: float = Field(0.4, ge=0, le=1)
    """Largest relative change of brightness."""
    contrast: float = Field(0.4, ge=0, le=1)
    """Largest relative change of contrast."""
    saturation: float = Field(0.4, ge=0, le=1)
    """Largest relative change of saturation."""
    hue: float = Field(0.4, ge=0, le=0.5)
    """Largest rotation of hue, in turns."""
    jitter_probability: float = Field(1.0, ge=0, le=1)
    """Share of clips whose brightness, contrast, saturation and hue are changed (MoCo v1: all; v2: 0.8)."""
    blur_probability: float = Field(0.0, ge=0, le=1)
    """Share of clips blurred by a Gaussian of 0.1 to 2 pixels (MoCo v1: none; v2: 0.5)."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Share of clips mirrored left to right; 0 where left and right have a meaning."""
    standardise: bool = False
    """Normalise each clip by its own mean and deviation, not Kinetics': light and contrast tell no clips apart then."""


class ModelSettings(Settings):
    """The encoders."""

    backbone: Backbone = "r3d_18"
    """Network from clip to feature: torchvision's, or a small one of the same blocks for a CPU (*_nano)."""
    embedding_dim: int = Field(128, ge=2)
    """D: width of the embedding that is compared."""
    head: Literal["linear", "mlp"] = "linear"
    """Projection from feature to embedding: linear (paper) or a two-layer MLP (MoCo v2)."""
    init: Annotated[str | None, tyro.conf.arg(aliases=["--init"])] = None
    """Encoder to start from, as models:/NAME@ALIAS or a folder; its backbone alone, step and queue begin anew."""


class GeneratorSettings(Settings):
    """G: which frames are dropped."""

    drop_ratio: float = Field(0.25, ge=0, le=0.9)
    """Share of a clip's frames that is dropped; 0 is plain MoCo without a generator."""
    fill: Fill = "mean"
    """What stands in for a dropped frame: its own mean colour, or zero (the mean of all data)."""
    start_percent: float = Field(50.0, ge=0, le=100)
    """Share of training after which the generator starts (paper: half)."""
    before_start: BeforeStart = "whole"
    """The query before the generator starts: the whole clip (paper), or with frames dropped at random."""
    strength: float = Field(100.0, gt=0)
    """Lambda: factor of the generator's loss."""
    learning_rate: float = Field(0.005, gt=0)
    """Learning rate of the generator at a global batch of 32; scaled linearly with the batch."""
    estimator: Estimator = "mask"
    """Gradient of the choice of frames: of the keep mask itself, or the pixel sum of the released code, to compare."""
    relative: bool = False
    """Judge a frame against the same place of the other clips in its micro-batch: places alone count nothing then."""
    hidden_channels: int = Field(16, ge=1)
    """Channels of the recurrent state."""
    frame_size: int = Field(32, ge=8)
    """The generator sees frames scaled to this many pixels square."""


class MocoSettings(Settings):
    """Queue, momentum and the temporal decay of keys."""

    queue_size: int = Field(65536, ge=1)
    """K: keys in the queue."""
    momentum: float = Field(0.999, ge=0, lt=1)
    """Momentum of the key encoder."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the contrastive loss."""
    decay: float = Field(0.99999, gt=0, le=1)
    """t: a key of age a weighs t ** a; 1 is no decay."""
    decay_schedule: DecaySchedule = "constant"
    """T over training: constant, towards decay-end, or by how much the generator's drops change embeddings."""
    decay_end: float = Field(1.0, gt=0, le=1)
    """T at the last step, for linear, cosine and step."""
    age_unit: AgeUnit = "step"
    """What an age counts: optimizer steps since the key came in, or keys that came in after it."""
    decay_on: DecayOn = "logit"
    """Where the weight applies: on the similarity (paper), or on its exponential, which really removes old keys."""


class TrainSettings(Settings):
    """Optimization."""

    steps: int = Field(..., ge=1)
    """Optimizer steps of the whole run."""
    stop_after: int | None = Field(None, ge=1)
    """Step to end at, where that is before the last one; the schedules are those of `steps`."""
    global_batch: int = Field(256, ge=2)
    """G: clips per step over all ranks."""
    micro_batch: int = Field(32, ge=2)
    """M: clips that a batch normalisation sees together; ranks take whole micro-batches."""
    learning_rate: float = Field(0.005, gt=0)
    """Learning rate at a global batch of 32; scaled linearly with the batch (paper: 0.04 at 256)."""
    weight_decay: float = Field(1e-4, ge=0)
    """L2 penalty of SGD, decoupled decay of AdamW."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD (paper), or AdamW with betas 0.9 and 0.999, which wants lower learning rates, of the generator too."""
    sgd_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """Learning rate over training: x0.1 at 60 % and 80 % (paper), cosine to zero, or constant."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from zero."""
    precision: Precision = "auto"
    """Arithmetic of the encoders: auto is bf16 on GPUs that have it, else fp32. The embedding is always fp32."""
    compile: bool = False
    """Compile the encoders with torch.compile: a minute or more at the start, then faster steps on most GPUs."""
    deterministic: bool = False
    """Deterministic algorithms alone: the same bits again on the same GPUs, slower. CPUs need it not."""
    log_every: int = Field(10, ge=1)
    """Steps between two log lines and two points in MLflow."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_best: int = Field(1, ge=0)
    """Checkpoints that are kept besides because their encoders scored best."""


class PretrainSettings(Settings):
    """A pretraining run."""

    preset: Annotated[str, tyro.conf.Suppress] = "custom"
    """Preset that these settings began as; a name for people, it decides nothing."""
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    model: ModelSettings = ModelSettings()
    generator: GeneratorSettings = GeneratorSettings()
    moco: MocoSettings = MocoSettings()
    train: TrainSettings
    scaling: ScalingSettings = ScalingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _check(self) -> PretrainSettings:
        train, moco = self.train, self.moco
        if moco.queue_size < train.global_batch:
            raise ValueError(
                f"moco.queue-size {moco.queue_size} is below train.global-batch {train.global_batch}: "
                "lower the batch or raise the queue"
            )
        if train.global_batch % train.micro_batch:
            raise ValueError(
                f"train.global-batch {train.global_batch} is not a multiple of train.micro-batch {train.micro_batch}: "
                "change one of them"
            )
        if self.scaling.num_workers > self.num_micro_batches:
            raise ValueError(
                f"scaling.num-workers {self.scaling.num_workers} is above the {self.num_micro_batches} micro-batches "
                "of a step (train.global-batch / train.micro-batch): lower the workers or the micro-batch"
            )
        if (self.scaling.min_workers or 1) > self.scaling.num_workers:
            raise ValueError(
                f"scaling.min-workers {self.scaling.min_workers} is above scaling.num-workers "
                f"{self.scaling.num_workers}: lower it, or raise the other"
            )
        if self.generator.drop_ratio > 0 and not 0 < self.num_dropped < self.data.num_frames:
            raise ValueError(
                f"generator.drop-ratio {self.generator.drop_ratio} of data.num-frames {self.data.num_frames} drops "
                f"{self.num_dropped} frames: at least one must go and one must stay, or the ratio must be 0"
            )
        # S3D halves time three times and space five times, without padding at the last.
        if self.model.backbone == "s3d" and (self.data.num_frames < 5 or self.augment.size < 17):
            raise ValueError(
                f"model.backbone s3d needs data.num-frames 5 and augment.size 17 or more, not "
                f"{self.data.num_frames} and {self.augment.size}: raise them, or take another backbone"
            )
        if self.tracking.alias == "champion":
            raise ValueError(
                "tracking.alias 'champion' is not given by a run, because it moves only to an encoder that scores "
                "better: leave it out, and run jobs/registry.py promote NAME afterwards"
            )
        if self.run.fork and self.model.init:
            raise ValueError(
                f"run.fork {self.run.fork} and model.init {self.model.init} are two beginnings: give one of them"
            )
        if train.warmup_steps >= train.steps:
            raise ValueError(f"train.warmup-steps {train.warmup_steps} must be below train.steps {train.steps}")
        return self

    @property
    def last_step(self) -> int:
        """Steps after which the run has ended."""
        return min(self.train.steps, self.train.stop_after or self.train.steps)

    @property
    def num_dropped(self) -> int:
        """Frames dropped from each clip (halves round up)."""
        return math.floor(self.generator.drop_ratio * self.data.num_frames + 0.5)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step, over all ranks."""
        return self.train.global_batch // self.train.micro_batch

    @property
    def generator_start(self) -> int:
        """First step (counted from 0) whose frames the generator chooses; train.steps where it never starts."""
        if self.generator.drop_ratio == 0:
            return self.train.steps
        return math.ceil(self.train.steps * self.generator.start_percent / 100)

    def content(self) -> dict[str, dict[str, Any]]:
        """What decides the numbers of a run: all but its name, its place, its scaling and its reporting."""
        kept = self.model_dump(mode="json", exclude={"preset", "scaling", "evaluation", "tracking"})
        kept["run"] = {"seed": self.run.seed} | ({"fork": self.run.fork} if self.run.fork else {})
        for group, fields in _SILENT.items():
            kept[group] = {field: value for field, value in kept[group].items() if field not in fields}
        return kept

    def content_hash(self) -> str:
        """Hash of `content`."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:16]
