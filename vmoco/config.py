"""The settings of a pretraining run: frozen, checked, one docstring per field, which `--help` shows.

A run is described by one `PretrainSettings`. Its canonical JSON is saved, the same bytes, in the checkpoint, in MLflow
and with the encoder. Its content hash covers what decides the numbers of the run, and a resumed run must have the same
one. `vmoco/settings.py` says what a group of settings is and which fields are hashed.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import tyro
from pydantic import Field, model_validator

from vmoco.architectures import ARCHITECTURES, Architecture
from vmoco.places import EvaluationSettings, ScalingSettings, TrackingSettings
from vmoco.settings import HashedIfSet, OmittedIfDefault, Settings, Unhashed


class RunSettings(Settings):
    """The name of the run, its seed, and where its checkpoints are."""

    group = "run"

    name: Annotated[str | None, Unhashed] = None
    """Name of the run. Give the name of an unfinished run to resume it. When left out: PRESET-DATE-TIME."""
    storage: Annotated[str | None, Unhashed] = None
    """Folder or URI for checkpoints, for example s3://bucket/runs. All nodes must reach it. When left out:
    $VMOCO_HOME/runs, or ~/.vmoco/runs."""
    fork: Annotated[str | None, HashedIfSet] = None
    """Checkpoint of another run to continue from in a new run, at its step: a uri from that run's checkpoints.json. To
    begin at step 0 with its networks, give it to --model.init."""
    seed: int = 0
    """Every random draw depends on this number. Change it to repeat a run with other draws."""


Positives = Literal["same_clip", "two_clips"]


class DataSettings(Settings):
    """The data set, and which clips training takes from it."""

    group = "data"

    uri: Annotated[str, Unhashed] = ""
    """Folder or URI of a data set made by jobs/ingest.py, for example s3://bucket/data. Required."""
    num_frames: int = Field(16, ge=2)
    """T: number of frames in a training clip. The clip is a random window of a stored clip, which may be longer."""
    stride: int = Field(1, ge=1)
    """Distance between neighbouring frames of a training clip, in stored frames. 2 takes every second one."""
    draws_per_video: int = Field(1, ge=1)
    """Number of clips drawn from each video in one epoch."""
    positives: Positives = "same_clip"
    """What a query must match: another view of the same clip (paper), or another clip of the same video (rho-MoCo with
    rho = 2). The second learns less from texture."""
    two_clips_from_percent: Annotated[float, OmittedIfDefault] = Field(0.0, ge=0, le=100)
    """Percentage of the training steps after which positives come from two clips, if --data.positives is two_clips;
    before it they come from the same clip. Set for example 50 if two_clips alone does not begin to learn."""
    batches_ahead: Annotated[int, Unhashed] = Field(3, ge=1)
    """Number of batches that the loader prepares ahead of the training step. Each takes memory on every worker."""
    loader_threads: Annotated[int, Unhashed, OmittedIfDefault] = Field(0, ge=0)
    """Number of threads of each worker that read, check and decode clips. 0 takes one for each core, 8 at most; 16 for
    remote clips, which wait for the store."""
    cache: Annotated[str | None, Unhashed] = None
    """Folder on the local disk of each node, for clips of a remote data set. When left out: $VMOCO_HOME/cache, or
    ~/.vmoco/cache."""
    cache_gib: Annotated[float, Unhashed] = Field(50.0, gt=0)
    """Size limit of this cache on one node, in GiB. When it is full, the least recently read clips are removed."""


class AugmentSettings(Settings):
    """Random changes to each view of a clip; all frames of a view change in the same way. The defaults are those of
    MoCo v1, as in the paper."""

    group = "augment"

    size: int = Field(112, ge=16)
    """Height and width of a training clip, in pixels. At most the short side of the stored frames."""
    min_area: float = Field(0.2, gt=0, le=1)
    """Smallest part of the frame's area that a random crop covers, from 0 to 1. Raise it if objects get cut off."""
    grey_probability: float = Field(0.2, ge=0, le=1)
    """Probability that a view becomes grey."""
    brightness: float = Field(0.4, ge=0, le=1)
    """Largest relative change of brightness: 0.4 multiplies it by 0.6 to 1.4."""
    contrast: float = Field(0.4, ge=0, le=1)
    """Largest relative change of contrast: 0.4 multiplies it by 0.6 to 1.4."""
    saturation: float = Field(0.4, ge=0, le=1)
    """Largest relative change of saturation: 0.4 multiplies it by 0.6 to 1.4."""
    hue: float = Field(0.4, ge=0, le=0.5)
    """Largest rotation of the hue, as a part of the colour circle: 0.5 reaches every colour."""
    jitter_probability: float = Field(1.0, ge=0, le=1)
    """Probability that brightness, contrast, saturation and hue of a view change (MoCo v1: 1; MoCo v2: 0.8)."""
    blur_probability: float = Field(0.0, ge=0, le=1)
    """Probability of a Gaussian blur with a sigma of 0.1 to 2 pixels (MoCo v1: 0; MoCo v2: 0.5)."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Probability that a view is mirrored left to right. Set 0 if left and right differ in meaning."""
    standardise: bool = False
    """Normalises each clip by its own mean and deviation, not by those of Kinetics. Then the encoder cannot recognise a
    clip by its light or contrast."""


