"""The linear probes of motion on an encoder in this process: for checkpoints, and for before and after.

`motion` has the probes. `evaluate` measures them with the workers of a cluster and keeps the features.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from vmoco.config import PretrainSettings
from vmoco.data.clip_cache import ClipCache, cache_for
from vmoco.data.manifest import Manifest
from vmoco.data.shard_reader import ClipReader
from vmoco.encoders.encoder import Encoder
from vmoco.evaluate.features import Window, embed_views, window
from vmoco.evaluate.motion import (
    COLOUR,
    ENCODER,
    MIN_FRAMES,
    REVERSED,
    ByView,
    MotionPlan,
    Views,
    colour_features,
    make_views,
    measure_probes,
    plan_motion,
    read_colours,
    split_views,
)
from vmoco.evaluate.score import TooFewVideosError


def probe_encoder(
    encoder: Encoder, manifest: Manifest, *, max_clips: int, batch_size: int = 16, cache: ClipCache | None = None
) -> dict[str, float]:
    """The share of right answers of the linear probes of an encoder, by probe, without baselines.

    Args:
        encoder: in evaluation mode.
        manifest: data set.
        max_clips: most clips that fit the probes, and most that test them.
        batch_size: clips in one forward.
        cache: cache for the clips of a remote data set; None uses the default one.

    Raises:
        TooFewVideosError: the data set has too few videos.
        ValueError: a feature is not finite, or a clip is damaged.
    """
    chosen, seen = plan_motion(manifest, max_clips=max_clips), window(encoder, manifest)
    views = make_views(seen, manifest.frame_shape[0], min_frames=max(MIN_FRAMES, encoder.min_frames))
    names = [view for view in views.moving if view != REVERSED]
    features = _embedded(encoder, manifest, chosen.rows, names, views, batch_size=batch_size, cache=cache)
    return {each.probe: each.by[ENCODER].value for each in measure_probes({ENCODER: features}, chosen, views)}


def view_features(
    encoders: Mapping[str, Encoder], manifest: Manifest, chosen: MotionPlan, *, batch_size: int = 16
) -> tuple[Views, dict[str, ByView], tuple[str, ...]]:
    """What the linear probes of encoders of one network need, computed in this process.

    Args:
        encoders: in evaluation mode, by the name of the source.
        manifest: data set.
        chosen: the clips.
        batch_size: clips in one forward.

    Returns:
        The views; features by view of each encoder and of mean colours (COLOUR); notes for the user.
    """
    stored, first = manifest.frame_shape[0], next(iter(encoders.values()))
    views = make_views(window(first, manifest), stored, min_frames=max(MIN_FRAMES, first.min_frames))
    shown = [view for view in views.moving if view != REVERSED]
    sources: dict[str, ByView] = {}
    for name, encoder in encoders.items():
        sources[name] = _embedded(encoder, manifest, chosen.rows, shown, views, batch_size=batch_size, cache=None)
    colours, repeats = read_colours(manifest, chosen.rows)
    sources[COLOUR] = colour_features(colours, views)
    return views, sources, (views.note, repeats)


def _embedded(
    encoder: Encoder,
    manifest: Manifest,
    rows: pa.Table,
    names: Sequence[str],
    views: Views,
    *,
    batch_size: int,
    cache: ClipCache | None,
) -> ByView:
    """Features of some views of clips without colour, by view; the clips of a batch are read once for all views."""
    shown = [views.numbers[name] for name in names]
    reader = ClipReader.of(manifest, rows, crop=True, cache=cache or cache_for(manifest.uri))
    clips, parts = reader.several(range(rows.num_rows)), []
    while batch := list(itertools.islice(clips, batch_size)):
        parts.append(embed_views(encoder, batch, shown, colour=False).numpy())
    return split_views(np.concatenate(parts), names)


def motion_problem(manifest: Manifest, settings: PretrainSettings) -> str:
    """Why the linear probes of a run's encoder cannot be measured on a data set, or not all; empty if they can."""
    try:
        plan_motion(manifest)
    except TooFewVideosError as error:
        return str(error)
    seen = Window(settings.data.num_frames, settings.data.stride)
    least = max(MIN_FRAMES, settings.architecture.min_frames)
    views = make_views(seen, manifest.frame_shape[0], min_frames=least)
    return "" if views.has_speed else views.note
