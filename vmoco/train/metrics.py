"""What a step reports. All of it is a sum over clips until it is read, so that ranks and steps simply add up."""

from __future__ import annotations

import torch
from torch import nn

from vmoco.model.loss import Contrast
from vmoco.train import distributed

_SUMS = ("clips", "loss", "positive_similarity", "negative_similarity", "accuracy", "generator_clips", "generator_loss")
_FLAGS = ("non_finite", "stop", "checkpoint")


class StepMetrics:
    """Sums over the clips of a step, on the device: reading a number waits for it, adding does not.

    Attributes:
        keys: float32 (G, D), the keys of the step.
        gradient_norm: of the query encoder, after averaging over ranks.
        generator_gradient_norm: of the generator; 0 before it starts.
        decay: t of the step.
    """

    def __init__(self, sums: torch.Tensor) -> None:
        self._sums = sums
        self.keys = sums.new_zeros(0, 0)
        self.gradient_norm = sums.new_zeros(())
        self.generator_gradient_norm = sums.new_zeros(())
        self.decay = 1.0

    @classmethod
    def zeros(cls, device: torch.device, *, num_frames: int = 0) -> StepMetrics:
        """Before the first clip; `num_frames` (T) is how many positions can be dropped."""
        return cls(torch.zeros(len(_SUMS) + len(_FLAGS) + num_frames, device=device))

    def add(self, compared: Contrast) -> None:
        """Adds the clips of a micro-batch."""
        self._sums[0] += len(compared.loss)
        self._sums[1] += compared.loss.detach().sum()
        self._sums[2] += compared.positive_similarity.sum()
        self._sums[3] += compared.negative_similarity.sum()
        self._sums[4] += compared.correct.sum()

    def add_generator(self, loss: torch.Tensor) -> None:
        """Adds the generator's loss of a micro-batch, (B,)."""
        self._sums[5] += len(loss)
        self._sums[6] += loss.sum()

    def add_dropped(self, mask: torch.Tensor) -> None:
        """Adds the frames that the generator drops from a micro-batch: those where the mask (B, T) is 0."""
        self._sums[len(_SUMS) + len(_FLAGS) :] += (mask == 0).sum(dim=0)

    def add_flags(self, *, stop: bool, checkpoint: bool = False) -> None:
        """Notes whether this rank was asked to stop or to keep its state, and whether its losses are finite."""
        self._sums[len(_SUMS)] = (~torch.isfinite(self._sums[: len(_SUMS)]).all()).float()
        self._sums[len(_SUMS) + 1] = float(stop)
        self._sums[len(_SUMS) + 2] = float(checkpoint)

    def reduce_(self, query: nn.Module, generator: nn.Module) -> None:
        """Adds up over ranks; then a gradient that is not finite counts as well (it is the same on all ranks)."""
        distributed.sum_(self._sums)
        self.gradient_norm, self.generator_gradient_norm = _gradient_norm(query), _gradient_norm(generator)
        norms = torch.stack([self.gradient_norm, self.generator_gradient_norm])
        self._sums[len(_SUMS)] += (~torch.isfinite(norms).all()).float()

    def non_finite(self) -> bool:
        """Whether a loss or gradient was not finite, here before `reduce_` and anywhere after it."""
        return bool(self._sums[len(_SUMS)] > 0)

    def mean_generator_loss(self) -> torch.Tensor:
        """L_G over the clips of all ranks, float32 scalar, after `reduce_`; for steps in which G trains."""
        return self._sums[6] / self._sums[5]

    def dropped(self) -> torch.Tensor:
        """How many clips of all ranks lost each frame to the generator, float32 (T,), after `reduce_`."""
        return self._sums[len(_SUMS) + len(_FLAGS) :]

    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return bool(self._sums[len(_SUMS) + 1] > 0)

    def checkpoint(self) -> bool:
        """Whether any rank was asked to keep the state."""
        return bool(self._sums[len(_SUMS) + 2] > 0)

    def numbers(self) -> dict[str, float]:
        """Means over the clips, by the name that they are tracked under."""
        sums = dict(zip(_SUMS, self._sums.tolist(), strict=False))
        clips = max(sums["clips"], 1)
        means = {name: sums[name] / clips for name in _SUMS[1:5]}
        if sums["generator_clips"]:
            means["generator_loss"] = sums["generator_loss"] / sums["generator_clips"]
            means["generator_gradient_norm"] = float(self.generator_gradient_norm)
        means["decay"] = self.decay
        means["gradient_norm"] = float(self.gradient_norm)
        means["embedding_std"] = embedding_std(self.keys)
        means["effective_rank"] = effective_rank(self.keys)
        return means


def _gradient_norm(module: nn.Module) -> torch.Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else next(module.parameters()).new_zeros(())


def embedding_std(embeddings: torch.Tensor) -> float:
    """Spread of unit vectors (B, D): 1 when even over the sphere, 0 when collapsed onto one point."""
    deviation = embeddings.std(dim=0, correction=0).square().sum().sqrt()  # at most 1 for unit rows
    return float(deviation)


def effective_rank(embeddings: torch.Tensor) -> float:
    """Directions that embeddings (B, D) use: e to the entropy of their singular values (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(embeddings.float() - embeddings.float().mean(dim=0))
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(shares * (shares + 1e-12).log()).sum()))
