"""VideoMoCo in one file, to read from top to bottom. It is slow and plain, and the real step is tested against it.

It is written as on a board: one process, plain torch, loops over clips and keys. Three things are given: an encoder
(clip to vector, not yet normalised), a generator (clip to one importance for each frame, on the simplex), and batches
of augmented clips. AdamW, schedules of the decay and mixed precision are left out.

Sources: [V] Pan et al., VideoMoCo, CVPR 2021. [M] He et al., Momentum Contrast, CVPR 2020. [G] Goyal et al., Accurate,
Large Minibatch SGD, 2017. Shape letters are those of `vmoco/__init__.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters, with their letters in the papers."""

    num_steps: int
    generator_start: int  # first step, counted from 0, in which G chooses the frames and learns
    global_batch: int  # G
    micro_batch: int  # M
    num_ranks: int  # has an effect on running statistics alone
    queue_size: int  # K
    momentum: float  # m, of the key encoder
    temperature: float  # tau
    decay: float  # t
    decay_on: str  # "logit" [V] or "exp"
    age_unit: str  # "step" or "key"
    num_dropped: int  # k, frames of a clip
    fill: str  # what stands in for a dropped frame: "mean", its own mean colour, or "zero"
    strength: float  # lambda, of the generator's loss
    learning_rate: float  # of D, for 32 clips a step
    generator_learning_rate: float  # of G, for 32 clips a step
    schedule: str  # "step" [V] or "cosine"
    warmup_steps: int
    sgd_momentum: float
    weight_decay: float
    objective: str = "difference"  # what G raises: |q - q_real| [V], or "contrast", the loss of D
    sampled: bool = False  # frames are drawn in proportion to their importance, not the most important ones
    every: int = 1  # G trains in every n-th step from its start on


@dataclass(frozen=True)
class Batch:
    """The G clips of one step."""

    clips: torch.Tensor  # x: (G, 3, T, H, W)
    key_clips: torch.Tensor  # x', the other view of each: (G, 3, T, H, W)
    video_ids: list[int]  # the video that each clip comes from
    key_order: torch.Tensor  # int64 (G,), the shuffled order in which keys are made
    random_importance: torch.Tensor | None  # (G, T), to drop random frames before G starts; None keeps all
    noise: torch.Tensor | None = None  # (G, T) in (0, 1), to sample the frames that G drops
    reversed_clips: frozenset[int] = frozenset()  # those whose key, played backwards, is one more negative of the query


Key = tuple[torch.Tensor, int, int]  # in the queue: the vector (D,), its video, the step that made it


