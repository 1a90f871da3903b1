"""Which clip is trained on when, and by which rank: a pure function of (manifests, weights, seed).

Epochs are joined into one endless stream of draws, and the global batch of step k is stream[k * G : (k + 1) * G].
So the whole state of the data is the step, and the sequence of batches does not depend on the number of ranks:

    stream   | epoch 0: video order of draw 0, of draw 1, ... | epoch 1: ...
    step k   [ micro-batch 0 | micro-batch 1 | micro-batch 2 | micro-batch 3 ]     queries, in plan order
    step k   [ micro-batch 0 | micro-batch 1 | micro-batch 2 | micro-batch 3 ]     keys: the same draws, shuffled
               rank 0 ...................... | rank 1 ......................

Keys are loaded in a shuffled order, so a key is batch-normalised with other clips than its query. This is shuffle-BN
without sending a pixel between ranks.

Of several data sets each has a stream of its own, with epochs of its own. They take turns by their weights (`Turns`),
and the turns make one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Number of the clip. Of several data sets, the clips of the second follow those of the first."""
    video: Int64Array
    """Number of its video, likewise."""
    epoch: Int64Array
    """Epoch of its data set in which it is drawn."""
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
        """(N,): number of clips of its shot before each clip. A video whose shots are not known is one shot."""

    @property
    def num_of_shot(self) -> npt.NDArray[np.integer]:
        """(N,): number of clips of its shot, which are neighbours."""


MAX_WINDOWS = 2**20
"""Their order is an array."""


