"""How far an ingest is: a line at most once a second, with the rate and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """Counts work and prints it.

    Args:
        progress: Takes the lines.
        verb: What is done, for the line.
        total: How much work there is; the time that is left follows from the share that is done.
        num_videos: How many videos that is.
    """

    def __init__(self, progress: Callable[[str], None], verb: str, *, total: int, num_videos: int) -> None:
        self._print, self._verb = progress, verb
        self._total, self._num_videos = total, num_videos
        self._done = self._fresh = self._videos = self._rejected = self._clips = self._fresh_clips = 0
        self._start = self._printed = time.monotonic()

    def add(self, work: int, *, videos: int, rejected: int, clips: int, reused: bool = False) -> None:
        """Counts what was done: `work` of the total; what an earlier run did counts for no rate."""
        self._done += work
        self._videos += videos
        self._rejected += rejected
        self._clips += clips
        if not reused:
            self._fresh += work
            self._fresh_clips += clips
        if time.monotonic() - self._printed >= 1 and self._done < self._total:
            self.print()

    def print(self) -> None:
        """Prints the line."""
        self._printed = time.monotonic()
        elapsed = max(self._printed - self._start, 1e-9)
        left = int(elapsed / self._fresh * (self._total - self._done)) if self._fresh else 0
        self._print(
            f"ingest  {self._verb} {self._videos}/{self._num_videos} videos  rejected {self._rejected}  "
            f"clips {self._clips}  {self._fresh_clips / elapsed:.1f} clips/s  {left // 60}:{left % 60:02d} left"
        )