# As in vmoco/architectures.py.
TorchvisionBackbone = Literal["r3d_18", "r2plus1d_18", "mc3_18", "s3d", "swin3d_t", "swin3d_s", "mvit_v2_s"]
Backbone = Literal[TorchvisionBackbone, "r3d_nano", "r2plus1d_nano", "swin3d_nano"]


class ModelSettings(Settings):
    """The network of the encoders."""

    group = "model"

    backbone: Backbone = "r3d_18"
    """Network from clip to feature. Those named *_nano are small enough for a CPU; the others are torchvision's. swin3d
    and mvit are transformers: train them with --train.optimizer adamw."""
    embedding_dim: int = Field(128, ge=2)
    """D: length of the embedding vectors that the loss compares."""
    head: Literal["linear", "mlp"] = "linear"
    """Projection from feature to embedding: a linear layer (paper), or two layers with a ReLU between (MoCo v2)."""
    drop_path: Annotated[float, OmittedIfDefault] = Field(0.0, ge=0, lt=1)
    """Probability that the last residual branches of a swin3d or mvit are left out for a query (stochastic depth); in
    earlier ones it is lower, 0 in the first. Their papers: 0.1 for swin3d_t, 0.2 for the others."""
    init: Annotated[str | None, tyro.conf.arg(aliases=["--init"])] = None
    """Weights to start from, at step 0: a trained encoder (models:/NAME@ALIAS, or a folder), which gives its backbone,
    or a checkpoint of another run, which gives both encoders with heads and the generator. All else is new."""


Fill = Literal["mean", "zero"]
Estimator = Literal["mask", "pixel_sum"]
BeforeStart = Literal["whole", "random"]
Select = Literal["top", "sample"]
Objective = Literal["difference", "contrast"]


class GeneratorSettings(Settings):
    """The generator G, which learns to drop the frames of a query that matter most to the encoder."""

    group = "generator"

    drop_ratio: float = Field(0.25, ge=0, le=0.9)
    """Part of a clip's frames that is dropped, from 0 to 0.9. 0 trains plain MoCo without a generator."""
    fill: Fill = "mean"
    """What replaces a dropped frame: its own mean colour, or zero, which is the mean colour of all data."""
    start_percent: float = Field(50.0, ge=0, le=100)
    """Percentage of the training steps after which the generator starts (paper: 50)."""
    before_start: BeforeStart = "whole"
    """The query until the generator starts: the complete clip (paper), or the clip with randomly dropped frames."""
    strength: float = Field(100.0, gt=0)
    """Lambda: weight of the generator's loss."""
    learning_rate: float = Field(0.005, gt=0)
    """Learning rate of the generator at a global batch of 32. It grows in proportion to --train.global-batch."""
    estimator: Estimator = "mask"
    """Gradient of the choice of frames: of the mask itself, or of the sum of pixels as in the authors' released code.
    Use pixel_sum only to compare with that code."""
    relative: bool = False
    """Compares each frame with the same position in the other clips of its micro-batch. Then the generator cannot
    choose by position alone."""
    select: Annotated[Select, OmittedIfDefault] = "top"
    """How frames are chosen by their importance: the most important ones (paper), or a random sample in which important
    frames are more likely. Use sample if the generator drops the same frames of every clip."""
    objective: Annotated[Objective, OmittedIfDefault] = "difference"
    """What the generator raises: the difference that its drops make to the embedding (paper), or the contrastive loss
    of the query. contrast makes a step nearly a third cheaper, and ignores --generator.strength."""
    every: Annotated[int, OmittedIfDefault] = Field(1, ge=1)
    """Trains the generator in every n-th step only, which makes the other steps cheaper. In those it still chooses the
    frames. Example: 4."""
    clips_percent: Annotated[float, OmittedIfDefault] = Field(100.0, gt=0, le=100)
    """Percentage of the clips of each micro-batch from which the generator learns. It chooses the frames of all. Below
    about 67 a step becomes cheaper: at 25 it costs 4.75 instead of 6 forwards. Has no effect on contrast."""
    hidden_channels: int = Field(16, ge=1)
    """Number of channels in the generator's recurrent state."""
    frame_size: int = Field(32, ge=8)
    """Height and width to which frames are scaled for the generator, in pixels."""


