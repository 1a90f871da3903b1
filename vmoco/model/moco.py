"""The networks of VideoMoCo and how they follow each other: query encoder, key encoder, generator, queue."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from vmoco.config import PretrainSettings
from vmoco.model.backbone import build_backbone, build_head
from vmoco.model.generator import Generator
from vmoco.model.queue import KeyQueue
from vmoco.seed import hash64


class MocoEncoder(nn.Module):
    """Backbone and head: maps a clip to a point on the unit sphere.

    Args:
        backbone_name: see `build_backbone`.
        embedding_dim: D.
        head: "linear" or "mlp".
        autocast_dtype: bfloat16 to run the backbone in it; None for float32.
    """

    def __init__(
        self, backbone_name: str, *, embedding_dim: int, head: str, autocast_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone_name)
        self.head = build_head(head, self.backbone.feature_dim, embedding_dim)
        self.autocast_dtype = autocast_dtype

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """float (B, 3, T, H, W) -> embeddings float32 (B, D), unit rows."""
        enabled = self.autocast_dtype is not None
        with torch.autocast(clips.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled):
            features = self.backbone(clips)
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
            query = MocoEncoder(
                settings.model.backbone,
                embedding_dim=settings.model.embedding_dim,
                head=settings.model.head,
                autocast_dtype=autocast_dtype,
            )
            generator = Generator(settings.generator)
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
        """The running means and variances of both encoders."""
        named = [*self.query.named_buffers(), *self.key.named_buffers()]
        return [buffer for name, buffer in named if name.endswith(("running_mean", "running_var"))]
