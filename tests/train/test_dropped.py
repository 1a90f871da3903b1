"""Entropy and overlap of dropped frames, against their definitions clip by clip."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from vmoco.train.metrics import DroppedFrames

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
