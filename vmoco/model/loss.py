"""InfoNCE over a queue of decayed negatives, and the generator's loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Contrast:
    """Result of comparing queries with keys; one entry per query."""

    loss: torch.Tensor
    """float32 (B,), with graph."""
    positive_similarity: torch.Tensor
    """float32 (B,): cosine of query and its key."""
    negative_similarity: torch.Tensor
    """float32 (B,): mean cosine with its negatives; 0 as long as there are none."""
    correct: torch.Tensor
    """float32 (B,): 1 where the positive is the most similar of all, as the loss weighs them."""


def contrast(
    queries: torch.Tensor,
    positives: torch.Tensor,
    *,
    negatives: torch.Tensor,
    weights: torch.Tensor,
    allowed: torch.Tensor,
    temperature: float,
    decay_on: str,
) -> Contrast:
    """The contrastive loss of D: -log(e^(q.k+ / tau) / (e^(q.k+ / tau) + sum_i e^(t^a_i q.k_i / tau))).

    The positive is not decayed. With `decay_on="exp"` a negative contributes t^a_i * e^(q.k_i / tau) instead, so an old
    key fades. With "logit" a dissimilar old key moves up towards similarity 0 (VideoMoCo, equation 3).

    Args:
        queries: float32 (B, D), unit rows.
        positives: float32 (B, D), unit rows: the key of each query.
        negatives: float32 (K, D), unit rows: a snapshot of the queue.
        weights: float32 (K,), the decay weight of each key.
        allowed: bool (B, K), which keys are negatives of which query.
        temperature: tau.
        decay_on: "logit" or "exp".
    """
    assert queries.dtype.itemsize >= 4, "similarities need fp32: bf16 keeps 3 digits, tau multiplies the error by 14"
    positive = (queries * positives).sum(dim=1, keepdim=True)  # (B, 1)
    similarity = queries @ negatives.T  # similarity[i, j] is the cosine of query i and key j: (B, K)
    decayed = similarity * weights if decay_on == "logit" else similarity + temperature * weights.log()
    decayed = decayed.masked_fill(~allowed, float("-inf"))
    logits = torch.cat([positive, decayed], dim=1) / temperature
    target = logits.new_zeros(len(logits), dtype=torch.int64)  # the positive is the first column
    num_allowed = allowed.sum(dim=1)
    return Contrast(
        loss=F.cross_entropy(logits, target, reduction="none"),
        positive_similarity=positive.detach().squeeze(1),
        negative_similarity=(similarity.detach() * allowed).sum(dim=1) / num_allowed.clamp(min=1),
        correct=(logits.detach().argmax(dim=1) == 0).float(),
    )


def adversarial_loss(dropped: torch.Tensor, whole: torch.Tensor, *, strength: float) -> torch.Tensor:
    """The loss of G, per clip: -lambda * mean |q - q_real| over the embedding, (B, D), (B, D) -> (B,).

    It falls when the embedding of the clip with dropped frames differs from that of the complete clip.
    """
    return -strength * (dropped - whole).abs().mean(dim=1)
