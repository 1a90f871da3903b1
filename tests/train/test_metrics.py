"""Metrics are means over the clips of all ranks; dropped frames and spread of embeddings match their definitions."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ranks import run_on_ranks
from vmoco.evaluate.score import effective_rank
from vmoco.model.moco import Contrast
from vmoco.train import distributed
from vmoco.train.metrics import DroppedFrames, StepMetrics, embedding_std

CPU = torch.device("cpu")


def orthogonal(count: int, dim: int) -> torch.Tensor:
    """`count` unit directions at right angles, turned at random, and their opposites: float32 (2 * count, dim)."""
    turned, _ = np.linalg.qr(np.random.default_rng(count).normal(size=(dim, dim)))
    rows = torch.from_numpy(turned[:count]).float()
    return torch.cat([rows, -rows])


def test_effective_rank_is_that_of_the_score() -> None:
    """The metric of a step and the score of an encoder are one function: k orthogonal directions have rank k."""
    metrics = reduced(contrast_of(1.0))
    metrics.keys = orthogonal(5, 16)
    assert metrics.numbers()["effective_rank"] == effective_rank(metrics.keys.numpy()) == pytest.approx(5, rel=1e-4)
    metrics.keys = F.normalize(torch.ones(1, 16), dim=1).expand(64, -1)
    assert metrics.numbers()["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_embedding_std_is_one_when_spread_and_zero_when_collapsed() -> None:
    """Directions and their opposites: 1. One point: 0. Half of them on one point, half opposite: 1, along one line."""
    assert embedding_std(orthogonal(16, 16)) == pytest.approx(1, abs=1e-6)
    point = F.normalize(torch.ones(1, 16), dim=1)
    assert embedding_std(point.expand(32, -1)) == pytest.approx(0, abs=1e-6)
    assert embedding_std(torch.cat([point, -point])) == pytest.approx(1, abs=1e-6)
    random = F.normalize(torch.randn(4096, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    assert embedding_std(random) == pytest.approx(1, abs=0.01)


def test_embedding_std_is_the_distance_from_the_mean() -> None:
    """Two unit vectors at 60 degrees lie half a length from their mean."""
    pair = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])
    assert embedding_std(pair) == pytest.approx(0.5, abs=1e-6)


def contrast_of(*losses: float) -> Contrast:
    """Clips with the given losses and, from them, other numbers for the other metrics."""
    loss = torch.tensor(losses, dtype=torch.float32, requires_grad=True)
    plain = loss.detach()
    return Contrast(loss, plain + 10, plain + 100, (plain > 2).float())


def network(gradient: float) -> nn.Module:
    """Nine weights whose gradients all have the given value."""
    module = nn.Linear(3, 3, bias=False)
    module.weight.grad = torch.full((3, 3), gradient)
    return module


def reduced(*micro_batches: Contrast, stop: bool = False, gradient: float = 2.0) -> StepMetrics:
    metrics = StepMetrics.zeros(CPU)
    for compared in micro_batches:
        metrics.add(compared)
    metrics.add_flags(stop=stop)
    metrics.reduce_(network(gradient), nn.Linear(2, 2))
    metrics.send_flags()
    metrics.keys = torch.eye(4)
    return metrics


def test_numbers_are_means_over_clips() -> None:
    """Micro-batches of 3 and 1 clips: every clip counts the same, and not every micro-batch."""
    numbers = reduced(contrast_of(1, 2, 3), contrast_of(6)).numbers()
    assert numbers["loss"] == pytest.approx(3)
    assert numbers["positive_similarity"] == pytest.approx(13)
    assert numbers["negative_similarity"] == pytest.approx(103)
    assert numbers["accuracy"] == pytest.approx(0.5)
    assert numbers["gradient_norm"] == pytest.approx(6)  # nine gradients of 2
    assert "generator_loss" not in numbers  # it has not started


def test_generator_loss_is_a_mean_over_its_clips() -> None:
    """Reported from the first step in which the generator trains."""
    metrics = StepMetrics.zeros(CPU)
    metrics.add(contrast_of(1, 2, 3))
    metrics.add_generator(torch.tensor([-1.0, -2.0, -6.0]))
    metrics.add_flags(stop=False)
    metrics.reduce_(network(1.0), network(3.0))
    metrics.keys = torch.eye(4)
    numbers = metrics.numbers()
    assert numbers["generator_loss"] == pytest.approx(-3)
    assert numbers["generator_gradient_norm"] == pytest.approx(9)


def dropped_of_this_rank() -> list[float]:
    """Rank 0 has two micro-batches, rank 1 has one."""
    metrics = StepMetrics.zeros(CPU, num_frames=3)
    for mask in [[[1, 0, 1], [1, 0, 1]], [[0, 1, 1]]][: 2 - distributed.rank()]:
        metrics.add_dropped(torch.tensor(mask, dtype=torch.float32))
    metrics.add(contrast_of(1.0))
    metrics.add_flags(stop=False)
    metrics.reduce_(network(1.0), network(1.0))
    metrics.send_flags()
    assert metrics.flags() == (False, False, False, False)
    return metrics.dropped().tolist()


def test_dropped_frames_are_counted_over_ranks() -> None:
    """Clips that lost each position: 0 where the mask is 1; 2 + 2 clips lost the second, one the first."""
    assert run_on_ranks(2, dropped_of_this_rank) == [[1, 4, 0], [1, 4, 0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_seen(bad: float) -> None:
    """A loss that is not finite, in any clip, or a gradient: the step counts as bad; without one it does not."""
    assert not reduced(contrast_of(1, 2)).flags().non_finite
    assert reduced(contrast_of(1, bad)).flags().non_finite
    assert reduced(contrast_of(1, 2), gradient=bad).flags().non_finite


def numbers_of_this_rank() -> tuple[dict[str, float], bool, bool]:
    """Rank 0 has 3 clips and is not asked to stop; rank 1 has 1 clip, and is."""
    first = distributed.rank() == 0
    metrics = reduced(contrast_of(1, 2, 3) if first else contrast_of(6), stop=not first)
    bad = reduced(contrast_of(1) if first else contrast_of(math.nan))
    return metrics.numbers(), metrics.flags().stop, bad.flags() == (True, not first, False, False)


def test_numbers_on_ranks_are_those_of_one_process() -> None:
    """Ranks with 3 and 1 clips report the mean over all 4; one rank's wish to stop, or bad number, is known to both."""
    alone = reduced(contrast_of(1, 2, 3), contrast_of(6))
    for numbers, stop, bad in run_on_ranks(2, numbers_of_this_rank):
        assert numbers == pytest.approx(alone.numbers())
        assert stop
        assert bad
    assert not alone.flags().stop


