"""Which clip is trained on when, and by which rank: a pure function of (manifest, seed).

Epochs are joined into one endless stream of draws, and the global batch of step k is stream[k * G : (k + 1) * G].
So the whole state of the data is the step, and the sequence of batches does not depend on the number of ranks:

    stream   | epoch 0: video order of draw 0, of draw 1, ... | epoch 1: ...
    step k   [ micro-batch 0 | micro-batch 1 | micro-batch 2 | micro-batch 3 ]     queries, in plan order
    step k   [ micro-batch 0 | micro-batch 1 | micro-batch 2 | micro-batch 3 ]     keys: the same draws, shuffled
               rank 0 ...................... | rank 1 ......................

Keys are loaded in a shuffled order, so a key is batch-normalised with other clips than its query. This is shuffle-BN
without sending a pixel between ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmoco.seed import Order, UInt64Array, hash64, mix64, permutation, uniform

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Draws:
    """Clips drawn from the stream; all arrays have one entry per draw."""

    clip: Int64Array
    """Row of the clip in the manifest."""
    video: Int64Array
    """Index of its video."""
    epoch: Int64Array
    """Epoch in which it is drawn."""
    seed: UInt64Array
    """Seed of everything random about this draw: window and augmentation follow from it."""

    def __getitem__(self, at: slice | Int64Array) -> Draws:
        return Draws(self.clip[at], self.video[at], self.epoch[at], self.seed[at])

    def __len__(self) -> int:
        return len(self.clip)


class PlannedClips(Protocol):
    """What the plan needs to know of the clips. `clip_index.ClipIndex` is one; its arrays may be mapped files."""

    @property
    def first_clip(self) -> npt.NDArray[np.integer]:
        """(V + 1,): first clip of each video, and the number of clips N. Clips of one video are neighbours."""

    @property
    def clip_ids(self) -> UInt64Array:
        """uint64 (N,): seeds follow from it, so they survive a new layout of the data set."""

    @property
    def place_in_shot(self) -> npt.NDArray[np.integer]:
        """(N,): number of clips of its shot before each clip. Where shots are not known, a video is one shot."""

    @property
    def num_of_shot(self) -> npt.NDArray[np.integer]:
        """(N,): number of clips of its shot, which are neighbours."""


class Plan:
    """The order of training. It keeps no array as long as the data set, unless that has few videos (`seed.Order`).

    Args:
        clips: that training takes.
        seed: seed of the run.
        draws_per_video: clips drawn from each video in one epoch; distinct ones where the video has that many.
        global_batch: G, clips per step over all ranks.
        micro_batch: M, clips normalised together; divides G.
    """

    def __init__(
        self, clips: PlannedClips, *, seed: int, draws_per_video: int, global_batch: int, micro_batch: int
    ) -> None:
        assert len(clips.first_clip) > 1, "a data set has clips"
        assert global_batch % micro_batch == 0, "checked with the settings"
        self._clips = clips
        self._seed = seed
        self.num_videos = len(clips.first_clip) - 1
        self.draws_per_video = draws_per_video
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self._order = lru_cache(maxsize=2 * draws_per_video)(self._make_order)

    @property
    def epoch_length(self) -> int:
        """Draws in one epoch."""
        return self.num_videos * self.draws_per_video

    def batch(self, step: int) -> Draws:
        """The global batch of a step, in plan order: G draws."""
        at = step * self.global_batch + np.arange(self.global_batch, dtype=np.int64)
        epochs, places = np.divmod(at, self.epoch_length)
        passes, places = np.divmod(places, self.num_videos)
        # Of the stream a batch takes one piece of each pass that it reaches into.
        borders = np.flatnonzero((np.diff(epochs) != 0) | (np.diff(passes) != 0)) + 1
        pieces = [
            self._draw(int(epochs[piece[0]]), int(passes[piece[0]]), places[piece])
            for piece in np.split(np.arange(self.global_batch), borders)
        ]
        return Draws(
            *(np.concatenate([getattr(each, name) for each in pieces]) for name in ("clip", "video", "epoch", "seed"))
        )

    def second_clips(self, draws: Draws) -> Int64Array:
        """For each draw another clip of its shot, all equally likely; the same clip where it is the only one.

        Where the shots are not known, it is another clip of its video.
        """
        count = self._clips.num_of_shot[draws.clip].astype(np.int64)
        place = self._clips.place_in_shot[draws.clip].astype(np.int64)
        further = np.floor(uniform(draws.seed, hash64("second clip")) * (count - 1)).astype(np.int64)
        return draws.clip - place + (place + 1 + further) % count

    def key_order(self, step: int) -> Int64Array:
        """Order in which the keys of a step are loaded: place i of the shuffled copy holds draw key_order[i]."""
        return permutation(self.global_batch, hash64("key-order", self._seed, step))

    def reversed_keys(self, step: int, *, num_clips: int) -> npt.NDArray[np.bool_]:
        """Which places of the shuffled copy are also encoded backwards: in each micro-batch those with the least draws.

        Args:
            step: counted from 0.
            num_clips: in each micro-batch, so that all micro-batches have one shape.
        """
        if num_clips == 0:
            return np.zeros(self.global_batch, np.bool_)
        seeds = self.batch(step).seed[self.key_order(step)]
        draws = uniform(seeds, hash64("reversed")).reshape(-1, self.micro_batch)
        least = np.argsort(draws, axis=1, kind="stable")[:, :num_clips]
        chosen = np.zeros(draws.shape, np.bool_)
        np.put_along_axis(chosen, least, True, axis=1)
        return chosen.reshape(-1)

    def share(self, rank: int, world_size: int) -> slice:
        """The part of a global batch that a rank takes: whole micro-batches, as even as they divide.

        Raises:
            ValueError: more ranks than micro-batches, so that a rank would have no work.
        """
        count = self.global_batch // self.micro_batch
        if world_size > count:
            raise ValueError(f"{world_size} workers cannot share {count} micro-batches: lower --train.micro-batch")
        first, last = rank * count // world_size, (rank + 1) * count // world_size
        return slice(first * self.micro_batch, last * self.micro_batch)

    def _make_order(self, epoch: int, number: int) -> Order:
        """Order of the videos in one pass of an epoch."""
        return Order(self.num_videos, hash64("video-order", self._seed, epoch, number))

    def _draw(self, epoch: int, number: int, places: Int64Array) -> Draws:
        """The draws at some places of one pass of an epoch."""
        video = self._order(epoch, number)[places]
        ids, first = self._clips.clip_ids, self._clips.first_clip[video].astype(np.int64)
        count = self._clips.first_clip[video + 1].astype(np.int64) - first
        # The clips of a video's draws lie evenly apart, from a place that changes with the epoch.
        offset = mix64(ids[first], hash64("clip", self._seed, epoch)) % count.astype(np.uint64)
        apart = np.maximum(count // self.draws_per_video, 1)
        clip = first + (offset.astype(np.int64) + number * apart) % count
        seed = mix64(mix64(ids[clip], hash64("draw", self._seed, epoch)), 0)
        seed = mix64(seed ^ np.uint64(number), 1)
        return Draws(clip, video, np.full(len(clip), epoch, np.int64), seed)
