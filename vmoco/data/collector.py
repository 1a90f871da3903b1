"""Collects the decoded frames of the chosen clips, and gives each clip to a sink once all its frames are there.

Memory holds one clip, and the frames that the next clips need; clips may overlap. A frame that no clip needs is not
scaled, unless cuts are looked for; the deinterlacer sees it all the same, because it looks at the frames before and
after each.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from vmoco.data.clips import ClipPlan, Int64Array
from vmoco.data.cuts import Watcher
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

    def __init__(
        self,
        wanted: Int64Array,
        sink: Sink,
        plan: ClipPlan,
        *,
        height: int,
        width: int,
        watcher: Watcher | None = None,
    ) -> None:
        """`wanted` is (N, T): number or time stamp of each frame of each clip, increasing from clip to clip.

        `watcher` sees the stored picture of every frame, also of those that no clip needs.
        """
        self._sink = sink
        self._wanted = wanted
        self._firsts, self._lasts = (ends.tolist() for ends in _ends(wanted))
        self._names = set(np.unique(wanted).tolist())
        self._kept: dict[int, Frames] = {}
        self._clip = 0
        self._frames = np.empty((wanted.shape[1] if wanted.size else 0, height, width, 3), np.uint8)
        self.scaler = Scaler(height=height, width=width, hdr=plan.hdr)
        self._watcher = watcher
        self._deinterlacer = Deinterlacer() if plan.deinterlace == "auto" else None
        self._deinterlaced = False

    @property
    def complete(self) -> bool:
        """Whether the sink has every clip."""
        return self._clip == len(self._lasts)

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
        if self._watcher:
            self._watcher.interrupt()

    def _keep(self, name: int, frame: Any) -> None:
        """Keeps a frame where a clip needs it; clips may overlap, and a clip may show a frame more than once."""
        needed = name in self._names and self._clip < len(self._lasts)
        if not needed and not self._watcher:
            return
        picture = self.scaler.scale(frame)
        if self._watcher:
            self._watcher.see(name, picture)
        if not needed:
            return
        self._kept[name] = picture.copy()  # a copy: the picture may be a view of a larger one
        while self._clip < len(self._lasts) and name >= self._lasts[self._clip]:
            names = self._wanted[self._clip].tolist()
            if not self._kept.keys() >= set(names):  # a frame never came, so the clips are not complete
                return
            for place, each in enumerate(names):
                self._frames[place] = self._kept[each]
            self._sink.add(self._frames)
            self._clip += 1
            first = self._firsts[self._clip] if self._clip < len(self._firsts) else name + 1
            self._kept = {each: kept for each, kept in self._kept.items() if each >= first}


def _ends(wanted: Int64Array) -> tuple[Int64Array, Int64Array]:
    """The first and the last frame of each clip."""
    if not wanted.size:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return wanted.min(axis=1), wanted.max(axis=1)
