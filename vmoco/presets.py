"""Settings to start from: the first word of `jobs/pretrain.py`. Every field of a preset can be changed by a flag."""

from __future__ import annotations

from vmoco.config import (
    AugmentSettings,
    DataSettings,
    GeneratorSettings,
    MocoSettings,
    ModelSettings,
    PretrainSettings,
    ScalingSettings,
    TrackingSettings,
    TrainSettings,
)

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
            tracking=TrackingSettings(register_as="videomoco-demo"),
        ),
    ),
}