T, K = 8, 2


def counted(*steps: list[tuple[int, ...]]) -> DroppedFrames:
    """Steps of clips, each given by the frames that it lost."""
    dropped = DroppedFrames(T, K)
    for clips in steps:
        counts = torch.zeros(T)
        for frame in itertools.chain(*clips):
            counts[frame] += 1
        dropped.add(counts)
    return dropped


def test_overlap_is_that_of_all_pairs_of_clips() -> None:
    """The share of dropped frames in common, averaged over every pair of 30 random clips in 3 steps."""
    random = np.random.default_rng(1)
    clips = [tuple(random.choice(T, K, replace=False, p=np.arange(1, T + 1) / 36).tolist()) for _ in range(30)]
    dropped = counted(clips[:10], clips[10:20], clips[20:])
    pairs = [len(set(one) & set(other)) / K for one, other in itertools.combinations(clips, 2)]
    assert dropped.numbers()["dropped_overlap"] == pytest.approx(np.mean(pairs))
    shares = [np.mean([frame in clip for clip in clips]) for frame in range(T)]
    assert dropped.shares() == pytest.approx(shares)
    entropy = -sum(share / K * math.log(share / K) for share in shares if share) / math.log(T)
    assert dropped.numbers()["dropped_entropy"] == pytest.approx(entropy)


def test_numbers_tell_even_from_collapsed() -> None:
    """Each set as often: entropy 1, overlap near K / T. The same set always: log K / log T and 1."""
    even = counted(list(itertools.combinations(range(T), K)) * 20).numbers()
    assert even == pytest.approx({"dropped_entropy": 1, "dropped_overlap": K / T}, abs=2e-3)
    collapsed = counted([(3, 4)] * 20).numbers()
    assert collapsed == pytest.approx({"dropped_entropy": math.log(K) / math.log(T), "dropped_overlap": 1})


def test_nothing_is_said_before_the_generator_starts() -> None:
    """No clips, no numbers; also where nothing is ever dropped, and after a new beginning."""
    assert counted([], []).numbers() == {}
    never = DroppedFrames(T, 0)
    never.add(torch.zeros(T))
    assert (never.num_clips(), never.numbers()) == (0, {})
    dropped = counted([(0, 1), (2, 3)])
    assert dropped.num_clips() == 2
    dropped.begin()
    assert (dropped.num_clips(), dropped.numbers()) == (0, {})


def test_document_is_the_histogram() -> None:
    """JSON with the step, the number of clips, and the share of each position."""
    found = json.loads(counted([(0, 1), (1, 2)], [(1, 5), (1, 7)]).document(step=40))
    assert (found["step"], found["clips"]) == (40, 4)
    assert found["dropped_share"] == [0.25, 1, 0.25, 0, 0, 0.25, 0, 0.25]
    assert found["dropped_overlap"] == pytest.approx(0.5)
