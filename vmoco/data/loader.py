"""Batches for one rank: windows of frames from the shards, read a few batches ahead of the step.

The loader has no state. What it yields is a function of (manifests, plan, step, rank), so to resume is to start at
another step. It never converts pixels: uint8 frames go to the device as they are stored, or as their JPEGs decode, and
a background thread reads them.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vmoco.config import PretrainSettings
from vmoco.data import augment
from vmoco.data.checked_clips import CheckedClips
from vmoco.data.clip_cache import cache_for
from vmoco.data.fit import check_fits, span
from vmoco.data.manifest import Manifest
from vmoco.data.mixture import Mixture
from vmoco.data.plan import Draws, Int64Array, Plan, Stream, data_sets
from vmoco.data.shard_reader import ClipReader
from vmoco.seed import UInt64Array, hash64, mix64, uniform, uniforms


class BatchMemory:
    """Hands out uint8 tensors, and uses their memory again once nobody holds them.

    New memory costs more than the copy into it: the system hands it out page by page, zeroed. A tensor and all its
    views keep one NumPy array alive, and when it is freed its memory comes back. For GPUs torch does the same with
    page-locked memory, and also waits for copies in progress.

    Args:
        pin_memory: page-locked, for a GPU.
    """

    def __init__(self, *, pin_memory: bool) -> None:
        self.pin_memory = pin_memory
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = {}

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of any content."""
        if self.pin_memory:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        free = self._free.setdefault(size, [])
        try:
            memory = free.pop()  # in one operation: the thread of the loader and the first rank's look both take
        except IndexError:
            memory = np.empty(size, np.uint8)
        lent = memory.reshape(shape)  # another object than `memory`: it lives as long as somebody has the tensor
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)


@dataclass(frozen=True)
class View:
    """Clips of this rank as they are stored, and the draws that augment them."""

    frames: torch.Tensor
    """uint8 (B, T, H, W, 3). Where data sets have frames of different sizes, smaller ones lie in the corner, and their
    last row and column are repeated."""
    draws: torch.Tensor
    """float32 (B, augment.NUM_COLUMNS)."""

    def to(self, device: torch.device) -> View:
        """Copies to a device; from pinned memory without waiting for it."""
        return View(self.frames.to(device, non_blocking=True), self.draws.to(device, non_blocking=True))


@dataclass(frozen=True)
class RankBatch:
    """What one rank works on in one step."""

    step: int
    query: View
    """This rank's share of the global batch, in plan order."""
    key: View
    """This rank's share of the shuffled copy: the frames of each query, or a second clip of its video."""
    random_importance: torch.Tensor
    """float32 (B, T): seeded importance of each query's frames, for dropping at random."""
    clip_ids: list[str]
    """Clip of each query."""
    data_sets: torch.Tensor
    """int64 (B,): number of each query's data set."""
    share: slice
    """Places of the queries in the global batch."""
    clips_per_rank: list[int]
    """Queries, and keys, that each rank works on."""
    key_order: torch.Tensor
    """int64 (G,): the place in the global batch of each key of the shuffled copy."""
    video_ids: torch.Tensor
    """int64 (G,): video of each clip of the global batch, in plan order."""
    reversed_keys: torch.Tensor
    """bool (G,): which keys of the shuffled copy are also encoded backwards."""
    branch_factors: torch.Tensor | None = None
    """float32 (B, N): factor of each residual branch for each query, 0 where drop path leaves it out, else 1 / (1 - its
    rate). None where nothing is left out."""


