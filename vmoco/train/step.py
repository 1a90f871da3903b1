"""One step of VideoMoCo, from a rank's uint8 frames to updated encoders and queue.

The gradients come from one forward and one backward through DDP. The generator's loss is first differentiated by the
pixels of x~ alone (`torch.autograd.grad`, which touches no parameter and so starts no reducer). Then the contrastive
loss runs backward once. After one DDP forward a second backward through parameters would not be reduced, and replicas
would silently diverge. The cost is 6 forwards of the encoder: q, q_real and k 3, the backward for G 1, for D 2.

With `--generator.objective contrast` G follows the same loss as D with the sign reversed. Then the one backward of D
also gives the gradient of the pixels, and there is no q_real: 4 forwards, and the stem's gradient of its input. If G
learns from a part p of the clips (`--generator.clips-percent`), these are encoded apart from D: 4 + 3 p forwards.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from vmoco.config import PretrainSettings
from vmoco.data.augment import augment, to_pixels
from vmoco.data.loader import RankBatch, View
from vmoco.model.generator import drop_frames, frame_fill, importance_gradient, keep_mask, sampling_scores
from vmoco.model.moco import (
    ReversedKeys,
    adversarial_loss,
    contrast,
    evaluation_mode,
    frozen,
    running_statistics_kept,
)
from vmoco.model.queue import decay_at, key_weights
from vmoco.train import distributed
from vmoco.train.metrics import StepMetrics, hardness
from vmoco.train.optimizer import clip_gradients, learning_rate, take_step
from vmoco.train.rank_times import OwnTime
from vmoco.train.speed import compared_alike, compile_networks, uncompiled
from vmoco.train.state import TrainState


class NonFiniteError(ValueError):
    """A loss, gradient or state is not finite: the run stops, and no checkpoint contains it.

    The state in memory contains it (running statistics, momentum) and must be thrown away.

    Attributes:
        step: the step with that loss or gradient, counted from 0; of a state the last step before it was looked at.
        clip_ids: clips of each rank's queries in that step; empty for a state.
    """

    def __init__(self, message: str, *, step: int = 0, clip_ids: Sequence[list[str]] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.clip_ids = list(clip_ids)


class TrainStep:
    """Takes steps on a training state.

    Args:
        settings: of the run.
        state: what is trained; changed in place.
        device: where the networks are.

    Attributes:
        own_time: time that this rank works in a step before it has to wait for others.
    """

    def __init__(self, settings: PretrainSettings, state: TrainState, device: torch.device) -> None:
        self._settings = settings
        self._state = state
        self._device = device
        self._moco = state.moco
        # Number, clips and metrics of the steps whose flags are not read yet. A CPU has them at once, and decides
        # before its optimizers run. A GPU works behind this process: to wait for the same step would leave it idle.
        self._unread: list[tuple[int, list[str], StepMetrics]] = []
        self._num_late = 0 if device.type == "cpu" else 1
        self._stop = self._checkpoint = False
        self.own_time = OwnTime(device)
        compile_networks(state.moco, settings.train)
        self._query = distributed.data_parallel(state.moco.query, device)
        self._generator = distributed.data_parallel(state.moco.generator, device)

    def __call__(
        self, batch: RankBatch, *, stop_requested: bool = False, checkpoint_requested: bool = False
    ) -> StepMetrics:
        """Takes one step.

        Args:
            batch: this rank's part of the step.
            stop_requested: whether this rank was asked to stop; `requested` says whether any was.
            checkpoint_requested: whether this rank was asked to keep the state now; likewise.

        Returns:
            The step's metrics, equal on all ranks.

        Raises:
            NonFiniteError: on all ranks, if any of them has a loss or gradient that is not finite: on a CPU in this
                step and before the optimizers run, on a GPU in the step before.
        """
        settings, state, moco = self._settings, self._state, self._moco
        assert batch.step == state.step, f"batch of step {batch.step} at step {state.step}"
        self._set_learning_rates(batch.step)
        self.own_time.begin()

        moco.update_key_encoder(settings.moco.momentum)
        keys = self._encode_all_keys(batch)
        num_sets = len(settings.data.weights)  # a single data set has no weight
        metrics = StepMetrics.zeros(self._device, num_frames=settings.data.num_frames, num_sets=num_sets)
        metrics.decay = decay_at(
            batch.step, settings.moco, total_steps=settings.train.steps, difference=state.difference
        )
        weights = key_weights(moco.queue.ages(batch.step, unit=settings.moco.age_unit), metrics.decay)
        for micro, is_last in self._micro_batches(len(batch.clip_ids)):
            with self._gradients_reduced(is_last):
                self._backward(batch, micro, keys=keys, weights=weights, metrics=metrics, is_last=is_last)

        # Both encoders have seen all their clips, so their running statistics are those of the step.
        average = distributed.start_average(moco.running_statistics())
        metrics.add_flags(stop=stop_requested, checkpoint=checkpoint_requested)
        # Every rank waits here for all: they decide together whether to go on.
        metrics.reduce_(moco.query, moco.generator)
        metrics.send_flags()
        self._unread.append((batch.step, batch.clip_ids, metrics))
        self._read_flags(keep=self._num_late)
        if largest := settings.train.clip_gradient_norm:
            metrics.clipped = clip_gradients(moco.query, metrics.gradient_norm, largest=largest)
        take_step(state.query_optimizer)
        if settings.trains_generator(batch.step):
            take_step(state.generator_optimizer)
            metrics.generator_trained = True
            if settings.generator.objective == "difference":
                state.difference.copy_(metrics.mean_generator_loss() / -settings.generator.strength)
        state.zero_grad()
        average()
        metrics.keys, _ = keys()
        moco.queue.enqueue(metrics.keys, self._put(batch.video_ids), step=batch.step)
        state.step += 1
        return metrics

    def requested(self, *, now: bool) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any was asked to keep the state, since the last call.

        Called after each step, on all ranks alike. On a GPU the answer is of the step before the last one.

        Args:
            now: read the last step too, because the state will be kept or reported.

        Raises:
            NonFiniteError: on all ranks, if a step that is read has a loss or gradient that is not finite.
        """
        self._read_flags(keep=0 if now else self._num_late)
        if self._stop or self._checkpoint:
            self._read_flags(keep=0)  # the state will be kept, so it must be known to be finite
        keep, self._checkpoint = self._checkpoint, False
        return self._stop, keep

    def _read_flags(self, *, keep: int) -> None:
        """Waits for the flags of all steps but the last `keep` ones."""
        while len(self._unread) > keep:
            step, clip_ids, metrics = self._unread.pop(0)
            flags = metrics.flags()
            if flags.non_finite:
                self._raise_non_finite(step, clip_ids, flags.non_finite_here)
            self._stop |= flags.stop
            self._checkpoint |= flags.checkpoint

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a tensor of the batch to the device; from page-locked memory without waiting for it."""
        return tensor.to(self._device, non_blocking=True)

    def _encode_all_keys(self, batch: RankBatch) -> Callable[[], tuple[torch.Tensor, ReversedKeys | None]]:
        """Encodes this rank's keys and starts to exchange them, while the queries are encoded.

        Returns:
            A function that waits for the keys of the whole global batch, in plan order, float32 (G, D), and those
            played backwards.
        """
        chosen = batch.reversed_keys[batch.share]
        parts = [
            self.encode_keys(View(batch.key.frames[micro], batch.key.draws[micro]), backwards=chosen[micro])
            for micro, _ in self._micro_batches(len(batch.key.frames))
        ]
        own, backwards = (torch.cat(each) for each in zip(*parts, strict=True))
        # Each rank gets the keys that the others encoded: 512 bytes a key are all the data that ranks exchange.
        shuffled = distributed.start_gather(own, batch.clips_per_rank)
        order = self._put(batch.key_order)
        number, size = self._settings.num_reversed, self._settings.train.micro_batch
        gathered = None
        if number:
            # Likewise the keys of reversed clips; every rank has them in the order of the shuffled copy.
            places = self._put(batch.key_order[batch.reversed_keys])
            counts = [count // size * number for count in batch.clips_per_rank]
            gathered = distributed.start_gather(backwards, counts)

        @functools.cache  # all micro-batches ask, and the queue
        def in_order() -> tuple[torch.Tensor, ReversedKeys | None]:
            keys = own.new_empty(len(order), own.shape[1])
            keys[order] = shuffled()
            if gathered is None:
                return keys, None
            reversed_keys = ReversedKeys(
                torch.zeros_like(keys), torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
            )
            reversed_keys.keys[places], reversed_keys.exists[places] = gathered(), True
            return keys, reversed_keys

        return in_order

    @torch.no_grad()  # keys are targets
    def encode_keys(self, view: View, *, backwards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys of the clips of one micro-batch, float32 (B, D), and of those that are also played backwards, (N, D).

        Both go through one forward, because batch normalisation must not tell a reversed clip from others.

        Args:
            view: one micro-batch.
            backwards: bool (B,) on the host, N of them true.
        """
        clips = self._augmented(view, slice(None))
        if self._settings.num_reversed:
            # On the host, because the number of clips must be known without waiting for a GPU.
            chosen = self._put(backwards.nonzero().squeeze(1))
            clips = torch.cat([clips, clips[chosen].flip(2)]).contiguous(memory_format=torch.channels_last_3d)
        keys: torch.Tensor = self._moco.key(clips)
        return keys[: len(view.frames)], keys[len(view.frames) :]

    def _backward(
        self,
        batch: RankBatch,
        micro: slice,
        *,
        keys: Callable[[], tuple[torch.Tensor, ReversedKeys | None]],
        weights: torch.Tensor,
        metrics: StepMetrics,
        is_last: bool,
    ) -> None:
        """Forward and backward of one micro-batch; adds to the gradients and to the metrics."""
        settings, moco = self._settings, self._moco
        trains, objective = settings.trains_generator(batch.step), settings.generator.objective
        clips = self._augmented(batch.query, micro)
        dropped, fill, importance, mask = self._drop_frames(clips, batch, micro)
        # Drop path is a part of f, and the same for x~ and x: G compares them, and shall see the dropped frames alone.
        paths = () if batch.branch_factors is None else (self._put(batch.branch_factors[micro]),)
        # From D: G has a loss and a backward of its own.
        separately = trains and objective == "difference" and self._learns_from_all
        if trains and not self._learns_from_all:
            if is_last:
                self.own_time.end()  # DDP of G waits for the other ranks
            self._learn_from_some(clips, dropped, *paths, fill=fill, importance=importance, metrics=metrics)
        # Each clip has the weight 1 / G, on every rank. DDP takes the mean over ranks, hence the number of ranks.
        weight = distributed.world_size() / settings.train.global_batch

        with compared_alike(settings.train) if separately else contextlib.nullcontext():
            queries = self._query(dropped, *paths)
        self.own_time.end()  # the next line waits for the keys of the other ranks, and a last backward for all
        positives, backwards = keys()
        if not is_last:
            self.own_time.begin()
        compared = contrast(
            queries,
            positives[batch.share][micro],
            negatives=moco.queue.keys,
            weights=weights,
            allowed=moco.queue.negatives_of(self._put(batch.video_ids[batch.share][micro])),
            temperature=settings.moco.temperature,
            decay_on=settings.moco.decay_on,
            reversed_keys=backwards[batch.share][micro] if backwards else None,
        )
        self._look("the contrastive loss", compared.loss)
        metrics.add(compared)
        if settings.data.weights:
            metrics.add_of_sets(compared.loss, self._put(batch.data_sets[micro]))
        if self._is_adversarial(batch.step):
            metrics.add_dropped(mask)
        if separately:
            # q_real is a constant of G's loss: without graph, and without a second update of the running statistics.
            with torch.no_grad(), running_statistics_kept(moco.query), compared_alike(settings.train):
                whole = moco.query(clips, *paths)
            loss = adversarial_loss(queries, whole, strength=settings.generator.strength)
            self._look("the generator's loss", loss)
            (pixels,) = torch.autograd.grad(loss.sum() * weight, dropped, retain_graph=True)
            self._look("the gradient of the generator's loss by the pixels", pixels)
            importance.backward(importance_gradient(pixels, clips, fill, estimator=settings.generator.estimator))
            metrics.add_generator(loss.detach())
        # The parameters alone, unless G needs the pixels: each further tensor costs a gradient of the stem's input.
        inputs = [*moco.query.parameters(), *([dropped] if trains and objective == "contrast" else [])]
        (compared.loss.sum() * weight).backward(inputs=inputs)
        if trains and objective == "contrast":
            assert dropped.grad is not None, "D's backward has reached the pixels"
            # L_G = -L_D: G raises the loss that D lowers.
            gradient = importance_gradient(-dropped.grad, clips, fill, estimator=settings.generator.estimator)
            importance.backward(gradient)
            metrics.add_generator(-compared.loss.detach())

    @property
    def _learns_from_all(self) -> bool:
        settings = self._settings
        return settings.generator.objective == "contrast" or settings.num_generator_clips == settings.train.micro_batch

    def _learn_from_some(
        self,
        clips: torch.Tensor,
        dropped: torch.Tensor,
        *paths: torch.Tensor,
        fill: torch.Tensor,
        importance: torch.Tensor,
        metrics: StepMetrics,
    ) -> None:
        """Adds G's gradient from the first clips of a micro-batch, which are encoded once more for it.

        Batch normalisation joins the clips of a forward, so through D's forward the gradient of the pixels of some
        clips would cost as much as that of all. The plan has shuffled the clips, so the first ones are a random part.
        """
        settings, query, count = self._settings, self._moco.query, self._settings.num_generator_clips
        some = dropped[:count].detach().requires_grad_()
        paths = tuple(each[:count] for each in paths)
        with running_statistics_kept(query), compared_alike(settings.train):
            with frozen(query):
                queries = query(some, *paths)
            with torch.no_grad():  # q_real is a constant of G's loss
                whole = query(clips[:count], *paths)
        loss = adversarial_loss(queries, whole, strength=settings.generator.strength)
        weight = distributed.world_size() / (settings.num_micro_batches * count)
        self._look("the generator's loss", loss)
        (pixels,) = torch.autograd.grad(loss.sum() * weight, some)
        self._look("the gradient of the generator's loss by the pixels", pixels)
        gradient = torch.zeros_like(importance)
        gradient[:count] = importance_gradient(
            pixels, clips[:count], fill[:count], estimator=settings.generator.estimator
        )
        importance.backward(gradient)
        metrics.add_generator(loss.detach())

    def _drop_frames(
        self, clips: torch.Tensor, batch: RankBatch, micro: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x~, what fills its dropped frames, the importance that chose them (with graph once G trains), the mask."""
        settings = self._settings
        fill = frame_fill(clips, settings.generator.fill)
        importance = self._put(batch.random_importance[micro])
        if self._is_adversarial(batch.step):
            trains = settings.trains_generator(batch.step)
            if trains:
                importance = self._generator(clips)
            else:
                # Not through DDP, which expects a backward after each forward.
                with torch.no_grad():
                    importance = self._moco.generator(clips)
            mask = self._generators_mask(importance, batch, micro)
            dropped = drop_frames(clips, mask, fill).requires_grad_(trains and self._learns_from_all)
            return dropped, fill, importance, mask
        if settings.generator.before_start == "random":
            mask = keep_mask(importance, settings.num_dropped)
            return drop_frames(clips, mask, fill), fill, importance, mask
        return clips, fill, importance, torch.ones_like(importance)

    def _generators_mask(self, importance: torch.Tensor, batch: RankBatch, micro: slice) -> torch.Tensor:
        """The mask that follows from the importance: a function of it and of the seeded noise of the batch."""
        if self._settings.generator.select == "sample":
            importance = sampling_scores(importance, self._put(batch.random_importance[micro]))
        return keep_mask(importance, self._settings.num_dropped)

    @torch.no_grad()  # changes nothing: G has neither batch statistics nor randomness
    def dropped_frames(self, batch: RankBatch, *, num_clips: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first queries of a batch and what G drops from them now: uint8 (B, T, H, W, 3), bool (B, T)."""
        first = slice(0, num_clips)
        with uncompiled(self._settings.train):  # rank 0 alone is here, with another number of clips than in training
            clips = self._augmented(batch.query, first)
            mask = self._generators_mask(self._moco.generator(clips), batch, first)
        return to_pixels(clips), mask == 0

    @torch.no_grad()  # changes nothing: the running statistics are read only, and no random number is drawn
    def adversary_hardness(self, batch: RankBatch) -> float | None:
        """How much harder G's drops are than random ones, on the first micro-batch of this rank's queries.

        Returns:
            `hardness`; None before the generator starts, and where random drops change nothing.
        """
        if not self._is_adversarial(batch.step):
            return None
        settings, first, query = self._settings, slice(0, self._settings.train.micro_batch), self._moco.query
        # Rank 0 alone is here: it must not compile for minutes while the others wait.
        with uncompiled(settings.train), evaluation_mode(query):
            clips = self._augmented(batch.query, first)
            fill = frame_fill(clips, settings.generator.fill)
            chosen = self._generators_mask(self._moco.generator(clips), batch, first)
            random = keep_mask(self._put(batch.random_importance[first]), settings.num_dropped)
            views = (clips, drop_frames(clips, chosen, fill), drop_frames(clips, random, fill))
            whole, by_generator, at_random = (query(view) for view in views)
        return hardness(whole, by_generator=by_generator, at_random=at_random)

    def _augmented(self, view: View, micro: slice) -> torch.Tensor:
        part = View(view.frames[micro], view.draws[micro]).to(self._device)
        settings = self._settings.augment
        return augment(
            part.frames,
            part.draws,
            size=settings.size,
            all_grey=settings.grey_probability == 1,
            blurs=settings.blur_probability > 0,
            by_clip=settings.standardise,
        )

    def _is_adversarial(self, step: int) -> bool:
        return step >= self._settings.generator_start

    def _micro_batches(self, num_clips: int) -> list[tuple[slice, bool]]:
        """Slices of this rank's clips that are normalised together, and whether each is the last."""
        size = self._settings.train.micro_batch
        starts = range(0, num_clips, size)
        return [(slice(start, start + size), start + size >= num_clips) for start in starts]

    @contextlib.contextmanager
    def _gradients_reduced(self, is_last: bool) -> Iterator[None]:
        """Gradients of micro-batches add up on each rank and are averaged over ranks with the last one."""
        with contextlib.ExitStack() as stack:
            for module in (self._query, self._generator):
                if not is_last and isinstance(module, nn.parallel.DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    def _set_learning_rates(self, step: int) -> None:
        train, generator = self._settings.train, self._settings.generator
        for group in self._state.query_optimizer.param_groups:
            group["lr"] = learning_rate(step, train.learning_rate, train)
        for group in self._state.generator_optimizer.param_groups:
            group["lr"] = learning_rate(step, generator.learning_rate, train)

    def _look(self, name: str, values: torch.Tensor) -> None:
        """For a subclass that looks at intermediate values (`vmoco/train/first_non_finite.py`)."""

    def _raise_non_finite(self, step: int, clip_ids: list[str], bad_here: bool) -> None:
        texts = distributed.gather_text(json.dumps([clip_ids, bad_here]))  # every rank waits for all
        found: list[tuple[list[str], bool]] = [json.loads(text) for text in texts]
        where = [f"rank {rank}, clips {', '.join(clips)}" for rank, (clips, is_bad) in enumerate(found) if is_bad]
        raise NonFiniteError(
            f"a loss or gradient of step {step} is not finite ({'; '.join(where) or 'in the gradient'}): the run "
            "stops, and no checkpoint contains it. Look at these clips, lower --train.learning-rate, or set "
            "--train.precision fp32",
            step=step,
            clip_ids=[clips for clips, _ in found],
        )
