"""Held-out videos: which videos training never sees, and whether they are enough to score an encoder.

Whole sources are held out: all ranges of a file, all clips of a YouTube video, or all entries of a `group` of a list.
Ranges of one film look alike, so a score on a film of which another range was trained on says too much.

The score without labels (`vmoco/evaluate/score.py`) looks a clip up among clips of other times. So it needs two videos
that each have two clips which do not overlap in time. Ingest and the start of a run check this before any training,
because a data set without such videos has to be made again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vmoco.data.coded import strings
from vmoco.data.manifest import Manifest
from vmoco.seed import hash64

MIN_SCORED = 2
"""Fewest videos that a score needs."""
_MAX_PERCENT = 90
"""Largest --held-out-percent."""
_PERCENT_STEP = 5
_TRIMMED_KINETICS = re.compile(r"[\w-]{11}_\d{6}_\d{6}")

Index = npt.NDArray[np.int64]


def is_held_out(source: str, percent: float) -> bool:
    """Whether a source is kept from training: a hash of its name, so the split is stable when videos are added."""
    return _place(source) < percent * 100


def _place(source: str) -> int:
    """A hash of the name, 0 to 9,999."""
    return hash64("held-out", source) % 10_000


SOURCE_COLUMNS = ("video_id", "range", "video_sha256", "source")
"""What `sources_of` needs to know of clips."""


def sources_of(rows: pa.Table) -> list[str]:
    """The source of each row of a manifest; entries of one file have one source unless their list has groups.

    Data sets of earlier versions have no sources. There the hash of the file tells which rows belong together.
    """
    video_ids, spans, files, names = (strings(rows[name]) for name in SOURCE_COLUMNS)
    of_file = {file: name for file, name in zip(files, names, strict=True) if name is not None}
    found = []
    for video_id, span, file, name in zip(video_ids, spans, files, names, strict=True):
        found.append(name or of_file.setdefault(file, video_id.removesuffix(f"#{span}")))
    return found


def is_by_entry(rows: pa.Table) -> bool:
    """Whether a data set of an earlier version holds out each entry of its list by itself, not each source."""
    columns = rows.select(["video_id", "range", "source"]).to_pydict()
    return any(
        source is None and (span is not None or _TRIMMED_KINETICS.fullmatch(video_id))
        for video_id, span, source in zip(*columns.values(), strict=True)
    )


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


def too_few(num_fit: int, num_held_out: int, *, advice: str, shared: bool = False) -> str:
    """The error message about held-out videos that cannot be scored.

    Args:
        num_fit: sources that can be scored.
        num_held_out: sources that are held out.
        advice: what to do.
        shared: some videos have one source.
    """
    unit = "sources" if shared else "videos"
    return (
        f"{num_fit} of {num_held_out} held-out {unit} have two clips that do not overlap in time, and the label-free "
        f"score needs two such {unit}{' (a source is a file, or a group of the list)' if shared else ''}: {advice}"
    )


def scoring_problem(manifest: Manifest) -> str:
    """The error message where the held-out videos of a data set are too few for a score; empty where they are enough.

    It names the --held-out-percent that is enough, where there is one.
    """
    held_out = _sources_that_fit(manifest, only_held_out=True, enough=MIN_SCORED)
    num_fit = sum(held_out.values())
    if num_fit >= MIN_SCORED:
        return ""
    fit = _sources_that_fit(manifest, only_held_out=False)
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
    return too_few(num_fit, len(held_out), advice=advice, shared=len(fit) < manifest.counts["videos"])


def _sources_that_fit(manifest: Manifest, *, only_held_out: bool, enough: int | None = None) -> dict[str, bool]:
    """`_can_be_scored` of a manifest, piece by piece; ends after the piece with which there are enough."""
    found: dict[str, bool] = {}
    num_fit = 0
    for piece in manifest.batches(["video_id", "range", "video_sha256", "source", "start_seconds", "fps", "held_out"]):
        rows = piece.filter(piece["held_out"]) if only_held_out else piece
        for source, fits in _can_be_scored(manifest, rows).items():
            num_fit += fits and not found.get(source, False)
            found[source] = fits or found.get(source, False)
        if enough is not None and num_fit >= enough:
            break
    return found


def _can_be_scored(manifest: Manifest, rows: pa.Table) -> dict[str, bool]:
    """Of each source of some rows, whether one of its videos can be scored."""
    pairs = pairs_of_videos(
        rows["video_id"].to_pylist(),
        start_seconds=rows["start_seconds"].to_numpy(),
        clip_seconds=seconds_of_clips(manifest, rows),
    )
    fit: dict[str, bool] = {}
    for name, source in dict(zip(rows["video_id"].to_pylist(), sources_of(rows), strict=True)).items():
        fit[source] = fit.get(source, False) or len(pairs[name]) > 0
    return fit
