"""The label-free score of an encoder on several data sets: that of each, and their mean by the weights of training.

Clips of two sets are never compared with each other: sets often differ in how they look, and then to find the right set
would count as finding the right video. A set with too few held-out videos has no score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmoco.data.clip_cache import ClipCache
from vmoco.data.held_out import MIN_SCORED, scoring_problem
from vmoco.data.manifest import Manifest
from vmoco.data.mixture import Mixture
from vmoco.encoders.encoder import Encoder
from vmoco.encoders.promotion import LABEL_FREE, Score
from vmoco.evaluate.score import LabelFreeScore, TooFewVideosError, label_free_score, score_encoder
from vmoco.seed import hash64


@dataclass(frozen=True)
class ScoredSet:
    """The score on one data set of a mixture."""

    name: str
    weight: float
    """Of all sets that have a score these add up to 1."""
    found: LabelFreeScore


def sets_with_score(mixture: Mixture) -> list[tuple[str, float, Manifest]]:
    """Name, weight and manifest of each set that can be scored; the weights add up to 1.

    Raises:
        TooFewVideosError: none can.
    """
    rows = list(zip(mixture.names, mixture.weights, mixture.manifests, strict=True))
    problems = [scoring_problem(manifest) for manifest in mixture.manifests]
    able = [row for row, problem in zip(rows, problems, strict=True) if not problem]
    if not able:
        raise TooFewVideosError(problems[0])
    total = sum(weight for _, weight, _ in able)
    return [(name, weight / total, manifest) for name, weight, manifest in able]


def score_mixture(
    encoder: Encoder,
    mixture: Mixture,
    *,
    max_videos: int,
    cache_of: Callable[[Manifest], ClipCache | None] = lambda manifest: None,
) -> list[ScoredSet]:
    """Scores an encoder on the held-out videos of each set that has enough of them.

    Args:
        encoder: in evaluation mode.
        mixture: data sets.
        max_videos: largest number of videos that take part, over all sets.
        cache_of: the cache for the clips of a remote data set; None uses the default one.

    Raises:
        TooFewVideosError: no set has enough videos.
    """
    able = sets_with_score(mixture)
    share = max(MIN_SCORED, max_videos // len(able))
    return [
        ScoredSet(name, weight, score_encoder(encoder, manifest, max_videos=share, cache=cache_of(manifest)))
        for name, weight, manifest in able
    ]


def joined_score(scored: list[ScoredSet]) -> Score:
    """The mean by weight, in the form in which it is recorded; of one set, its score.

    The sets are independent, so the two halves of the interval are the root of the sum of the squared halves of the
    sets, each by its weight.
    """
    if len(scored) == 1:
        return label_free_score(scored[0].found)
    kept = [(each.weight, each.found.retrieval) for each in scored]
    value = sum(weight * found.value for weight, found in kept)
    below = sum((weight * (found.value - found.low)) ** 2 for weight, found in kept) ** 0.5
    above = sum((weight * (found.high - found.value)) ** 2 for weight, found in kept) ** 0.5
    beside = "; ".join(f"{each.name} {each.found.retrieval}, mean colour {each.found.by_colour:.1%}" for each in scored)
    sets = [(each.found.evaluation_set, round(each.weight, 6)) for each in scored]
    return Score(LABEL_FREE, f"{hash64('mixture', str(sets)):016x}", value, value - below, value + above, beside)


def joined_numbers(scored: list[ScoredSet]) -> dict[str, float]:
    """Metrics for the tracker, by name: means by weight, and of several sets retrieval and arrow of each."""
    if len(scored) == 1:
        return scored[0].found.numbers()
    each = {one.name: one.found.numbers() for one in scored}
    names = [name for name in each[scored[0].name] if all(name in numbers for numbers in each.values())]
    joined = {name: sum(one.weight * each[one.name][name] for one in scored) for name in names}
    score = joined_score(scored)
    joined |= {"retrieval_low": score.low, "retrieval_high": score.high}
    return joined | {
        f"{what}_of_{name}": numbers[what]
        for name, numbers in each.items()
        for what in ("retrieval", "arrow")
        if what in numbers
    }
