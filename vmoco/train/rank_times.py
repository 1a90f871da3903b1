"""Which rank is the slowest, and which waits most for data: in a synchronous run one slow rank slows all down.

All ranks take equally long for a step, because each waits for the slowest. So a rank measures only its own work: from
the start of a step to the place where it first needs what another rank computes in that micro-batch. Left out is the
last backward of a step, in which DDP waits. That is enough to find a machine that is slower than the others.
"""

from __future__ import annotations

import json
import socket
import statistics
import time
from typing import NamedTuple

import torch

from vmoco.train import distributed

_SLOW, _WAITS = 1.5, 0.1
"""What the progress line names: a rank that is so many times slower than the median, or waits for data so much of the
time while another rank does not."""


class OwnTime:
    """Adds up the time between `begin` and `end`; on a GPU that of its stream, without waiting for it.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._started: float | torch.cuda.Event | None = None
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """Starts the clock."""
        self._started = self._now()

    def end(self) -> None:
        """Stops the clock; does nothing where it stands."""
        started, self._started = self._started, None
        now = self._now() if started is not None else None
        if isinstance(started, torch.cuda.Event) and isinstance(now, torch.cuda.Event):
            self._pairs.append((started, now))
        elif isinstance(started, float) and isinstance(now, float):
            self._seconds += now - started

    def take(self) -> float:
        """The sum in seconds, which starts again at zero. On a GPU it waits for the last `end`."""
        seconds, self._seconds = self._seconds, 0.0
        pairs, self._pairs = self._pairs, []
        if pairs:
            pairs[-1][1].synchronize()
            seconds += sum(first.elapsed_time(last) for first, last in pairs) / 1000
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Times(NamedTuple):
    """What a rank measured."""

    step_seconds: float
    """Own work in a step, on average."""
    data_wait_share: float
    """Share of the time in which it waited for data, from 0 to 1."""


class RankTimes:
    """Compares the ranks once in each logging interval; every rank makes one, and all wait for all.

    Args:
        step: number of steps that the state has taken.
    """

    def __init__(self, step: int) -> None:
        self._hosts = distributed.gather_text(socket.gethostname())
        self._newest: list[Times] = []
        self._started, self._step, self._waited = time.perf_counter(), step, 0.0

    def compare(self, *, own_seconds: float, waited_seconds: float, step: int) -> dict[str, float]:
        """Exchanges the times since the last call, two numbers of each rank; every rank waits for all.

        Args:
            own_seconds: `OwnTime.take`.
            waited_seconds: time in which this rank has waited for data since it began.
            step: number of steps that the state has taken.

        Returns:
            `slowest_step_seconds`, `median_step_seconds` and `slowest_rank`; `most_data_wait_share` and
            `most_data_wait_rank`. Equal on all ranks.
        """
        now = time.perf_counter()
        own, waited = own_seconds / (step - self._step), (waited_seconds - self._waited) / (now - self._started)
        self._started, self._step, self._waited = now, step, waited_seconds
        mine = torch.tensor([[own, waited]], dtype=torch.float64)
        rows = distributed.gather_rows(mine, [1] * len(self._hosts))  # on the host: by gloo, also beside nccl
        self._newest = [Times(*row) for row in rows.tolist()]
        slowest, waiting = self._slowest(), self._waiting()
        return {
            "slowest_step_seconds": self._newest[slowest].step_seconds,
            "median_step_seconds": statistics.median(each.step_seconds for each in self._newest),
            "slowest_rank": float(slowest),
            "most_data_wait_share": self._newest[waiting].data_wait_share,
            "most_data_wait_rank": float(waiting),
        }

    def remarks(self) -> list[str]:
        """What a person should know of the last comparison, for the progress line; empty where all ranks are alike."""
        if len(self._newest) < 2:
            return []
        found, slowest, waiting = [], self._slowest(), self._waiting()
        # The lower median: of two ranks it is the other one.
        median = statistics.median_low(each.step_seconds for each in self._newest)
        usual_wait = statistics.median_low(each.data_wait_share for each in self._newest)
        if self._newest[slowest].step_seconds > _SLOW * median:
            times = self._newest[slowest].step_seconds / max(median, 1e-9)
            found.append(f"{self._name(slowest)} is {times:.1f} times slower than the others")
        most = self._newest[waiting].data_wait_share
        if most > usual_wait + _WAITS:
            found.append(f"{self._name(waiting)} waits for data {most:.0%} of the time")
        return found

    def document(self, *, step: int) -> str:
        """The last comparison of all ranks, with their hosts, as JSON."""
        pairs = zip(self._hosts, self._newest, strict=False)
        rows = [{"rank": rank, "host": host, **times._asdict()} for rank, (host, times) in enumerate(pairs)]
        return json.dumps({"step": step, "ranks": rows}, indent=1)

    @property
    def num_ranks(self) -> int:
        """Number of ranks that are compared."""
        return len(self._hosts)

    def _slowest(self) -> int:
        return max(range(len(self._newest)), key=lambda rank: self._newest[rank].step_seconds)

    def _waiting(self) -> int:
        return max(range(len(self._newest)), key=lambda rank: self._newest[rank].data_wait_share)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"
