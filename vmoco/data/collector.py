"""Collects the decoded frames of the chosen clips, and gives each clip to a sink once all its frames are there.

Memory holds one clip. A frame that no clip needs is not scaled; the deinterlacer sees it all the same, because it looks
at the frames before and after each.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from vmoco.data.clips import ClipPlan, Int64Array
from vmoco.data.frames import Frames
from vmoco.data.pixels import Deinterlacer, Scaler, is_interlaced


class Sink(Protocol):
    """Receives the clips of a video, one after the other."""

    def add(self, frames: Frames) -> None:
        """Receives a clip, uint8 (T, H, W, 3), RGB; the next clip overwrites the array."""

    def restart(self) -> None:
        """Discards all clips, because decoding starts again."""


class Collector:
    """Receives the decoded frames of a video in turn."""

    def __init__(self, wanted: Int64Array, sink: Sink, plan: ClipPlan, *, height: int, width: int) -> None:
        """`wanted` is (N, T): number or time stamp of each frame of each clip, increasing from clip to clip."""
        self._sink = sink
        self._lasts = wanted.max(axis=1).tolist() if wanted.size else []
        self._places = [{name: np.flatnonzero(clip == name) for name in clip.tolist()} for clip in wanted]
        self._clip = 0
        self._frames = np.empty((wanted.shape[1] if wanted.size else 0, height, width, 3), np.uint8)
        self.scaler = Scaler(height=height, width=width, hdr=plan.hdr)
        self._deinterlacer = Deinterlacer() if plan.deinterlace == "auto" else None
        self._deinterlaced = False

    @property
    def complete(self) -> bool:
        """Whether the sink has every clip."""
        return self._clip == len(self._places)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the frames beyond scaling, as in `Timeline.notes`."""
        own = ("deinterlaced: its frames are interlaced",) if self._deinterlaced else ()
        return (*own, *sorted(self.scaler.notes))

    def take(self, name: int, frame: Any) -> None:
        """Receives a frame; some frames wait in the deinterlacer for the next one."""
        if self._deinterlacer is None:
            self._keep(name, frame)
            return
        self._deinterlaced = self._deinterlaced or is_interlaced(frame)
        for each, done in self._deinterlacer.push(name, frame):
            self._keep(each, done)

    def flush(self) -> None:
        """Takes the frames that still wait: at the end, and where the next frame does not follow the one before."""
        for name, done in self._deinterlacer.flush() if self._deinterlacer else ():
            self._keep(name, done)

    def _keep(self, name: int, frame: Any) -> None:
        """Keeps a frame where a clip needs it; two clips, or two places of one clip, may need the same one."""
        scaled = None
        while self._clip < len(self._places) and name in self._places[self._clip]:
            scaled = self.scaler.scale(frame) if scaled is None else scaled
            self._frames[self._places[self._clip][name]] = scaled
            if name != self._lasts[self._clip]:
                return
            self._sink.add(self._frames)
            self._clip += 1
