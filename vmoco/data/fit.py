"""A run and its data sets: settings that follow from the data, and whether they can be trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vmoco import storage
from vmoco.config import PretrainSettings
from vmoco.data.clip_cache import KEEP_SHARE
from vmoco.data.clip_index import ClipIndex
from vmoco.data.manifest import Manifest
from vmoco.data.mixture import Mixture
from vmoco.data.training_clips import reasons, with_list
from vmoco.presets import PRESETS
from vmoco.settings import flag


def fit_to_data(settings: PretrainSettings, data: Manifest | Mixture) -> tuple[PretrainSettings, list[str]]:
    """The settings with numbers where they are relative to the data sets, and lines that say what was chosen.

    Settings that are fitted already stay as they are, so a run that is resumed gets its own again.

    Raises:
        ValueError: both ways to give a number were used, or the list of clips to leave out cannot be used.
    """
    lines = []
    mixture = Mixture.of(data)
    settings = settings.model_copy(update={"data": with_list(mixture.manifests, settings.data)})
    steps, warmup = settings.train.steps, settings.train.warmup_steps
    epochs, percent = settings.train.epochs, settings.train.warmup_percent
    if epochs is not None and _counts(settings, "epochs", "steps"):
        epoch = epoch_clips(settings, mixture)
        steps = max(1, round(epochs * epoch / settings.train.global_batch))
        lines.append(f"{epochs:g} epochs of {epoch:,} clips are {steps:,} steps of {settings.train.global_batch}")
    if percent is not None and _counts(settings, "warmup_percent", "warmup_steps"):
        warmup = math.floor(steps * percent / 100)
    shortest = min(mixture.manifests, key=lambda each: each.frame_shape[0])
    stride = _fitting_stride(settings, shortest.frame_shape[0])
    if stride != settings.data.stride:
        lines.append(
            f"--data.stride {stride}, and not {settings.data.stride} as in preset {settings.preset}, because the clips "
            f"of {shortest.uri} have {shortest.frame_shape[0]} frames: ingest with --num-frames "
            f"{span(settings)} for longer ones"
        )
    weights = settings.data.weights
    if not mixture.is_one and not weights:
        draws = [clips.num_videos * settings.data.draws_per_video for clips in mixture.indexes(settings.data)]
        weights = tuple(max(round(count / sum(draws), 6), 1e-6) for count in draws)
        lines.append(f"--data.weights {' '.join(f'{each:g}' for each in weights)}: each video is drawn equally often")
    values = settings.model_dump()
    values["train"] |= {"steps": steps, "epochs": None, "warmup_steps": warmup, "warmup_percent": None}
    values["data"] |= {"stride": stride, "weights": weights}
    return PretrainSettings(**values), lines


def window_warnings(settings: PretrainSettings, data: Manifest | Mixture) -> list[str]:
    """What a reader should know of --data.shuffle-window with these data sets."""
    window, draws = settings.data.shuffle_window, settings.data.draws_per_video
    manifests = Mixture.of(data).manifests
    far = [manifest for manifest in manifests if storage.local_path(manifest.uri) is None]
    if not window:
        return []
    if not far:
        where = "is on a disk" if len(manifests) == 1 else "are on disks"
        return [
            f"--data.shuffle-window {window} saves requests to a store, and {' '.join(each.uri for each in manifests)} "
            f"{where}: leave it out for a better order"
        ]
    videos = [manifest.counts["videos"] for manifest in far]
    num_bytes = [sum(each.num_bytes for each in manifest.shards.values()) for manifest in far]
    room = settings.data.cache_gib * 2**30 * KEEP_SHARE
    if sum(num_bytes) <= room:
        return []  # a clip is fetched once, with its neighbours or without
    # All data sets have a window at the same time.
    needed = sum(size * min(window / count, 1) for size, count in zip(num_bytes, videos, strict=True))
    if needed > room:
        return [
            f"--data.shuffle-window {window}: the clips of a window have {needed / 2**30:.3g} GiB, and the cache of "
            f"--data.cache-gib {settings.data.cache_gib:g} keeps {room / 2**30:.3g}, so they are fetched repeatedly; "
            f"lower the window to {int(window * room / needed)}, or raise the size of the cache"
        ]
    found = []
    for manifest, count in zip(far, videos, strict=True):
        clips = manifest.num_clips / count
        if draws < 0.75 * clips:
            found.append(
                f"--data.shuffle-window {window} fetches all {clips:.1f} clips of each video of {manifest.uri}, and an "
                f"epoch uses {draws}: give --data.draws-per-video {round(clips)} (and fewer epochs)"
            )
    return found


def epoch_clips(settings: PretrainSettings, data: Manifest | Mixture) -> int:
    """Number of clips that one epoch draws; of several sets, those of an epoch of each."""
    indexes = Mixture.of(data).indexes(settings.data)
    return sum(clips.num_videos for clips in indexes) * settings.data.draws_per_video


def _counts(settings: PretrainSettings, share: str, number: str) -> bool:
    """Whether a share counts, and not the number. Where both are set, one comes from the preset, and the other counts.

    Raises:
        ValueError: both were given.
    """
    train = settings.train
    if not getattr(train, number):
        return True
    preset = PRESETS[settings.preset][1].train if settings.preset in PRESETS else None
    own = [name for name in (share, number) if not preset or getattr(train, name) != getattr(preset, name)]
    if len(own) == 2:
        values = [f"{flag('train', name)} {getattr(train, name):g}" for name in own]
        raise ValueError(f"{values[0]} and {values[1]} both say the same thing: leave one of them out")
    return own == [share]


def _fitting_stride(settings: PretrainSettings, stored_frames: int) -> int:
    """The stride of the settings, or a smaller one if it is the preset's and the stored clips are too short for it."""
    data, preset = settings.data, PRESETS.get(settings.preset)
    if preset is None or data.stride != preset[1].data.stride:
        return data.stride
    longest = (stored_frames - 1) // (data.num_frames - 1)
    return min(data.stride, longest) if longest else data.stride


