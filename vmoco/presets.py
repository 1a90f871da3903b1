"""The presets: settings to start from, the first word after `jobs/pretrain.py`.

A preset lists only what differs from the defaults, which are the paper's, except that `paper` repeats its main numbers
so that they can be read in one place. Every field of a preset can be changed by a flag.
"""

from __future__ import annotations

from vmoco.clip_settings import AugmentSettings, DataSettings
from vmoco.config import GeneratorSettings, MocoSettings, ModelSettings, PretrainSettings, TrainSettings
from vmoco.places import EvaluationSettings, ScalingSettings, TrackingSettings

# 200 epochs of one clip from each of Kinetics-400's about 240,000 training videos, in batches of 256.
PAPER_STEPS = 200 * 240_000 // 256

PRESETS: dict[str, tuple[str, PretrainSettings]] = {
    "tiny": (
        "For tests, and to try a change in the code: some seconds on one CPU core.",
        PretrainSettings(
            preset="tiny",
            # Small clips, network and queue: a step takes a fraction of a second.
            data=DataSettings(num_frames=8),
            augment=AugmentSettings(size=32),
            model=ModelSettings(backbone="r3d_nano", embedding_dim=32),
            generator=GeneratorSettings(hidden_channels=8, frame_size=16),
            # Momentum 0.9, because in 20 steps a key encoder with 0.999 would hardly move.
            moco=MocoSettings(queue_size=64, momentum=0.9),
            # Two micro-batches, so that it runs on 1 or 2 workers; two checkpoints, so that it can be resumed.
            train=TrainSettings(steps=20, global_batch=8, micro_batch=4, log_every=5, checkpoint_every=10),
            scaling=ScalingSettings(num_workers=1, device="cpu"),
            # No core of its own for scoring: a machine with one core can run it.
            evaluation=EvaluationSettings(num_cpus=0, max_videos=20),
        ),
    ),
    "demo": (
        "The complete method on a small network: two minutes on two CPU cores.",
        PretrainSettings(
            preset="demo",
            # 8 frames, every second one, and small frames: two CPU cores train on 6,400 clips in two minutes.
            # Several clips of each video, because the demo has few videos.
            data=DataSettings(num_frames=8, stride=2, draws_per_video=4),
            # Parts of one video share colours and light: half of the views are grey, and each is standardised.
            augment=AugmentSettings(size=48, grey_probability=0.5, blur_probability=0.5, standardise=True),
            model=ModelSettings(backbone="r2plus1d_nano", head="mlp"),
            generator=GeneratorSettings(learning_rate=0.002, before_start="random"),
            # A queue of 8 steps. The key encoder follows within 10 of the 200 steps: in our trials a slow one cost a
            # short run 2 to 11 points. Temperature 0.2 belongs to the MLP head (MoCo v2).
            moco=MocoSettings(queue_size=256, momentum=0.9, temperature=0.2, decay=0.99),
            train=TrainSettings(
                steps=200,
                global_batch=32,
                micro_batch=16,  # one for each of the two workers
                optimizer="adamw",  # learns in fewer steps than SGD on small networks (tests/train/test_learning.py)
                learning_rate=0.002,
                schedule="cosine",
                warmup_percent=10,
                log_every=20,
                checkpoint_every=100,
            ),
            scaling=ScalingSettings(num_workers=2, device="cpu"),
            # No core of its own for scoring: the workers have both.
            evaluation=EvaluationSettings(num_cpus=0, max_videos=50),
            tracking=TrackingSettings(register_as="videomoco-demo"),
        ),
    ),
    # `recommended` for few videos and little hardware. vmoco/METHOD.md says what to expect of it.
    "small": (
        "For 100 to 10,000 videos of your own, on one GPU or a few CPU cores. The encoder tells such videos apart; "
        "weights of Kinetics know more about others (--init).",
        PretrainSettings(
            preset="small",
            # 8 frames, every second one, of the 16 that ingest stores by default. Four clips of each video, because
            # there are few.
            data=DataSettings(num_frames=8, stride=2, draws_per_video=4),
            # Few videos are told apart by colour and light alone: half of the views are grey, and each is standardised.
            augment=AugmentSettings(
                size=64, hue=0.1, jitter_probability=0.8, blur_probability=0.5, grey_probability=0.5, standardise=True
            ),
            model=ModelSettings(backbone="r2plus1d_nano", head="mlp"),
            generator=GeneratorSettings(start_percent=100.0, before_start="random", learning_rate=0.001),
            # 16 steps of keys. The oldest weighs 0.54, as in `recommended`; momentum 0.97, because a run may have no
            # more than a thousand steps, and the key encoder should follow within a few percent of them.
            moco=MocoSettings(
                queue_size=1024, momentum=0.97, temperature=0.2, decay=0.9994, age_unit="key", decay_on="exp"
            ),
            train=TrainSettings(
                epochs=200,
                global_batch=64,
                micro_batch=16,  # up to four workers
                optimizer="adamw",  # learns in fewer steps than SGD on small networks (tests/train/test_learning.py)
                learning_rate=0.001,
                schedule="cosine",
                warmup_percent=5.0,
                log_every=20,
                checkpoint_every=500,
            ),
            # No core of its own for scoring: the workers have all of them.
            evaluation=EvaluationSettings(num_cpus=0, max_videos=100),
        ),
    ),
    # Where the paper and its released code differ, the defaults follow the code (ages in steps, decay on the logit).
    # The faults of that code are not repeated.
    "paper": (
        "VideoMoCo as its authors released it, for Kinetics-400 on 8 GPUs. Ingest with --num-frames 32 or more.",
        PretrainSettings(
            preset="paper",
            data=DataSettings(num_frames=32, draws_per_video=1),
            augment=AugmentSettings(size=112, min_area=0.2),
            model=ModelSettings(backbone="r2plus1d_18", embedding_dim=128, head="linear"),
            # Drops 8 of 32 frames. The first 100 of 200 epochs train the encoder alone, on complete clips.
            generator=GeneratorSettings(drop_ratio=0.25, start_percent=50.0, before_start="whole"),
            moco=MocoSettings(queue_size=65536, momentum=0.999, temperature=0.07, decay=0.99999),
            train=TrainSettings(
                steps=PAPER_STEPS,
                global_batch=256,
                micro_batch=32,
                learning_rate=0.005,  # at a global batch of 32, so 0.04 at 256
                weight_decay=1e-4,
                sgd_momentum=0.9,
                schedule="step",  # multiplied by 0.1 at epochs 120 and 160
                log_every=50,
                checkpoint_every=1000,
            ),
            scaling=ScalingSettings(num_workers=8, device="gpu"),
            # 500 videos would take this encoder hours on CPUs; 50 take about 11 min on 4 cores.
            evaluation=EvaluationSettings(num_cpus=4, max_videos=50),
        ),
    ),
    "recommended": (
        "What we advise for new encoders, on all GPUs of the cluster. Best with clips of --num-frames 32 or more.",
        PretrainSettings(
            preset="recommended",
            # 16 frames, every second one: they span the same time as 32 frames, at half the cost.
            # One clip twice as a pair. With a key encoder that follows soon, two clips of a video gained 1 point where
            # an action lasts, and lost 12 where it is short (with a slow one: 7 and 0).
            data=DataSettings(num_frames=16, stride=2),
            # The augmentation of MoCo v2: blur, a weaker hue, and a fifth of the clips keep their colours.
            augment=AugmentSettings(hue=0.1, jitter_probability=0.8, blur_probability=0.5),
            # The head of MoCo v2. It is removed after training, so the feature keeps what the loss does not need.
            model=ModelSettings(backbone="r2plus1d_18", head="mlp"),
            # Random frames are dropped to the end. The generator costs twice the time, and was not better than they.
            generator=GeneratorSettings(start_percent=100.0, before_start="random"),
            # Ages in keys: the oldest key weighs 0.52. With ages in steps it weighs 0.997, which is hardly a decay.
            # Decay on the exponential removes an old key; on the logit it makes a dissimilar key a harder negative.
            # Temperature 0.2 belongs to the MLP head (MoCo v2).
            moco=MocoSettings(temperature=0.2, age_unit="key", decay_on="exp"),
            train=TrainSettings(
                epochs=200,
                # A cosine to zero (MoCo v2, rho-MoCo), and a warm-up of 5 epochs, because the queue starts empty.
                schedule="cosine",
                warmup_percent=2.5,
                log_every=50,
                checkpoint_every=1000,
            ),
            # About 11 min on 4 cores for each checkpoint.
            evaluation=EvaluationSettings(num_cpus=4, max_videos=100),
        ),
    ),
}