AgeUnit = Literal["step", "key"]
DecayOn = Literal["logit", "exp"]
DecaySchedule = Literal["constant", "linear", "cosine", "step", "adversarial"]


class MocoSettings(Settings):
    """The contrastive loss: the queue of negative keys, the momentum encoder, and the decay of old keys."""

    group = "moco"

    queue_size: int = Field(65536, ge=1)
    """K: number of negative keys in the queue. At least --train.global-batch. Lower it for a small data set: keys of
    the query's own video never count as negatives."""
    momentum: float = Field(0.999, ge=0, lt=1)
    """Part of the key encoder that stays in each step. Lower it for a short run, for example 0.99 for 200 steps."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the contrastive loss. Lower values weigh the most similar negatives more (MoCo v2: 0.2)."""
    decay: float = Field(0.99999, gt=0, le=1)
    """The t in t ** a, the weight of a key with age a. 1 turns the decay off."""
    decay_schedule: DecaySchedule = "constant"
    """How t changes during training: not at all, towards --moco.decay-end in one of three ways, or lower the more the
    generator's drops change the embeddings (adversarial)."""
    decay_end: float = Field(1.0, gt=0, le=1)
    """The value of t at the last step, if --moco.decay-schedule is linear, cosine or step."""
    age_unit: AgeUnit = "step"
    """What the age of a key counts: training steps since it entered the queue, or keys that entered after it."""
    decay_on: DecayOn = "logit"
    """What the weight multiplies: the similarity (paper), or its exponential. Only the second removes old keys."""
    reversed_negatives_percent: Annotated[float, OmittedIfDefault] = Field(0.0, ge=0, le=100)
    """Percentage of the clips that, played backwards, are one more negative of their own query, in each micro-batch.
    Set for example 25 if the direction of time matters. Clips without motion look the same backwards."""


WeightDecayOn = Literal["all", "weights"]
Precision = Literal["auto", "bf16", "fp32"]
SpeedSwitch = Literal["compile", "compile_generator_steps", "compile_generator", "cudnn_benchmark", "pad_channels"]