class Loader:
    """Iterates over the batches of one rank, from `start_step` to the last step of the run.

    Args:
        data: data set to read, or several; `training_clips.Selection` says which of it training takes.
        settings: of the run.
        rank: of this process.
        world_size: number of ranks.
        start_step: first step to yield.
        pin_memory: put batches into page-locked memory, for a GPU.
        checked: clips on this node's disk that need no hash, because another rank has hashed them.

    Attributes:
        plan: order of training.
        mixture: the data sets.
        seconds_waited: time that the consumer has waited for a batch that was not ready.

    Raises:
        ValueError: clips are too short or too small for the settings, or there is no clip to train on.
    """

    def __init__(
        self,
        data: Manifest | Mixture,
        settings: PretrainSettings,
        *,
        rank: int,
        world_size: int,
        start_step: int = 0,
        pin_memory: bool = False,
        checked: CheckedClips | None = None,
    ) -> None:
        self._settings = settings
        self.mixture = mixture = Mixture.of(data)
        self._indexes = mixture.indexes(settings.data)
        check_fits(mixture, settings, self._indexes)
        self._readers = [
            ClipReader.of(
                manifest,
                clips,
                cache=cache_for(manifest.uri, folder=settings.data.cache, gib=settings.data.cache_gib),
                threads=settings.data.loader_threads,
                checked=checked,
                together=settings.data.shuffle_window > 0,
            )
            for manifest, clips in zip(mixture.manifests, self._indexes, strict=True)
        ]
        self.plan = Plan(
            [
                Stream(
                    clips,
                    seed=mixture.stream_seed(place, settings.run.seed),
                    draws_per_video=settings.data.draws_per_video,
                    window=settings.data.shuffle_window,
                )
                for place, clips in enumerate(self._indexes)
            ],
            weights=mixture.weights,
            seed=settings.run.seed,
            global_batch=settings.train.global_batch,
            micro_batch=settings.train.micro_batch,
        )
        shares = [self.plan.share(each, world_size) for each in range(world_size)]
        self._share, self._clips_per_rank = shares[rank], [share.stop - share.start for share in shares]
        self._steps = range(start_step, settings.last_step)
        self._memory = BatchMemory(pin_memory=pin_memory)
        self.seconds_waited = 0.0

    def __iter__(self) -> Iterator[RankBatch]:
        ready: queue.Queue[RankBatch | BaseException | None] = queue.Queue(self._settings.data.batches_ahead)
        closed = threading.Event()

        def put(item: RankBatch | BaseException | None) -> bool:
            while not closed.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def read_ahead() -> None:
            try:
                for step in self._steps:
                    if not put(self.batch(step)):
                        return
                put(None)
            except BaseException as error:  # raised again by the consumer: an error in a thread would not be seen
                put(error)

        thread = threading.Thread(target=read_ahead, name="loader", daemon=True)
        thread.start()
        try:
            while True:
                started = time.perf_counter()
                item = ready.get()
                self.seconds_waited += time.perf_counter() - started
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()

    def batch(self, step: int) -> RankBatch:
        """The batch of a step, read now."""
        draws = self.plan.batch(step)
        key_order = self.plan.key_order(step)
        queries, keys = draws[self._share], draws[key_order[self._share]]
        num_frames = self._settings.data.num_frames
        importance = uniforms(queries.seed, [hash64("drop", t) for t in range(num_frames)])
        return RankBatch(
            step=step,
            query=self._view("query", queries, clips=queries.clip, window_seeds=queries.seed),
            key=self._key_view(keys, step=step),
            random_importance=self._locked(importance.astype(np.float32)),
            clip_ids=self.clip_ids(queries.clip),
            data_sets=self._locked(self.plan.data_sets(queries)),
            share=self._share,
            clips_per_rank=self._clips_per_rank,
            key_order=self._locked(key_order),
            video_ids=self._locked(self._video_names(draws)),
            reversed_keys=self.reversed_keys(step),
            branch_factors=self._branch_factors(queries),
        )

    def reversed_keys(self, step: int) -> torch.Tensor:
        """Which keys of the shuffled copy of a step are also encoded backwards: bool (G,)."""
        return torch.from_numpy(self.plan.reversed_keys(step, num_clips=self._settings.num_reversed))

    def _branch_factors(self, queries: Draws) -> torch.Tensor | None:
        """Drop path (Huang et al., 2016): each branch of each query by a draw of its own."""
        rates = np.array(self._settings.drop_rates)
        if not len(rates):
            return None
        kept = uniforms(queries.seed, [hash64("drop path", branch) for branch in range(len(rates))]) >= rates
        return self._locked((kept / (1 - rates)).astype(np.float32))

    def first_keys(self, step: int) -> tuple[View, Int64Array]:
        """The first micro-batch of this rank's keys of a step, read now, and their places in the global batch."""
        places = self.plan.key_order(step)[self._share][: self._settings.train.micro_batch]
        return self._key_view(self.plan.batch(step)[places], step=step), places

    def _key_view(self, draws: Draws, *, step: int) -> View:
        if step < self._settings.two_clips_start:  # both views of a draw show the same frames (paper)
            return self._view("key", draws, clips=draws.clip, window_seeds=draws.seed)
        # A window of its own as well: of a video with one clip it is all that differs.
        window_seeds = mix64(draws.seed, hash64("second window"))
        return self._view("key", draws, clips=self.plan.second_clips(draws), window_seeds=window_seeds)

    def _view(self, name: str, draws: Draws, *, clips: Int64Array, window_seeds: UInt64Array) -> View:
        sets, shapes = data_sets(clips, self.plan.first_clips), [each.frame_shape for each in self.mixture.manifests]
        height, width = (max(shape[side] for shape in shapes) for side in (1, 2))
        frames = self._memory.take((len(draws), self._settings.data.num_frames, height, width, 3))
        target, table = frames.numpy(), np.empty((len(draws), augment.NUM_COLUMNS), np.float32)
        for number in np.unique(sets).tolist():
            places, (_, own_height, own_width, _) = np.flatnonzero(sets == number), shapes[number]
            windows = self._windows(window_seeds[places], stored_frames=shapes[number][0])
            own = (clips[places] - self.plan.first_clips[number]).tolist()
            read = zip(places.tolist(), self._readers[number].several(own, windows), strict=True)
            for place, window in read:
                target[place, :, :own_height, :own_width] = window
            # A crop that reaches the border is sampled half a pixel beyond it.
            if own_height < height:
                target[places, :, own_height:] = target[places, :, own_height - 1 : own_height]
            if own_width < width:
                target[places, :, :, own_width:] = target[places, :, :, own_width - 1 : own_width]
            seeds = self._view_seeds(draws[places], name)
            table[places] = augment.draw(seeds, self._settings.augment, height=own_height, width=own_width)
        return View(frames, self._locked(table))

    def clip_ids(self, clips: Int64Array) -> list[str]:
        """Names of clips of the plan in their manifests."""
        sets = data_sets(clips, self.plan.first_clips)
        own = clips - self.plan.first_clips[sets]
        return [self._indexes[number].clip_id(clip) for number, clip in zip(sets.tolist(), own.tolist(), strict=True)]

    def _video_names(self, draws: Draws) -> Int64Array:
        """What names the video of each draw (`ClipIndex.video_names`)."""
        sets = self.plan.data_sets(draws)
        own, names = draws.video - self.plan.first_videos[sets], np.empty(len(draws), np.int64)
        for number in np.unique(sets).tolist():
            names[sets == number] = self._indexes[number].video_names[own[sets == number]]
        return names

    def _locked(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """The values as a tensor; for a GPU in page-locked memory, from which it copies without a wait."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self._memory.pin_memory else tensor

    def _view_seeds(self, draws: Draws, name: str) -> UInt64Array:
        return mix64(draws.seed, hash64("view", name))

    def _windows(self, seeds: UInt64Array, *, stored_frames: int) -> Iterator[range]:
        """The frames of each training clip in its stored clip."""
        length, stride = span(self._settings), self._settings.data.stride
        starts = np.floor(uniform(seeds, hash64("window")) * (stored_frames - length + 1)).astype(np.int64)
        return (range(start, start + length, stride) for start in starts.tolist())
