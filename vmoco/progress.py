"""Progress lines of a long job: how much is done, how fast, and how much time is left.

    ingest  cut 13/130 videos  rejected 3  clips 102  10.0 clips/s  0:46 left

Every job that counts prints through this class, so all lines look alike. A line comes at most once per `every_seconds`,
and one more when everything is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class Progress:
    """Counts what is done and prints it.

    Example, which prints lines such as `embed  made 3/10 parts  clips 96  12.0 clips/s  0:18 left`:

        progress = Progress(show, "embed  made", total=10, unit="parts", counts=["clips"], rate="clips")
        for part in parts:
            progress.add(clips=make(part))
    """

    def __init__(
        self,
        show: Callable[[str], None],
        title: str,
        *,
        total: int,
        unit: str,
        counts: Sequence[str] = (),
        rate: str | None = None,
        total_work: int | None = None,
        every_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the clock.

        Args:
            show: Takes the lines.
            title: First words of each line: the job and what it does, such as `ingest  cut`.
            total: Number of things to do.
            unit: What these things are, such as `videos`.
            counts: Names of further counts, in the order in which they are printed.
            rate: The count whose number per second is printed; None is the things themselves.
            total_work: Sum of the `work` of all things, such as their bytes, from which the time left is estimated;
                None where each thing is equally much work.
            every_seconds: Least time between two lines.
            clock: Seconds from any start; tests give their own.
        """
        self._show, self._title, self._clock = show, title, clock
        self._total, self._unit, self._rate = total, unit, rate or unit
        self._total_work = total if total_work is None else total_work
        self._every_seconds = every_seconds
        self._counts = {unit: 0, **dict.fromkeys(counts, 0)}
        assert self._rate in self._counts, (rate, counts)
        self._work = self._new_work = self._new = 0
        self._started = self._printed = clock()

    def add(self, done: int = 1, *, work: int | None = None, reused: bool = False, **counts: int) -> None:
        """Counts things that are done, and prints a line when it is time for one.

        Args:
            done: Number of things.
            work: Their share of `total_work`; left out where each thing is equally much work.
            reused: An earlier run did them: they count as done, but not for the rate or the time left.
            counts: What to add to each of the further counts.
        """
        work = done if work is None else work
        added = {self._unit: done, **counts}
        for name, number in added.items():
            self._counts[name] += number
        self._work += work
        if not reused:
            self._new_work += work
            self._new += added.get(self._rate, 0)
        now = self._clock()
        if now - self._printed >= self._every_seconds or self._work >= self._total_work:
            self._printed = now
            self._show(self._line(max(now - self._started, 1e-9)))

    def _line(self, seconds: float) -> str:
        """The line after so many seconds; without the time left while nothing tells it."""
        done, *others = self._counts.items()
        fields = [f"{self._title} {done[1]}/{self._total} {self._unit}", *(f"{name} {count}" for name, count in others)]
        fields.append(f"{self._new / seconds:.1f} {self._rate}/s")
        to_do = max(0, self._total_work - self._work)
        if self._new_work or not to_do:
            fields.append(f"{clock_text(seconds / self._new_work * to_do if to_do else 0)} left")
        return "  ".join(fields)


def clock_text(seconds: float) -> str:
    """A duration as minutes and seconds, or hours: `0:46`, `12:05`, `3:07:00`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
