"""Which frame positions the generator drops, counted over the clips of many steps.

Two numbers say whether it still looks at the clip. The entropy of the positions is 1 where all are dropped as
often. The overlap is the share of dropped frames that two clips have in common: num_dropped / T where each clip is
judged by itself or at random, 1 where all clips lose the same frames. It compares clips with each other, because a
fixed set would have to be known beforehand, and the set of an earlier interval misses a collapse that moves.
"""

from __future__ import annotations

import json
import math

import torch


class DroppedFrames:
    """Counts since `begin`.

    Args:
        num_frames: T.
        num_dropped: frames dropped from each clip.
    """

    def __init__(self, num_frames: int, num_dropped: int) -> None:
        self._num_frames = num_frames
        self._num_dropped = num_dropped
        self.begin()

    def begin(self) -> None:
        """Starts to count anew."""
        self._counts: torch.Tensor | None = None

    def add(self, counts: torch.Tensor) -> None:
        """Adds the clips of a step, float32 (T,): how many lost each frame. Does not wait for the device."""
        # float64: the clips of a long interval are more than float32 counts exactly
        self._counts = counts.double() if self._counts is None else self._counts + counts

    def num_clips(self) -> int:
        """Clips from which the generator has dropped frames."""
        return 0 if self._counts is None else round(float(self._counts.sum()) / max(self._num_dropped, 1))

    def shares(self) -> list[float]:
        """Of each position, the share of clips that lost it."""
        assert self._counts is not None, "counted before"
        return (self._counts / self.num_clips()).tolist()

    def numbers(self) -> dict[str, float]:
        """Entropy and overlap, by the name that they are tracked under; empty before the generator starts."""
        clips = self.num_clips()
        if self._counts is None or clips < 2:
            return {}
        counts = self._counts.cpu()
        share = counts / counts.sum()
        entropy = float(-torch.special.xlogy(share, share).sum()) / math.log(self._num_frames)
        # of all ordered pairs of clips, those that both lost position t: n_t (n_t - 1)
        overlap = float((counts * (counts - 1)).sum()) / (clips * (clips - 1) * self._num_dropped)
        return {"dropped_entropy": entropy, "dropped_overlap": overlap}

    def document(self, *, step: int) -> str:
        """The histogram as JSON."""
        content = {"step": step, "clips": self.num_clips(), "dropped_share": self.shares(), **self.numbers()}
        return json.dumps(content, indent=1)
