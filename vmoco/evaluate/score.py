"""The scores without labels: does an encoder find another moment of a video without its colours, and does it see time?

For each held-out video, one clip of its first half is compared with one clip of the second half of every video, and one
of its second half with the first halves. Chance is one over the number of videos. Other videos of its source, such as
other ranges of the same file, are left out: they show the same, so they are no wrong answers.

Clips of one video share their colours, so the encoder sees them in grey (`features.without_colour`), and the score of
mean colour alone is reported too. Contrastive losses cannot replace this score: they cannot be compared between
settings of decay or dropping.

A high score does not mean that the encoder sees motion. `arrow` compares a clip with another clip of its video, played
forwards and backwards. It embeds 4 more clips of a video; the score embeds 8.

`estimate` gives every score its interval by resampling sources, because clips of one source are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vmoco.data.clip_cache import ClipCache
from vmoco.data.held_out import (
    MIN_SCORED,
    Index,
    pairs_of_videos,
    scoring_problem,
    seconds_of_clips,
    sources_of,
    too_few,
)
from vmoco.data.manifest import Manifest
from vmoco.encoders.encoder import Encoder
from vmoco.encoders.promotion import LABEL_FREE, Score
from vmoco.evaluate.features import Features, clip_features, mean_colours, window
from vmoco.seed import hash64, permutation, uniform


@dataclass(frozen=True)
class Estimate:
    """A mean over videos with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def estimate(
    values: npt.ArrayLike, groups: npt.ArrayLike, *, num_samples: int = 1000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean of measurements, and its bootstrap interval over videos; the draws follow from the seed.

    Args:
        values: (N,), one number per measurement, such as 1 for a clip that was classified correctly.
        groups: (N,), the video of each.
        num_samples: number of sets of videos to draw, with replacement.
        level: share of these sets whose mean lies inside the interval.
        seed: seed of the draws.

    Raises:
        ValueError: there is nothing to measure.
    """
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        raise ValueError("there is nothing to estimate: no clip was measured")
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(members, numbers), np.bincount(members)
    means = np.empty(num_samples)
    places = np.arange(len(names), dtype=np.uint64)
    for sample in range(num_samples):
        drawn = (uniform(places, hash64("bootstrap", seed, sample)) * len(names)).astype(np.int64)
        means[sample] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(numbers.mean()), float(low), float(high))


@dataclass(frozen=True)
class Answers:
    """Which searches were right; those of two encoders for the same clips have the same order."""

    right: npt.NDArray[np.float64]
    """(N,), 1 for right, 0 for wrong; a share where several are the nearest."""
    groups: npt.NDArray[Any]
    """(N,), source of each: they are resampled for the interval."""

    def estimate(self) -> Estimate:
        """Share of right answers."""
        return estimate(self.right, self.groups)

    def above(self, other: Answers) -> Estimate:
        """How much larger the share is than that of another encoder, on the same clips in the same resamples."""
        return estimate(self.right - other.right, self.groups)


MAX_VIDEOS = 2000
"""Most videos that take part. It limits the work (8 clips of each are embedded) and the memory (about 50 MB)."""
ROUNDS = 4
"""Most pairs of clips of each video."""
ARROW_ROUNDS = 2
"""Number of rounds whose clips are also embedded backwards."""
_TIE = 1e-5
"""Cosines that differ by less count as equal: rounding to float32 after centring changes them by about this much."""


class TooFewVideosError(ValueError):
    """A data set has too few held-out videos for the score."""


@dataclass(frozen=True)
class LabelFreeScore:
    """How well an encoder tells videos apart, without labels."""

    retrieval: Estimate
    """Share of clips whose nearest clip of another time is of the same video, seen without colour."""
    by_colour: float
    """The same by the mean colour of the unchanged clips alone."""
    chance: float
    """The same by guessing."""
    effective_rank: float
    """Number of directions that the features use, e to the entropy of their singular values; 1 means collapse."""
    num_videos: int
    num_clips: int
    evaluation_set: str = ""
    """Hash of the clips and of their pairs. Only scores with equal hashes can be compared."""
    arrow: Estimate | None = None
    """Share of pairs that tell forwards from backwards, by `arrow`; None if no clip was embedded backwards."""
    answers: Answers | None = field(default=None, compare=False, repr=False)
    """What `retrieval` is the mean of, to compare two encoders clip by clip."""

    def numbers(self) -> dict[str, float]:
        """Metrics for the tracker, by name; `retrieval` is the score that chooses between encoders by default."""
        return {
            "retrieval": self.retrieval.value,
            "retrieval_low": self.retrieval.low,
            "retrieval_high": self.retrieval.high,
            "retrieval_by_colour": self.by_colour,
            "retrieval_by_chance": self.chance,
            "effective_rank": self.effective_rank,
        } | ({"arrow": self.arrow.value} if self.arrow else {})

    def __str__(self) -> str:
        return (
            f"same video at another time {self.retrieval} without colour, mean colour alone {self.by_colour:.1%}, "
            f"chance {self.chance:.1%}, of {self.num_videos} videos; effective rank {self.effective_rank:.1f}"
        )


def label_free_score(found: LabelFreeScore) -> Score:
    """The label-free score in the form in which it is recorded."""
    beside = f"mean colour {found.by_colour:.1%}, chance {found.chance:.1%}, effective rank {found.effective_rank:.1f}"
    if found.arrow:
        beside += f", forwards from backwards {found.arrow} (chance 50%)"
    kept = found.retrieval
    return Score(LABEL_FREE, found.evaluation_set, kept.value, kept.low, kept.high, beside)


def score(
    features: Features,
    *,
    video_ids: Sequence[str],
    start_seconds: npt.ArrayLike,
    clip_seconds: npt.ArrayLike,
    colours: Features,
    sources: Sequence[str],
    max_videos: int = MAX_VIDEOS,
    rounds: int = ROUNDS,
) -> LabelFreeScore:
    """Scores features of clips; `choose_pairs` chooses the clips that take part.

    Args:
        features: float32 (N, D), of clips without colour; may be a memory map: only chosen rows are read.
        video_ids: video of each clip.
        start_seconds: (N,), time of the first frame of each clip in its video.
        clip_seconds: (N,) or one number, duration of a clip.
        colours: float32 (N, 3), mean colour of each unchanged clip.
        sources: source of each clip (`held_out.sources_of`).
        max_videos: most videos that take part.
        rounds: most pairs of clips of each video.

    Raises:
        ValueError: fewer than two sources have two clips that do not overlap in time, or a feature is not finite.
    """
    pairs = choose_pairs(
        video_ids,
        start_seconds=start_seconds,
        clip_seconds=clip_seconds,
        sources=sources,
        max_videos=max_videos,
        rounds=rounds,
    )
    rows, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(pairs.shape)
    chosen, hues = np.asarray(features[rows], np.float64), np.asarray(colours[rows], np.float64)
    if not np.isfinite(chosen).all():
        raise ValueError("a feature is not finite: the encoder is broken and cannot be scored")
    # Features after a ReLU share a large positive part, which moves all cosines close to 1.
    apart = chosen - chosen.mean(axis=0)
    apart /= np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-9)
    groups = _sources_of_pairs(pairs, sources)
    left_out = (groups[:, None] == groups) & ~np.eye(len(groups), dtype=bool)
    found = [_found(apart[a] @ apart[b].T, left_out) for a, b in _both_ways(places)]
    by_colour = [_found(-_squared_distances(hues[a], hues[b]), left_out) for a, b in _both_ways(places)]
    num_videos = pairs.shape[1]
    answers = Answers(np.concatenate(found), np.tile(groups, len(found)))
    return LabelFreeScore(
        retrieval=answers.estimate(),
        by_colour=float(np.mean(by_colour)),
        chance=float(np.mean(1 / (num_videos - left_out.sum(axis=1)))) if left_out.any() else 1 / num_videos,
        effective_rank=effective_rank(chosen),
        num_videos=num_videos,
        num_clips=len(rows),
        answers=answers,
    )


def score_encoder(
    encoder: Encoder,
    manifest: Manifest,
    *,
    max_videos: int = MAX_VIDEOS,
    rounds: int = ROUNDS,
    batch_size: int = 16,
    cache: ClipCache | None = None,
) -> LabelFreeScore:
    """Scores an encoder on the held-out videos of a data set; only the clips that take part are read and embedded.

    Args:
        encoder: in evaluation mode.
        manifest: data set.
        max_videos: most videos that take part.
        rounds: most pairs of clips of each video.
        batch_size: clips in one forward.
        cache: cache for the clips of a remote data set; None uses the default one.

    Raises:
        ValueError: fewer than two held-out videos have two clips, a feature is not finite, or a clip is damaged.
    """
    rows, evaluation_set = scored_clips(manifest, max_videos=max_videos, rounds=rounds)
    sources = sources_of(rows)
    features = clip_features(encoder, manifest, rows, batch_size=batch_size, colour=False, cache=cache)
    found = score(
        features,
        video_ids=rows["video_id"].to_pylist(),
        start_seconds=rows["start_seconds"].to_numpy(),
        clip_seconds=seconds_of_clips(manifest, rows),
        colours=mean_colours(manifest, rows, cache=cache),
        sources=sources,
        max_videos=max_videos,
        rounds=rounds,
    )
    pairs = _pairs_of_rows(rows, manifest, max_videos=max_videos, rounds=rounds)[:ARROW_ROUNDS]
    both, places = np.unique(pairs, return_inverse=True)
    backwards = list(window(encoder, manifest).numbers(manifest.frame_shape[0]))[::-1]
    reversed_features = clip_features(
        encoder,
        manifest,
        rows.take(pa.array(both)),
        batch_size=batch_size,
        colour=False,
        numbers=backwards,
        cache=cache,
    )
    groups = _sources_of_pairs(pairs, sources)
    seen = arrow(features[both], reversed_features, pairs=places.reshape(pairs.shape), groups=groups)
    return replace(found, evaluation_set=evaluation_set, arrow=seen)


def arrow(features: Features, reversed_features: Features, *, pairs: Index, groups: Index) -> Estimate:
    """Share of pairs (A, B) of clips of one video in which A is nearer to B than to B played backwards, both ways.

    Chance is 50 %. An encoder that sees only single frames reaches just that, because ties count half. The score says
    nothing if the clips of a video move independently of each other, or if a movement looks the same backwards.

    Args:
        features: float32 (N, D).
        reversed_features: float32 (N, D), of the same clips played backwards.
        pairs: int64 (R, V, 2), rows of both arrays, as from `choose_pairs`.
        groups: int64 (V,), a number for the source of each video: they are resampled for the interval.
    """
    right = arrow_right(features, reversed_features, pairs=pairs)
    return estimate(right.ravel(), np.tile(groups, len(right)))


def arrow_right(features: Features, reversed_features: Features, *, pairs: Index) -> npt.NDArray[np.float64]:
    """The comparisons of `arrow`: 1 where A is nearer to B forwards, 0.5 for a tie; float64 (2 R, V)."""
    ahead, back = np.asarray(features, np.float64), np.asarray(reversed_features, np.float64)
    # One mean for both: otherwise clips played backwards would lie further from the centre than the others.
    mean = (ahead.mean(axis=0) + back.mean(axis=0)) / 2
    ahead, back = (
        apart / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-9) for apart in (ahead - mean, back - mean)
    )
    nearer = np.stack([(ahead[a] * (ahead[b] - back[b])).sum(axis=1) for a, b in _both_ways(pairs)])
    right: npt.NDArray[np.float64] = np.where(np.abs(nearer) < _TIE, 0.5, nearer > 0)
    return right


def scored_clips(manifest: Manifest, *, max_videos: int = MAX_VIDEOS, rounds: int = ROUNDS) -> tuple[pa.Table, str]:
    """The clips of a data set that the score needs: rows of its manifest, and the hash of the evaluation set.

    Raises:
        TooFewVideosError: fewer than two held-out sources have two clips that do not overlap.
    """
    if problem := scoring_problem(manifest):
        raise TooFewVideosError(problem)
    table = manifest.held_out()
    pairs = _pairs_of_rows(table, manifest, max_videos=max_videos, rounds=rounds)
    rows = table.take(pa.array(np.unique(pairs)))
    clips = "".join(rows["clip_id"].to_pylist()) + "".join(rows["sha256"].to_pylist())
    groups = _sources_of_pairs(pairs, sources_of(table)).tolist()
    shared = [str(groups)] if len(set(groups)) < len(groups) else []  # they decide what is looked up among what
    return rows, f"{hash64('label-free', clips, str(pairs.tolist()), *shared):016x}"


def _pairs_of_rows(rows: pa.Table, manifest: Manifest, *, max_videos: int, rounds: int) -> Index:
    """`choose_pairs` of rows of a manifest."""
    return choose_pairs(
        rows["video_id"].to_pylist(),
        start_seconds=rows["start_seconds"].to_numpy(),
        clip_seconds=seconds_of_clips(manifest, rows),
        sources=sources_of(rows),
        max_videos=max_videos,
        rounds=rounds,
    )


def choose_pairs(
    video_ids: Sequence[str],
    *,
    start_seconds: npt.ArrayLike,
    clip_seconds: npt.ArrayLike,
    sources: Sequence[str],
    max_videos: int = MAX_VIDEOS,
    rounds: int = ROUNDS,
) -> Index:
    """Pairs of clips of one video, half a video apart, that do not overlap in time.

    Returns:
        int64 (R, V, 2): in each round one pair of each of V videos, as rows of the arguments. A video with fewer
        pairs than rounds repeats them. The videos are sorted by name; if there are more than `max_videos`, a fixed
        draw chooses.

    Raises:
        TooFewVideosError: fewer than two sources have such a pair.
    """
    pairs_by_name = pairs_of_videos(video_ids, start_seconds=start_seconds, clip_seconds=clip_seconds)
    pairs_of = list(pairs_by_name.values())
    by_video = dict(zip(video_ids, sources, strict=True))
    source_of = [by_video[name] for name in pairs_by_name]
    fit = np.flatnonzero([len(pairs) > 0 for pairs in pairs_of])
    num_fit = len({source_of[video] for video in fit})
    if num_fit < MIN_SCORED:
        advice = (
            "hold more videos out (--held-out-percent of jobs/ingest.py), or cut more clips of each "
            "(--max-clips-per-video)"
        )
        num_sources = len(set(source_of))
        shared = num_sources < len(pairs_of)
        raise TooFewVideosError(too_few(num_fit, num_sources, advice=advice, shared=shared))
    drawn = fit[permutation(len(fit), hash64("score videos"))]
    fit = drawn[:max_videos]
    if len({source_of[video] for video in fit}) < MIN_SCORED:  # nothing would be wrong: one of another source instead
        fit[-1] = next(video for video in drawn if source_of[video] != source_of[fit[0]])
    fit = np.sort(fit)
    count = min(rounds, max(len(pairs_of[video]) for video in fit))
    return np.stack([[_spread(pairs_of[video], count)[place] for video in fit] for place in range(count)])


def effective_rank(features: npt.ArrayLike) -> float:
    """Number of directions that features (N, D) use: e to the entropy of their singular values (Roy, Vetterli 2007)."""
    apart = np.asarray(features, np.float64)
    apart = apart - apart.mean(axis=0)
    # Computed from the smaller of the two products: N may be large, and only the values are needed.
    product = apart.T @ apart if apart.shape[0] > apart.shape[1] else apart @ apart.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0))
    if values.sum() < 1e-9:
        return 1.0
    shares = values[values > values.max() * 1e-7] / values.sum()  # smaller ones are roots of rounding errors
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _spread(pairs: Index, count: int) -> Index:
    """`count` of the pairs, evenly spread, or all of them repeated."""
    if len(pairs) < count:
        return pairs[np.arange(count) % len(pairs)]
    return pairs[np.linspace(0, len(pairs) - 1, count).round().astype(np.int64)]


def _both_ways(places: Index) -> list[tuple[Index, Index]]:
    return [way for pair in places for way in ((pair[:, 0], pair[:, 1]), (pair[:, 1], pair[:, 0]))]


def _sources_of_pairs(pairs: Index, sources: Sequence[str]) -> Index:
    """A number for the source of each of the V videos of pairs, in the order in which they appear: int64 (V,)."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(sources[row], len(numbers)) for row in pairs[0, :, 0]], np.int64)


def _found(similarity: npt.NDArray[np.float64], left_out: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """For each row of (V, V), 1 where the diagonal is the largest; shared where several are equal."""
    similarity = np.where(left_out, -np.inf, similarity)
    best = similarity >= similarity.max(axis=1, keepdims=True)
    share: npt.NDArray[np.float64] = np.diagonal(best) / best.sum(axis=1)
    return share


def _squared_distances(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    distances: npt.NDArray[np.float64] = (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)
    return distances
