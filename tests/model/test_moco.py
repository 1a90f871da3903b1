"""The losses equal a slow plain version, written in numpy one query and one key at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vmoco.model.moco import ReversedKeys, adversarial_loss, contrast

TEMPERATURE = 0.07


def plain_loss(query, positive, negatives, weights, allowed, decay_on: str) -> float:
    """-log(e^(q.k+/tau) / (e^(q.k+/tau) + sum_i ...)) for one query, in float64."""
    numerator = math.exp(float(query @ positive) / TEMPERATURE)
    total = numerator
    for key, weight, is_allowed in zip(negatives, weights, allowed, strict=True):
        if not is_allowed:
            continue
        similarity = float(query @ key)
        if decay_on == "logit":
            total += math.exp(weight * similarity / TEMPERATURE)
        else:
            total += weight * math.exp(similarity / TEMPERATURE)
    return -math.log(numerator / total)


@pytest.mark.parametrize("decay_on", ["logit", "exp"])
def test_loss_equals_the_plain_version(decay_on: str) -> None:
    """Every query's loss agrees with the definition, with decay, masked keys and both places of the factor."""
    generator = torch.Generator().manual_seed(1)
    queries, positives = (F.normalize(torch.randn(5, 8, generator=generator), dim=1) for _ in range(2))
    negatives = F.normalize(torch.randn(11, 8, generator=generator), dim=1)
    weights = torch.rand(11, generator=generator)
    allowed = torch.rand(5, 11, generator=generator) > 0.3
    compared = contrast(
        queries,
        positives,
        negatives=negatives,
        weights=weights,
        allowed=allowed,
        temperature=TEMPERATURE,
        decay_on=decay_on,
    )
    as_numpy = [tensor.double().numpy() for tensor in (queries, positives, negatives, weights)]
    expected = [
        plain_loss(as_numpy[0][i], as_numpy[1][i], as_numpy[2], as_numpy[3], allowed[i].numpy(), decay_on)
        for i in range(5)
    ]
    np.testing.assert_allclose(compared.loss.numpy(), expected, rtol=1e-5)


def test_a_reversed_key_is_one_more_negative_of_its_own_query() -> None:
    """Not decayed, and absent where a clip has none; the positive wins only if it beats the reversed key as well."""
    generator = torch.Generator().manual_seed(2)
    queries, positives, backwards = (F.normalize(torch.randn(3, 8, generator=generator), dim=1) for _ in range(3))
    negatives = F.normalize(torch.randn(4, 8, generator=generator), dim=1)
    backwards[1] = queries[1]  # more similar than the positive can be
    exists = torch.tensor([True, True, False])
    weights, allowed = torch.full((4,), 0.5), torch.ones(3, 4, dtype=torch.bool)
    compared = contrast(
        queries,
        positives,
        negatives=negatives,
        weights=weights,
        allowed=allowed,
        temperature=TEMPERATURE,
        decay_on="exp",
        reversed_keys=ReversedKeys(backwards, exists),
    )
    expected = [
        plain_loss(
            queries[i].double().numpy(),
            positives[i].double().numpy(),
            torch.cat([negatives, backwards[i : i + 1]])[: 4 + int(exists[i])].double().numpy(),
            [0.5] * 4 + [1.0] * int(exists[i]),
            [True] * (4 + int(exists[i])),
            "exp",
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(compared.loss.numpy(), expected, rtol=1e-5)
    assert compared.correct[1] == 0


def test_no_negatives_is_no_loss() -> None:
    """Before the first key comes in, the loss is 0 and its gradient finite, and not a NaN."""
    queries = F.normalize(torch.randn(3, 4), dim=1).requires_grad_()
    compared = contrast(
        queries,
        queries.detach(),
        negatives=torch.zeros(6, 4),
        weights=torch.ones(6),
        allowed=torch.zeros(3, 6, dtype=torch.bool),
        temperature=TEMPERATURE,
        decay_on="logit",
    )
    compared.loss.sum().backward()
    assert compared.loss.tolist() == [0, 0, 0]
    assert queries.grad is not None
    assert torch.isfinite(queries.grad).all()


def test_exp_decay_removes_an_old_key_and_logit_decay_does_not() -> None:
    """A key of weight near 0 leaves the loss on the exponential; on the logit it stays, at similarity 0."""
    query = torch.tensor([[1.0, 0.0]])
    losses = {}
    for decay_on in ("logit", "exp"):
        losses[decay_on] = contrast(
            query,
            query,
            negatives=query,
            weights=torch.tensor([1e-30]),
            allowed=torch.tensor([[True]]),
            temperature=1.0,
            decay_on=decay_on,
        ).loss.item()
    assert losses["exp"] == pytest.approx(0, abs=1e-6)
    assert losses["logit"] == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)


def test_adversarial_loss_is_the_scaled_mean_difference() -> None:
    """-lambda * mean |q - q_real|, per clip."""
    dropped, whole = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    assert adversarial_loss(dropped, whole, strength=100).tolist() == [-100.0, -25.0]
