"""Held-out videos: which videos training never sees, and whether they are enough to score an encoder.

The score without labels (`vmoco/evaluate/score.py`) looks a clip up among clips of other times. So it needs two videos
that each have two clips which do not overlap in time. Ingest and the start of a run check this before any training,
because a data set without such videos has to be made again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vmoco.data.manifest import Manifest
from vmoco.seed import hash64

MIN_SCORED = 2
"""Fewest videos that a score needs."""
_MAX_PERCENT = 90
"""Largest --held-out-percent."""
_PERCENT_STEP = 5

Index = npt.NDArray[np.int64]


def is_held_out(video_id: str, percent: float) -> bool:
    """Whether a video is kept from training: a hash of its name, so the split is stable when videos are added."""
    return _place(video_id) < percent * 100


def _place(video_id: str) -> int:
    """A hash of the name, 0 to 9,999."""
    return hash64("held-out", video_id) % 10_000


def pairs_of_videos(
    video_ids: Sequence[str], *, start_seconds: npt.ArrayLike, clip_seconds: npt.ArrayLike
) -> dict[str, Index]:
    """Of each video, sorted by name, the pairs of clips half a video apart that do not overlap in time.

    Args:
        video_ids: video of each clip.
        start_seconds: (N,), time of the first frame of each clip in its video.
        clip_seconds: (N,) or one number, how long a clip is.

    Returns:
        int64 (P, 2) for each video: rows of the arguments. P is 0 for a video that cannot be scored.
    """
    names, members = np.unique(np.asarray(video_ids, dtype=object), return_inverse=True)
    starts = np.asarray(start_seconds, np.float64)
    lengths = np.broadcast_to(np.asarray(clip_seconds, np.float64), starts.shape)
    order = np.lexsort((starts, members))
    bounds = np.searchsorted(members[order], np.arange(len(names) + 1))
    pairs: dict[str, Index] = {}
    for video, name in enumerate(names):
        clips = order[bounds[video] : bounds[video + 1]]
        half = len(clips) // 2
        early, late = clips[:half], clips[len(clips) - half :]
        # Slightly below the length, so that rounding of times does not make neighbours overlap.
        apart = starts[late] - starts[early] >= lengths[early] * (1 - 1e-3)
        pairs[name] = np.stack([early, late], axis=1)[apart]
    return pairs


def seconds_of_clips(manifest: Manifest, rows: pa.Table) -> npt.NDArray[np.float64]:
    """How long each clip of some rows of a manifest is, float64 (number of rows,)."""
    seconds: npt.NDArray[np.float64] = manifest.frame_shape[0] / rows["fps"].to_numpy()
    return seconds


def too_few(num_fit: int, num_held_out: int, *, advice: str) -> str:
    """The error message about held-out videos that cannot be scored."""
    return (
        f"{num_fit} of {num_held_out} held-out videos have two clips that do not overlap in time, and the label-free "
        f"score needs two such videos: {advice}"
    )


def scoring_problem(manifest: Manifest) -> str:
    """The error message where the held-out videos of a data set are too few for a score; empty where they are enough.

    It names the --held-out-percent that is enough, where there is one.
    """
    held_out = _can_be_scored(manifest, manifest.table.filter(manifest.table["held_out"]))
    num_fit = sum(held_out.values())
    if num_fit >= MIN_SCORED:
        return ""
    fit = _can_be_scored(manifest, manifest.table)
    places = sorted(_place(name) for name, fits in fit.items() if fits)
    advice = "ingest more videos, or cut more clips of each (--max-clips-per-video), into another --output"
    if len(places) >= MIN_SCORED:
        # The next multiple of the step above the last place that is needed.
        percent = (places[MIN_SCORED - 1] // (100 * _PERCENT_STEP) + 1) * _PERCENT_STEP
        trains = any(not is_held_out(name, percent) for name in fit)
        if percent <= _MAX_PERCENT and trains:
            advice = (
                f"ingest the videos again into another --output with --held-out-percent {percent}, which holds out "
                f"{sum(place < percent * 100 for place in places)} such videos"
            )
    return too_few(num_fit, len(held_out), advice=advice)


def _can_be_scored(manifest: Manifest, rows: pa.Table) -> dict[str, bool]:
    """Of each video of some rows, whether it can be scored."""
    pairs = pairs_of_videos(
        rows["video_id"].to_pylist(),
        start_seconds=rows["start_seconds"].to_numpy(),
        clip_seconds=seconds_of_clips(manifest, rows),
    )
    return {name: len(found) > 0 for name, found in pairs.items()}