class TrainSettings(Settings):
    """Steps, batches, optimizer, and how often the run logs and saves."""

    group = "train"

    steps: int = Field(0, ge=0)
    """Number of optimizer steps of the run. Schedules depend on it, so it must stay the same when a run is resumed. 0
    takes as many as --train.epochs needs."""
    epochs: Annotated[float | None, OmittedIfDefault] = Field(None, gt=0)
    """Length of the run in epochs of the data set, in place of --train.steps. Example: 200."""
    stop_after: Annotated[int | None, Unhashed] = Field(None, ge=1)
    """Ends the run early, after this step. The schedules still follow --train.steps, so the run can go on later."""
    global_batch: int = Field(256, ge=2)
    """G: number of clips in one step, over all workers."""
    micro_batch: int = Field(32, ge=2)
    """M: number of clips that batch normalisation sees together. Lower it if GPU memory runs out. Each worker takes the
    same number of micro-batches or one more."""
    learning_rate: float = Field(0.005, gt=0)
    """Learning rate at a global batch of 32. It grows in proportion to --train.global-batch: 0.04 at 256 (paper)."""
    weight_decay: float = Field(1e-4, ge=0)
    """L2 penalty of SGD, or decoupled weight decay of AdamW."""
    weight_decay_on: Annotated[WeightDecayOn, OmittedIfDefault] = "all"
    """What of the encoder decays: all parameters (paper), or weights of linear and convolution layers alone, not
    biases, normalisation and positions, as is usual for swin3d and mvit."""
    clip_gradient_norm: Annotated[float, OmittedIfDefault] = Field(0.0, ge=0)
    """Largest norm of the encoder's gradient, the mean over all workers; a longer one is scaled down to it. 0 does not
    clip. Example: 1, as in the recipe of mvit_v2_s."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD (paper), or AdamW with betas 0.9 and 0.999. AdamW needs lower learning rates, also of the generator."""
    sgd_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD. Has no effect on AdamW."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """How the learning rate changes: multiplied by 0.1 at 60 % and at 80 % of the steps (paper), on a cosine to zero,
    or not at all."""
    warmup_steps: int = Field(0, ge=0)
    """Number of steps in which the learning rate rises linearly from zero. Use some with a high learning rate."""
    warmup_percent: Annotated[float | None, OmittedIfDefault] = Field(None, ge=0, lt=100)
    """The same as a percentage of the steps, in place of --train.warmup-steps. Example: 2.5."""
    precision: Precision = "auto"
    """Arithmetic of the encoders. auto is bf16 on GPUs that support it, and fp32 elsewhere. The loss is always fp32."""
    compile: bool = False
    """Compiles the encoders with torch.compile: the start takes a minute longer, then steps are faster on most GPUs.
    The two embeddings that the generator compares are not compiled."""
    compile_generator_steps: Annotated[bool, OmittedIfDefault] = False
    """With --train.compile: compiles these two embeddings as well, for 7 instead of 6 forwards in such a step."""
    compile_generator: Annotated[bool, OmittedIfDefault] = False
    """With --train.compile: compiles the generator as well."""
    cudnn_benchmark: Annotated[bool, OmittedIfDefault] = False
    """Lets cuDNN measure in the first steps which algorithm is fastest. Runs on GPUs then differ in rounding."""
    pad_channels: Annotated[bool, OmittedIfDefault] = False
    """Computes R(2+1)D with its odd numbers of channels padded to multiples of 8, which GPUs need for full speed in
    bf16. Checkpoints and encoders stay the same. Slower on CPUs."""
    deterministic: bool = False
    """Uses deterministic algorithms, and nothing that only speeds up GPUs. On GPUs a resumed run has the same bits only
    with this, on the same GPUs, with each rank on the same machine. CPUs are deterministic already."""
    log_every: Annotated[int, Unhashed] = Field(10, ge=1)
    """Number of steps between two log lines, and between two points in MLflow."""
    checkpoint_every: Annotated[int, Unhashed] = Field(500, ge=1)
    """Number of steps between two checkpoints. Lower it if workers are lost often: a restart repeats the steps
    since the last checkpoint."""
    keep_checkpoints: Annotated[int, Unhashed] = Field(2, ge=1)
    """Number of newest checkpoints that are kept."""
    keep_best: Annotated[int, Unhashed] = Field(1, ge=0)
    """Number of checkpoints with the best scores that are kept besides the newest ones."""

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if not self.steps and self.epochs is None:
            raise ValueError("--train.steps is missing: give it, or --train.epochs")
        return self

    def speeds_up_by(self, switch: SpeedSwitch) -> bool:
        """Whether a switch for speed is on and has an effect: none has where the run must be deterministic."""
        on: bool = getattr(self, switch) and (self.compile or not switch.startswith("compile"))
        return on and not self.deterministic


class PretrainSettings(Settings):
    """A pretraining run."""

    preset: Annotated[str, tyro.conf.Suppress, Unhashed] = "custom"
    """Name of the preset that these settings began as, for people to read."""
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    model: ModelSettings = ModelSettings()
    generator: GeneratorSettings = GeneratorSettings()
    moco: MocoSettings = MocoSettings()
    train: TrainSettings
    scaling: Annotated[ScalingSettings, Unhashed] = ScalingSettings()
    evaluation: Annotated[EvaluationSettings, Unhashed] = EvaluationSettings()
    tracking: Annotated[TrackingSettings, Unhashed] = TrackingSettings()

    @model_validator(mode="after")
    def _check(self) -> PretrainSettings:
        train, moco, data = self.train, self.moco, self.data
        if moco.queue_size < train.global_batch:
            raise ValueError(
                f"--moco.queue-size {moco.queue_size} is below --train.global-batch {train.global_batch}: "
                "lower the batch or raise the queue"
            )
        if train.global_batch % train.micro_batch:
            raise ValueError(
                f"--train.global-batch {train.global_batch} is not a multiple of --train.micro-batch "
                f"{train.micro_batch}: change one of them"
            )
        if self.scaling.num_workers > self.num_micro_batches:
            workers, (smaller, rest) = self.scaling.num_workers, divmod(train.global_batch, self.scaling.num_workers)
            raise ValueError(
                f"--scaling.num-workers {workers} is above the {self.num_micro_batches} micro-batches of a step "
                "(--train.global-batch divided by --train.micro-batch), so some workers would have no work: "
                + (f"give --train.micro-batch {smaller}, or " if smaller >= 2 and not rest else "")
                + f"lower the number of workers to {self.num_micro_batches}, or raise --train.global-batch"
            )
        if (self.scaling.min_workers or 1) > self.scaling.num_workers > 0:
            raise ValueError(
                f"--scaling.min-workers {self.scaling.min_workers} is above --scaling.num-workers "
                f"{self.scaling.num_workers}: lower the first or raise the second"
            )
        if self.generator.drop_ratio > 0 and not 0 < self.num_dropped < data.num_frames:
            raise ValueError(
                f"--generator.drop-ratio {self.generator.drop_ratio} of --data.num-frames {data.num_frames} drops "
                f"{self.num_dropped} frames: it must drop at least one and keep at least one, or be 0"
            )
        if not self.num_generator_clips:
            raise ValueError(
                f"--generator.clips-percent {self.generator.clips_percent} of --train.micro-batch {train.micro_batch} "
                "is no clip: raise the first, or train the generator less often by --generator.every"
            )
        if moco.reversed_negatives_percent and not self.num_reversed:
            raise ValueError(
                f"--moco.reversed-negatives-percent {moco.reversed_negatives_percent} of --train.micro-batch "
                f"{train.micro_batch} reverses 0 clips: raise one of them, or set the percentage to 0"
            )
        least, size = self.architecture, self.augment.size
        if data.num_frames < least.min_frames or size < least.min_size:
            raise ValueError(
                f"--model.backbone {self.model.backbone} needs --data.num-frames {least.min_frames} or more and "
                f"--augment.size {least.min_size} or more, not {data.num_frames} and {size}: raise them, or choose "
                "another backbone"
            )
        if self.tracking.alias == "champion":
            raise ValueError(
                "--tracking.alias champion is not allowed, because the alias champion moves only to an encoder that "
                "scores better: leave it out, and run jobs/registry.py promote NAME after the run"
            )
        if self.run.fork and self.model.init:
            raise ValueError(
                f"--run.fork {self.run.fork} and --model.init {self.model.init} both give the weights to start from: "
                "leave one of them out"
            )
        if data.two_clips_from_percent and data.positives != "two_clips":
            raise ValueError(
                f"--data.two-clips-from-percent {data.two_clips_from_percent} needs --data.positives two_clips, not "
                f"{data.positives}: set two_clips, or leave the percentage out"
            )
        if self.generator.objective == "contrast" and moco.decay_schedule == "adversarial":
            raise ValueError(
                "--generator.objective contrast does not measure the difference from which --moco.decay-schedule "
                "adversarial takes the decay: set the objective to difference, or choose another schedule"
            )
        if train.warmup_steps >= train.steps > 0:
            raise ValueError(
                f"--train.warmup-steps {train.warmup_steps} is not below --train.steps {train.steps}: lower the first "
                "or raise the second"
            )
        return self

    @property
    def architecture(self) -> Architecture:
        """What is known of the backbone."""
        return ARCHITECTURES[self.model.backbone]

    @property
    def drop_rates(self) -> list[float]:
        """Probability with which each residual branch of the backbone is left out for a query; none if nothing is."""
        return self.architecture.drop_rates(self.model.drop_path)

    @property
    def last_step(self) -> int:
        """Number of steps after which the run ends."""
        return min(self.train.steps, self.train.stop_after or self.train.steps)

    @property
    def num_dropped(self) -> int:
        """Number of frames dropped from each clip; halves round up."""
        return math.floor(self.generator.drop_ratio * self.data.num_frames + 0.5)

    @property
    def num_reversed(self) -> int:
        """Number of clips in each micro-batch whose key is also encoded backwards; halves round up."""
        return math.floor(self.moco.reversed_negatives_percent / 100 * self.train.micro_batch + 0.5)

    @property
    def num_generator_clips(self) -> int:
        """Number of clips in each micro-batch from which the generator learns; halves round up."""
        return math.floor(self.generator.clips_percent / 100 * self.train.micro_batch + 0.5)

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches in one step, over all ranks."""
        return self.train.global_batch // self.train.micro_batch

    @property
    def two_clips_start(self) -> int:
        """First step (counted from 0) whose positives come from two clips; train.steps if none do."""
        if self.data.positives == "same_clip":
            return self.train.steps
        return math.ceil(self.train.steps * self.data.two_clips_from_percent / 100)

    @property
    def generator_start(self) -> int:
        """First step (counted from 0) whose frames the generator chooses; train.steps if it never starts."""
        if self.generator.drop_ratio == 0:
            return self.train.steps
        return math.ceil(self.train.steps * self.generator.start_percent / 100)

    def trains_generator(self, step: int) -> bool:
        """Whether the generator trains in a step (counted from 0): in its first one, and in every n-th after that."""
        return step >= self.generator_start and (step - self.generator_start) % self.generator.every == 0
