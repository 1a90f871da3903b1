"""The networks of VideoMoCo, how they follow each other, and the two losses.

Query encoder, key encoder, generator and queue; InfoNCE over a queue of decayed negatives, and the generator's loss.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vmoco.config import PretrainSettings
from vmoco.model.backbone import build_backbone, build_head
from vmoco.model.generator import Generator
from vmoco.model.padding import pad_channels
from vmoco.model.queue import KeyQueue
from vmoco.seed import hash64


class MocoEncoder(nn.Module):
    """Backbone and head: maps a clip to a point on the unit sphere.

    Args:
        backbone_name: see `build_backbone`.
        embedding_dim: D.
        head: "linear" or "mlp".
        num_frames: as for `build_backbone`.
        size: likewise.
        autocast_dtype: bfloat16 to run the backbone in it; None for float32.
    """

    def __init__(
        self,
        backbone_name: str,
        *,
        embedding_dim: int,
        head: str,
        num_frames: int = 16,
        size: int = 224,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone_name, num_frames=num_frames, size=size)
        self.head = build_head(head, self.backbone.feature_dim, embedding_dim)
        self.autocast_dtype = autocast_dtype

    @classmethod
    def of(cls, settings: PretrainSettings, *, autocast_dtype: torch.dtype | None = None) -> MocoEncoder:
        """The encoder of a run, randomly initialised by torch's global generator."""
        model = settings.model
        return cls(
            model.backbone,
            embedding_dim=model.embedding_dim,
            head=model.head,
            num_frames=settings.data.num_frames,
            size=settings.augment.size,
            autocast_dtype=autocast_dtype,
        )

    def forward(self, clips: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """float (B, 3, T, H, W) -> embeddings float32 (B, D), unit rows.

        Args:
            clips: normalised.
            factors: float32 (B, N), of the residual branches of a transformer: 0 where drop path leaves one out.
        """
        enabled = self.autocast_dtype is not None
        with torch.autocast(clips.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled):
            features = self.backbone(clips) if factors is None else self.backbone(clips, factors)
        # The embedding and everything after it is float32: cosines are divided by tau = 0.07.
        with torch.autocast(clips.device.type, enabled=False):
            dtype = next(self.head.parameters()).dtype
            return F.normalize(self.head(features.to(dtype)), dim=1)


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, batch normalisation uses its batch as in training, but does not update its running statistics."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    before = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracked in zip(layers, before, strict=True):
            layer.track_running_stats = tracked


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, a forward builds a graph for its input alone: a backward through it computes no gradient of weights."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Inside, batch normalisation uses its running statistics and changes nothing; then each layer is as it was."""
    before = [(layer, layer.training) for layer in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for layer, training in before:
            layer.training = training


class VideoMoco:
    """Everything that is trained. It is not one module, because each part is updated in its own way.

    Attributes:
        query: D, the query encoder; follows the contrastive loss.
        key: the key encoder; follows the query encoder by momentum.
        generator: G; follows the adversarial loss alone.
        queue: keys of earlier steps.
    """

    def __init__(
        self, settings: PretrainSettings, *, device: torch.device, autocast_dtype: torch.dtype | None = None
    ) -> None:
        # The initial weights follow from the seed alone: they are drawn on the CPU, not by the process's generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash64("initial weights", settings.run.seed) % 2**63)
            query = MocoEncoder.of(settings, autocast_dtype=autocast_dtype)
            generator = Generator(settings.generator)
        if settings.train.speeds_up_by("pad_channels"):
            pad_channels(query)
        self.query = query.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.generator = generator.to(device)
        self.queue = KeyQueue(settings.moco.queue_size, settings.model.embedding_dim, device=device)
        self.query.train()
        self.key.train()

    @torch.no_grad()  # the key encoder has no gradient of its own
    def update_key_encoder(self, momentum: float) -> None:
        """key = momentum * key + (1 - momentum) * query, in place, for all parameters at once (MoCo, equation 2)."""
        torch._foreach_lerp_(list(self.key.parameters()), list(self.query.parameters()), 1 - momentum)

    def running_statistics(self) -> list[torch.Tensor]:
        """The running means and variances of both encoders; none if they have no batch normalisation."""
        named = [*self.query.named_buffers(), *self.key.named_buffers()]
        return [buffer for name, buffer in named if name.endswith(("running_mean", "running_var"))]


@dataclass(frozen=True)
class ReversedKeys:
    """Keys of clips that are played backwards: each is one more negative of the query of its own clip.

    It has the objects and the light of the positive, so only the direction of time tells the two apart.
    """

    keys: torch.Tensor
    """float32 (B, D), unit rows; zero where a clip has none."""
    exists: torch.Tensor
    """bool (B,): which clips have one."""

    def __getitem__(self, at: slice) -> ReversedKeys:
        return ReversedKeys(self.keys[at], self.exists[at])


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
    reversed_keys: ReversedKeys | None = None,
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
        reversed_keys: one more negative, which is not decayed, for some of the queries.
    """
    assert queries.dtype.itemsize >= 4, "similarities need fp32: bf16 keeps 3 digits, tau multiplies the error by 14"
    positive = (queries * positives).sum(dim=1, keepdim=True)  # (B, 1)
    similarity = queries @ negatives.T  # similarity[i, j] is the cosine of query i and key j: (B, K)
    decayed = similarity * weights if decay_on == "logit" else similarity + temperature * weights.log()
    decayed = decayed.masked_fill(~allowed, float("-inf"))
    logits = torch.cat([positive, decayed], dim=1) / temperature
    if reversed_keys is not None:
        backwards = (queries * reversed_keys.keys).sum(dim=1).masked_fill(~reversed_keys.exists, float("-inf"))
        logits = torch.cat([logits, backwards[:, None] / temperature], dim=1)
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