class Stream:
    """The endless order in which the clips of one data set are drawn, epoch after epoch.

    It keeps no array as long as the data set, unless that has few videos (`seed.Order`).

    With a window, all draws of its videos come before those of the next window, and so do the bytes of its shards:

        epoch    | window 5: video order of draw 0, of draw 1, ... | window 2: ... | ... | what is left over: ...

    The videos of a window are neighbours in the manifest, which begins at another video in each epoch. Windows are as
    large as each other, give or take one video, and come in a random order.

    Args:
        clips: that training takes.
        seed: of this stream.
        draws_per_video: clips drawn from each video in one epoch; distinct ones where the video has that many.
        window: number of videos that are shuffled together, about; 0 shuffles all. There are MAX_WINDOWS at most.
    """

    def __init__(self, clips: PlannedClips, *, seed: int, draws_per_video: int, window: int = 0) -> None:
        assert len(clips.first_clip) > 1, "a data set has clips"
        self._clips = clips
        self._seed = seed
        self.num_clips, self.num_videos = len(clips.clip_ids), len(clips.first_clip) - 1
        self.draws_per_video = draws_per_video
        self._num_windows = min(max(1, round(self.num_videos / (window or self.num_videos))), MAX_WINDOWS)
        self._order = lru_cache(maxsize=2 * draws_per_video)(self._make_order)
        self._windows = lru_cache(maxsize=2)(self._make_windows)

    @property
    def epoch_length(self) -> int:
        """Draws in one epoch."""
        return self.num_videos * self.draws_per_video

    def draws(self, at: Int64Array) -> Draws:
        """The draws at some places of the stream, which rise and are at least one."""
        pieces, begin = [], 0
        while begin < len(at):  # once for each pass over a window that they reach into
            epoch, place = divmod(int(at[begin]), self.epoch_length)
            windows, starts = self._windows(epoch)
            turn = int(np.searchsorted(starts, place, side="right")) - 1
            window = int(windows[turn])
            size = self._size(window)
            number, place = divmod(place - int(starts[turn]), size)
            end = int(np.searchsorted(at, at[begin] + size - place))
            pieces.append(self._draw(epoch, window, number, at[begin:end] - at[begin] + place))
            begin = end
        return _joined(pieces)

    def second_clips(self, draws: Draws) -> Int64Array:
        """As `Plan.second_clips`."""
        count = self._clips.num_of_shot[draws.clip].astype(np.int64)
        place = self._clips.place_in_shot[draws.clip].astype(np.int64)
        further = np.floor(uniform(draws.seed, hash64("second clip")) * (count - 1)).astype(np.int64)
        return draws.clip - place + (place + 1 + further) % count

    def _size(self, window: int) -> int:
        """Number of videos of a window; the first ones have one more, where they do not divide evenly."""
        size, more = divmod(self.num_videos, self._num_windows)
        return size + (window < more)

    def _make_windows(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The windows in their order, and the first draw of each in the epoch."""
        order = permutation(self._num_windows, hash64("window-order", self._seed, epoch))
        size, more = divmod(self.num_videos, self._num_windows)
        ends = np.cumsum((size + (order < more)) * self.draws_per_video)
        return order, np.concatenate([[0], ends[:-1]])

    def _make_order(self, epoch: int, window: int, number: int) -> Order:
        """Order of the videos of a window in one pass over them."""
        which = (window,) if self._num_windows > 1 else ()
        return Order(self._size(window), hash64("video-order", self._seed, epoch, *which, number))

    def _videos(self, epoch: int, window: int, number: int, places: Int64Array) -> Int64Array:
        """The videos at some places of one pass over a window."""
        found = self._order(epoch, window, number)[places]
        if self._num_windows == 1:
            return found
        size, more = divmod(self.num_videos, self._num_windows)
        begin = hash64("window-begin", self._seed, epoch) % self.num_videos + window * size + min(window, more)
        return (begin + found) % self.num_videos

    def _draw(self, epoch: int, window: int, number: int, places: Int64Array) -> Draws:
        """The draws at some places of one pass over a window."""
        video = self._videos(epoch, window, number, places)
        ids, first = self._clips.clip_ids, self._clips.first_clip[video].astype(np.int64)
        count = self._clips.first_clip[video + 1].astype(np.int64) - first
        # The clips of a video's draws lie evenly apart, from a place that changes with the epoch.
        offset = mix64(ids[first], hash64("clip", self._seed, epoch)) % count.astype(np.uint64)
        apart = np.maximum(count // self.draws_per_video, 1)
        clip = first + (offset.astype(np.int64) + number * apart) % count
        seed = mix64(mix64(ids[clip], hash64("draw", self._seed, epoch)), 0)
        seed = mix64(seed ^ np.uint64(number), 1)
        return Draws(clip, video, np.full(len(clip), epoch, np.int64), seed)


class Turns:
    """Which of several streams gives each draw: as evenly as their weights allow, in a cycle of 65,536 draws.

    Of n of the 65,536 draws, draw j lies at (j + 1/2) / n of the cycle, and the turns are in the order of these places.
    So any part of the stream has each data set by its weight, give or take a draw or two.

    Args:
        weights: one for each stream, above 0. They are rounded to 65,536ths, to one at least.
    """

    CYCLE = 2**16

    def __init__(self, weights: Sequence[float]) -> None:
        share = np.asarray(weights, np.float64) / np.sum(weights) * self.CYCLE
        self.draws = np.maximum(np.floor(share), 1).astype(np.int64)
        while (left := self.CYCLE - int(self.draws.sum())) > 0:
            self.draws[np.argsort(self.draws - share, kind="stable")[:left]] += 1
        while self.draws.sum() > self.CYCLE:  # tiny weights were rounded up
            self.draws[np.argmax(self.draws)] -= 1
        streams = np.repeat(np.arange(len(self.draws)), self.draws)
        numbers = np.concatenate([np.arange(count) for count in self.draws])
        order = np.lexsort((streams, (numbers + 0.5) / self.draws[streams]))
        self._streams, self._numbers = streams[order], numbers[order]

    def of(self, at: Int64Array) -> tuple[Int64Array, Int64Array]:
        """For draws of the joined stream: which stream gives each, and its place in that stream."""
        cycles, places = np.divmod(at, self.CYCLE)
        streams = self._streams[places]
        return streams, cycles * self.draws[streams] + self._numbers[places]

    def before(self, at: int) -> Int64Array:
        """How many of the first `at` draws each stream gives."""
        cycles, places = divmod(at, self.CYCLE)
        return cycles * self.draws + np.bincount(self._streams[:places], minlength=len(self.draws))


class Plan:
    """The order of training.

    Args:
        streams: one for each data set.
        weights: of the data sets; needed if there are several.
        seed: seed of the run.
        global_batch: G, clips per step over all ranks.
        micro_batch: M, clips normalised together; divides G.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        weights: Sequence[float] = (),
        seed: int,
        global_batch: int,
        micro_batch: int,
    ) -> None:
        assert global_batch % micro_batch == 0, "checked with the settings"
        self._streams = streams
        self._turns = Turns(weights) if len(streams) > 1 else None
        self._seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.first_clips = np.cumsum([0, *(each.num_clips for each in streams)])
        self.first_videos = np.cumsum([0, *(each.num_videos for each in streams)])

    @property
    def epoch_lengths(self) -> list[int]:
        """Draws in one epoch of each data set."""
        return [each.epoch_length for each in self._streams]

    @property
    def epoch_length(self) -> int:
        """Draws in one epoch: as many as the epochs of all data sets have together."""
        return sum(self.epoch_lengths)

    def batch(self, step: int) -> Draws:
        """The global batch of a step, in plan order: G draws."""
        at = step * self.global_batch + np.arange(self.global_batch, dtype=np.int64)
        if self._turns is None:
            return self._streams[0].draws(at)
        sets, places = self._turns.of(at)
        pieces, found = [], []
        for number in np.unique(sets):
            found.append(np.flatnonzero(sets == number))
            own = self._streams[number].draws(places[found[-1]])
            clip, video = own.clip + self.first_clips[number], own.video + self.first_videos[number]
            pieces.append(Draws(clip, video, own.epoch, own.seed))
        return _joined(pieces)[np.argsort(np.concatenate(found))]

    def data_sets(self, draws: Draws) -> Int64Array:
        """Number of the data set of each draw."""
        return data_sets(draws.clip, self.first_clips)

    def drawn(self, step: int) -> Int64Array:
        """Number of draws from each data set before a step."""
        at = np.array([step * self.global_batch])
        if self._turns is None:
            return at
        return self._turns.before(int(at[0]))

    def second_clips(self, draws: Draws) -> Int64Array:
        """For each draw another clip of its shot, all equally likely; the same clip where it is the only one.

        A clip that crosses a cut is paired with itself. In a video without known shots it is another clip of the video.
        """
        sets, chosen = self.data_sets(draws), np.empty_like(draws.clip)
        for number in np.unique(sets):
            own, first = sets == number, self.first_clips[number]
            within = Draws(draws.clip[own] - first, draws.video[own], draws.epoch[own], draws.seed[own])
            chosen[own] = first + self._streams[number].second_clips(within)
        return chosen

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


def data_sets(clips: Int64Array, first_clips: Int64Array) -> Int64Array:
    """Number of the data set of each clip; `first_clips` has the first clip of each, and the number of all clips."""
    return np.searchsorted(first_clips, clips, side="right") - 1


def _joined(pieces: Sequence[Draws]) -> Draws:
    if len(pieces) == 1:
        return pieces[0]
    names = ("clip", "video", "epoch", "seed")
    return Draws(*(np.concatenate([getattr(each, name) for each in pieces]) for name in names))