def drop_frames(
    clips: torch.Tensor, importance: torch.Tensor, recipe: Recipe, *, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """x~ = m * x + (1 - m) * fill, without the k most important frames: (B, 3, T, H, W), (B, T) -> (B, 3, T, H, W).

    With noise (B, T) in (0, 1), the frames with the largest log p + Gumbel noise go instead.
    """
    keep = torch.ones_like(importance)
    scores = importance if noise is None else importance.log() - torch.log(-torch.log(noise))
    for clip, frames in enumerate(scores.topk(recipe.num_dropped, dim=1).indices):
        keep[clip, frames] = 0
    # Straight through the choice: the value of the mask is `keep`, its derivative by the importance is -1.
    mask = (keep - (importance - importance.detach()))[:, None, :, None, None]
    fill = clips.mean(dim=(3, 4), keepdim=True) if recipe.fill == "mean" else torch.zeros_like(clips)
    return mask * clips + (1 - mask) * fill


def contrast(
    query: torch.Tensor,
    positive: torch.Tensor,
    queue: list[Key],
    *,
    video_id: int,
    step: int,
    recipe: Recipe,
    backwards: torch.Tensor | None = None,
) -> tuple[torch.Tensor, bool]:
    """InfoNCE [M, equation 1] of one query with decayed negatives [V, section 3.3], and whether the positive wins.

    L_D = -log(e^(q.k+ / tau) / (e^(q.k+ / tau) + sum_i e^(t^a_i * q.k_i / tau))), where a_i is the age of key i. The
    positive is not decayed. A key of the query's own video is not a negative, but its key played backwards is.
    """
    right = torch.exp(query @ positive / recipe.temperature)
    wrong = []
    for place, (key, key_video, key_step) in enumerate(queue):  # oldest first: the last has age 1 in both units
        if key_video == video_id:
            continue
        age = step - key_step if recipe.age_unit == "step" else len(queue) - place
        weight, similarity = recipe.decay**age, query @ key
        if recipe.decay_on == "logit":
            wrong.append(torch.exp(weight * similarity / recipe.temperature))
        else:
            wrong.append(weight * torch.exp(similarity / recipe.temperature))
    if backwards is not None:
        wrong.append(torch.exp(query @ backwards / recipe.temperature))
    return -torch.log(right / (right + sum(wrong))), all(right >= each for each in wrong)


def learning_rate(base: float, step: int, recipe: Recipe) -> float:
    """Proportional to the batch and warmed up linearly [G]; x0.1 at 60 % and 80 % of training [V], or cosine to 0."""
    peak = base * recipe.global_batch / 32
    if step < recipe.warmup_steps:
        return peak * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "cosine":
        done = (step - recipe.warmup_steps) / (recipe.num_steps - recipe.warmup_steps)
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak * 0.1 ** sum(step >= share * recipe.num_steps for share in (0.6, 0.8))


class VideoMoco:
    """D, its key encoder, G and the queue; `take_step` is the algorithm."""

    def __init__(self, encoder: nn.Module, generator: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self.query = copy.deepcopy(encoder)  # D
        self.key = copy.deepcopy(encoder)
        self.generator = copy.deepcopy(generator)  # G
        self.queue: list[Key] = []  # oldest first
        self.velocity: dict[nn.Parameter, torch.Tensor] = {}  # of SGD
        self.step = 0

    def take_step(self, batch: Batch) -> dict[str, float]:
        """Takes one step; returns means over the G clips, and the norm of each gradient."""
        recipe, num_clips, generator_on = self.recipe, len(batch.clips), self.step >= self.recipe.generator_start
        generator_trains = generator_on and (self.step - recipe.generator_start) % recipe.every == 0
        sums = dict.fromkeys(("loss", "accuracy", "positive_similarity", "generator_loss"), 0.0)

        # 1. The key encoder follows the query encoder: key = m * key + (1 - m) * query [M, equation 2].
        with torch.no_grad():
            for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
                slow.copy_(recipe.momentum * slow + (1 - recipe.momentum) * fast)

        # 2. Keys. A key is normalised beside other clips than its query: shuffle-BN [M, section 3.3].
        with torch.no_grad():
            shuffled, backwards = [], {}
            for places in self._micro_batches(self.key, batch.key_order):
                # Those that are also played backwards are normalised beside the others.
                chosen = [place for place in places.tolist() if place in batch.reversed_clips]
                clips = torch.cat([batch.key_clips[places], batch.key_clips[chosen].flip(dims=[2])])
                made = F.normalize(self.key(clips), dim=1)
                shuffled.append(made[: len(places)])
                backwards |= dict(zip(chosen, made[len(places) :], strict=True))
        keys = torch.cat(shuffled)[torch.argsort(batch.key_order)]  # key i belongs to query i again

        # 3. Gradients of both losses. Those of micro-batches add up; every clip has the weight 1 / G.
        for places in self._micro_batches(self.query, torch.arange(num_clips)):
            clips = dropped = batch.clips[places]
            if generator_on:
                noise = batch.noise[places] if recipe.sampled and batch.noise is not None else None
                dropped = drop_frames(clips, self.generator(clips), recipe, noise=noise)
            elif batch.random_importance is not None:
                dropped = drop_frames(clips, batch.random_importance[places], recipe)
            queries = F.normalize(self.query(dropped), dim=1)  # q = f(x~), the only query

            if (
                generator_trains and recipe.objective == "difference"
            ):  # L_G = -lambda * mean |q - q_real|. Only G follows it, and G follows nothing else.
                # q_real = f(x) is a constant. A copy of D computes it, because the running statistics follow x~ alone.
                whole = F.normalize(copy.deepcopy(self.query)(clips), dim=1).detach()
                loss = -recipe.strength * (queries - whole).abs().mean(dim=1).sum() / num_clips
                loss.backward(inputs=list(self.generator.parameters()), retain_graph=True)
                sums["generator_loss"] += loss.item()

            compared = [
                contrast(
                    query,
                    keys[i],
                    self.queue,
                    video_id=batch.video_ids[i],
                    step=self.step,
                    recipe=recipe,
                    backwards=backwards.get(i),
                )
                for query, i in zip(queries, places.tolist(), strict=True)
            ]
            loss = torch.stack([each for each, _ in compared]).sum() / num_clips  # L_D. Only D follows it,
            if generator_trains and recipe.objective == "contrast":  # or G as well, against it: L_G = -L_D.
                (-loss).backward(inputs=list(self.generator.parameters()), retain_graph=True)
                sums["generator_loss"] -= loss.item()
            loss.backward(inputs=list(self.query.parameters()))
            sums["loss"] += loss.item()
            sums["accuracy"] += sum(wins for _, wins in compared) / num_clips
            sums["positive_similarity"] += (queries * keys[places]).sum().item() / num_clips

        # 4. One step of each optimizer.
        sums["gradient_norm"] = self._descend(self.query, recipe.learning_rate)
        if generator_trains:
            sums["generator_gradient_norm"] = self._descend(self.generator, recipe.generator_learning_rate)

        # 5. The keys become negatives of later steps; the queue forgets the oldest [M, section 3.2].
        self.queue += [(keys[place], batch.video_ids[place], self.step) for place in range(num_clips)]
        self.queue = self.queue[-recipe.queue_size :]
        self.step += 1
        return sums

    def _micro_batches(self, encoder: nn.Module, order: torch.Tensor) -> Iterator[torch.Tensor]:
        """Splits an order into micro-batches of M places; batch normalisation sees one at a time.

        No loss depends on running statistics. They begin alike on all ranks, follow the micro-batches of each rank, and
        end as the mean over ranks.
        """
        parts, num_ranks = order.split(self.recipe.micro_batch), self.recipe.num_ranks
        statistics = [buffer for buffer in encoder.buffers() if buffer.is_floating_point()]
        start, ends = [each.clone() for each in statistics], []
        for rank in range(num_ranks):
            for each, value in zip(statistics, start, strict=True):
                each.copy_(value)
            yield from parts[rank * len(parts) // num_ranks : (rank + 1) * len(parts) // num_ranks]
            ends.append([each.clone() for each in statistics])
        for each, *of_ranks in zip(statistics, *ends, strict=True):
            each.copy_(torch.stack(of_ranks).mean(dim=0))

    @torch.no_grad()  # changes parameters in place
    def _descend(self, network: nn.Module, base: float) -> float:
        """SGD with momentum and an L2 penalty: v = mu * v + g + wd * w, w = w - lr * v; returns the norm of g."""
        squares = 0.0
        for weight in network.parameters():
            assert weight.grad is not None
            squares += weight.grad.square().sum().item()
            pull = weight.grad + self.recipe.weight_decay * weight
            self.velocity[weight] = self.recipe.sgd_momentum * self.velocity.get(weight, 0) + pull
            weight.sub_(learning_rate(base, self.step, self.recipe) * self.velocity[weight])
            weight.grad = None
        return math.sqrt(squares)
