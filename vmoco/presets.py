"""Settings to start from: the first word of `jobs/pretrain.py`. Every field of a preset can be changed by a flag."""

from __future__ import annotations

from vmoco.config import (
    AugmentSettings,
    DataSettings,
    EvaluationSettings,
    GeneratorSettings,
    MocoSettings,
    ModelSettings,
    PretrainSettings,
    ScalingSettings,
    TrackingSettings,
    TrainSettings,
)

# 200 epochs of one clip from each of Kinetics-400's about 240,000 training videos, in batches of 256.
PAPER_STEPS = 200 * 240_000 // 256

PRESETS: dict[str, tuple[str, PretrainSettings]] = {
    "tiny": (
        "Seconds on one core: for tests and for trying a change.",
        PretrainSettings(
            preset="tiny",
            data=DataSettings(num_frames=8),
            augment=AugmentSettings(size=32),
            model=ModelSettings(backbone="r3d_nano", embedding_dim=32),
            generator=GeneratorSettings(hidden_channels=8, frame_size=16),
            moco=MocoSettings(queue_size=64, momentum=0.9),
            train=TrainSettings(steps=20, global_batch=8, micro_batch=4, log_every=5, checkpoint_every=10),
            evaluation=EvaluationSettings(num_cpus=0, max_videos=20),
        ),
    ),
    "demo": (
        "Two minutes on two CPU cores: the whole method on a small network.",
        PretrainSettings(
            preset="demo",
            data=DataSettings(draws_per_video=8),
            augment=AugmentSettings(size=64),
            model=ModelSettings(backbone="r2plus1d_nano"),
            moco=MocoSettings(queue_size=256, momentum=0.99, decay=0.99),
            train=TrainSettings(
                steps=150,
                global_batch=16,
                micro_batch=8,
                learning_rate=0.05,
                schedule="cosine",
                warmup_steps=10,
                log_every=10,
                checkpoint_every=50,
            ),
            scaling=ScalingSettings(num_workers=2),
            evaluation=EvaluationSettings(num_cpus=0, max_videos=50),
            tracking=TrackingSettings(register_as="videomoco-demo"),
        ),
    ),
    # As released: what is not named here is the default, which is the paper's (where they differ, the code's: ages
    # in steps, decay on the logit). What was wrong in the code is not repeated.
    "paper": (
        "VideoMoCo as released, for Kinetics-400 on 8 GPUs; ingest with --num-frames 32 or more.",
        PretrainSettings(
            preset="paper",
            data=DataSettings(num_frames=32, draws_per_video=1),
            augment=AugmentSettings(size=112, min_area=0.2),
            model=ModelSettings(backbone="r2plus1d_18", embedding_dim=128, head="linear"),
            # 8 of 32 frames; epochs 0-99 of 200 train D alone, on whole clips.
            generator=GeneratorSettings(drop_ratio=0.25, start_percent=50.0, before_start="whole"),
            moco=MocoSettings(queue_size=65536, momentum=0.999, temperature=0.07, decay=0.99999),
            train=TrainSettings(
                steps=PAPER_STEPS,
                global_batch=256,
                micro_batch=32,
                learning_rate=0.005,  # at 32, so 0.04 at 256
                weight_decay=1e-4,
                sgd_momentum=0.9,
                schedule="step",  # x0.1 at epochs 120 and 160
                log_every=50,
                checkpoint_every=1000,
            ),
            scaling=ScalingSettings(num_workers=8, use_gpu=True),
            # 500 videos would take this encoder hours on CPUs; 50 take about 11 min on 4 cores.
            evaluation=EvaluationSettings(num_cpus=4, max_videos=50),
        ),
    ),
    "recommended": (
        "What we would run instead of the paper's settings; ingest with --num-frames 32 or more.",
        PretrainSettings(
            preset="recommended",
            # 16 frames, every second one: the time span of 32 at half the cost.
            # Two clips of a video as a pair: the larger gain in later work (rho-MoCo), and texture helps less.
            data=DataSettings(num_frames=16, stride=2, positives="two_clips"),
            # MoCo v2's augmentation: blur, weaker hue, and a fifth of the clips keep their colours.
            augment=AugmentSettings(hue=0.1, jitter_probability=0.8, blur_probability=0.5),
            # MoCo v2's head, which is thrown away afterwards: the feature keeps what the contrast does not need.
            model=ModelSettings(backbone="r2plus1d_18", head="mlp"),
            # Dropping frames at random until G starts: in our trial that alone was worth more than G.
            generator=GeneratorSettings(start_percent=30.0, before_start="random"),
            # Ages in keys, so that the oldest weighs 0.52 and not 0.997: with steps there is hardly a decay.
            # On the exponential, which removes an old key; on the logit a dissimilar one becomes harder.
            # Temperature 0.2 goes with the MLP head (MoCo v2).
            moco=MocoSettings(temperature=0.2, age_unit="key", decay_on="exp"),
            train=TrainSettings(
                steps=PAPER_STEPS,
                # Cosine to zero (MoCo v2, rho-MoCo), and 5 epochs of warm-up, because the queue is empty at first.
                schedule="cosine",
                warmup_steps=PAPER_STEPS // 40,
                log_every=50,
                checkpoint_every=1000,
            ),
            scaling=ScalingSettings(num_workers=8, use_gpu=True),
            # About 11 min on 4 cores for each checkpoint.
            evaluation=EvaluationSettings(num_cpus=4, max_videos=100),
        ),
    ),
}