def check_fits(
    data: Manifest | Mixture, settings: PretrainSettings, indexes: Sequence[ClipIndex] | None = None
) -> None:
    """Checks that a run can be trained on each of its data sets; `indexes` are of what training takes, if known.

    Raises:
        ValueError: clips too short or too small for the settings, or no clip to train on.
    """
    mixture = Mixture.of(data)
    for place, manifest in enumerate(mixture.manifests):
        _check_fits(manifest, settings, indexes[place] if indexes else None, others=mixture.others(manifest))


def _check_fits(
    manifest: Manifest, settings: PretrainSettings, clips: ClipIndex | None, *, others: Sequence[Manifest]
) -> None:
    stored_frames, height, width, _ = manifest.frame_shape
    frames, size = span(settings), settings.augment.size
    if frames > stored_frames:
        raise ValueError(
            f"--data.num-frames {settings.data.num_frames} at --data.stride {settings.data.stride} spans {frames} "
            f"frames, the clips of {manifest.uri} have {stored_frames}: lower one of them, or ingest longer clips"
        )
    if size > min(height, width):
        raise ValueError(
            f"--augment.size {size} is larger than the stored frames of {manifest.uri} ({height}x{width}): lower it, "
            "or ingest with a larger --height and --width"
        )
    if manifest.counts["videos"] == manifest.counts["held_out"]:
        raise ValueError(f"every video of {manifest.uri} is held out: ingest more videos, or lower --held-out-percent")
    clips = clips or ClipIndex.of(manifest, settings.data, others=others)
    if not clips.num_clips:
        left_out = [*reasons(settings.data), *(f"the held-out part of {each.uri}" for each in others)]
        raise ValueError(
            f"no clip of {manifest.uri} is left to train on: {', '.join(left_out)} leaves out all clips of videos that "
            "are not held out"
        )
    if settings.data.positives == "two_clips" and frames == stored_frames and clips.num_clips == clips.num_videos:
        raise ValueError(
            f"--data.positives two_clips: each video of {manifest.uri} has a single clip of --data.num-frames x "
            f"--data.stride = {frames} frames, so lower one of them, ingest more clips, or give same_clip"
        )


def shot_warnings(settings: PretrainSettings, data: Manifest | Mixture) -> list[str]:
    """What a reader should know of pairs of two clips: of which videos they may hold frames of two shots."""
    if settings.data.positives != "two_clips":
        return []
    mixture = Mixture.of(data)
    return [
        f"--data.positives two_clips: the shots of {index.num_without_shots} of the {index.num_videos} training videos "
        f"of {manifest.uri} are not known, because an earlier version made their clips, so a pair of theirs may hold "
        "frames of two shots: to know them, ingest these videos into another folder"
        for manifest, index in zip(mixture.manifests, mixture.indexes(settings.data), strict=True)
        if index.num_without_shots
    ]


def span(settings: PretrainSettings) -> int:
    """Number of stored frames from the first to the last one of a training clip."""
    return (settings.data.num_frames - 1) * settings.data.stride + 1
