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

import numpy as np
import numpy.typing as npt

from vmoco.seed import UInt64Array, hash64, mix64, permutation, uniform

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


class Plan:
    """The order of training.

    Args:
        videos: video index of each clip, ascending (clips of one video are neighbours), one entry per manifest row.
        clip_ids: 64-bit identity of each clip: seeds follow from it, so they survive a new layout of the data set.
        seed: seed of the run.
        draws_per_video: clips drawn from each video in one epoch; distinct ones where the video has that many.
        global_batch: G, clips per step over all ranks.
        micro_batch: M, clips normalised together; divides G.
        shots: number of the shot of each clip in its video, ascending in each; None where nobody knows them.
    """

    def __init__(
        self,
        videos: Int64Array,
        clip_ids: UInt64Array,
        *,
        seed: int,
        draws_per_video: int,
        global_batch: int,
        micro_batch: int,
        shots: Int64Array | None = None,
    ) -> None:
        assert len(videos) == len(clip_ids) > 0, "one video index and one id per clip"
        assert global_batch % micro_batch == 0, "checked with the settings"
        self._first_clip = np.flatnonzero(np.diff(videos, prepend=-1)).astype(np.int64)
        self._num_clips = np.diff(self._first_clip, append=len(videos))
        # The clips that may be the second one of a pair: those of the same shot, which are neighbours as well.
        begins = np.diff(videos, prepend=-1) != 0
        if shots is not None:
            begins |= np.diff(shots, prepend=-1) != 0
        self._first_of_shot = np.flatnonzero(begins)[np.cumsum(begins) - 1].astype(np.int64)
        self._num_of_shot = np.bincount(self._first_of_shot, minlength=len(videos))[self._first_of_shot]
        self._clip_ids = clip_ids
        self._seed = seed
        self.draws_per_video = draws_per_video
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self._epoch_draws = lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def num_videos(self) -> int:
        return len(self._first_clip)

    @property
    def epoch_length(self) -> int:
        """Draws in one epoch."""
        return self.num_videos * self.draws_per_video

    def batch(self, step: int) -> Draws:
        """The global batch of a step, in plan order: G draws."""
        at = step * self.global_batch + np.arange(self.global_batch, dtype=np.int64)
        epochs, places = np.divmod(at, self.epoch_length)
        parts = [self._epoch_draws(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return Draws(
            *(np.concatenate([getattr(p, name) for p in parts]) for name in ("clip", "video", "epoch", "seed"))
        )

    def second_clips(self, draws: Draws) -> Int64Array:
        """For each draw another clip of its shot, all equally likely; the same clip where it is the only one.

        Where the shots are not known, it is another clip of its video.
        """
        count, first = self._num_of_shot[draws.clip], self._first_of_shot[draws.clip]
        further = np.floor(uniform(draws.seed, hash64("second clip")) * (count - 1)).astype(np.int64)
        return first + (draws.clip - first + 1 + further) % count

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

    def _draw_epoch(self, epoch: int) -> Draws:
        orders = [
            permutation(self.num_videos, hash64("video-order", self._seed, epoch, draw))
            for draw in range(self.draws_per_video)
        ]
        video = np.concatenate(orders)
        draw = np.repeat(np.arange(self.draws_per_video, dtype=np.int64), self.num_videos)
        # The clips of a video's draws lie evenly apart, from a place that changes with the epoch.
        count = self._num_clips[video]
        offset = mix64(self._clip_ids[self._first_clip[video]], hash64("clip", self._seed, epoch)) % count.astype(
            np.uint64
        )
        apart = np.maximum(count // self.draws_per_video, 1)
        clip = self._first_clip[video] + (offset.astype(np.int64) + draw * apart) % count
        seed = mix64(mix64(self._clip_ids[clip], hash64("draw", self._seed, epoch)), 0)
        seed = mix64(seed ^ draw.astype(np.uint64), 1)
        return Draws(clip, video, np.full(len(clip), epoch, np.int64), seed)
