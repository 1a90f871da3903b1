"""The ledger: one JSON line per video that gave no clips, or not all, with the reason: no video ever just disappears.

`reason` is a short code that can be counted; `message` comes from the decoder or the system. The next run tries the
`transient` ones again (a time limit, a read error); the others stay until the file itself changes.

A video that is damaged and gives clips all the same has a row too, a `Loss`: it names the seconds that are lost.

Whatever is raised while one video is read becomes its row (`attributed`), so no video ends a job of many hours. Only an
error of the place that the job writes to ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from vmoco import storage

NAME = "ledger.jsonl"

NOT_SEEKABLE = "not-seekable"
"""Reason of a part of a long video that cannot be decoded alone: then the video is decoded from its start."""
DAMAGE = {"decode-error", "truncated", "missing-pictures"}
"""Reasons of a video that is damaged: what becomes of it depends on `--damaged`."""
UNEXPECTED = "unexpected-error"
"""Reason of a video that raised an error for which there is no other reason."""

Stage = Literal["list", "read", "probe", "decode", "clip"]


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A video that gave no clips, and why."""

    video_id: str
    """Path of the video below the root."""
    stage: Stage
    """Step of ingest at which it failed."""
    reason: str
    """Short stable code, such as `truncated`."""
    message: str
    """Error message of the decoder or the system."""
    transient: bool = False
    """Whether another try may succeed."""
    entry: str = ""
    """`Found.entry` of the video when it was rejected: another entry is another video."""
    shard: str = ""
    """Shard whose metadata lists the video; empty where it was rejected before any shard was planned."""
    damaged: str = ""
    """`--damaged` of the ingest that rejected it; rows from before the option have none."""


@dataclasses.dataclass(frozen=True)
class Damage:
    """What of a video is lost."""

    lost: tuple[tuple[float, float], ...]
    """First and last second of each stretch without a sound frame, as the clips' `start_seconds` count."""
    percent: float
    """Share of the video that is lost."""
    message: str
    """First report of the decoder or the container."""

    def __str__(self) -> str:
        if not self.lost:
            return f"nothing is lost: {self.message}"
        named = ", ".join(f"{start:.2f}-{end:.2f}" for start, end in self.lost[:5])
        more = f" and {len(self.lost) - 5} more stretches" if len(self.lost) > 5 else ""
        return f"{self.percent:.1f} % is lost (seconds {named}{more}): {self.message}"


@dataclasses.dataclass(frozen=True)
class Loss:
    """A video that gave clips although a part of it is lost."""

    video_id: str
    """Path of the video below the root."""
    lost: tuple[tuple[float, float], ...]
    """As in `Damage`."""
    percent: float
    """As in `Damage`."""
    message: str
    """As in `Damage`."""
    entry: str = ""
    """`Found.entry` of the video."""
    shard: str = ""
    """Shard whose metadata lists the video."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> Loss:
        """The row of which `dataclasses.asdict` is `values`, also as it comes from JSON."""
        return cls(**values | {"lost": tuple((start, end) for start, end in values["lost"])})


class VideoError(Exception):
    """A video that gives no clips: the fields of a ledger row."""

    def __init__(self, stage: Stage, reason: str, message: str, *, transient: bool = False) -> None:
        message = message.encode(errors="backslashreplace").decode()  # it may quote a name that is not valid Unicode
        super().__init__(f"{stage}: {reason}: {message}")
        self.stage: Stage = stage
        self.reason = reason
        self.message = message
        self.transient = transient


class ScratchError(ValueError):
    """The disk for temporary files cannot be written, which is no fault of the video: it ends the job."""


@contextlib.contextmanager
def attributed(stage: Stage) -> Iterator[None]:
    """Attributes every error of a block to the video that is being read: whatever it is, it becomes a VideoError.

    Raises:
        VideoError: the block failed.
        ScratchError: as it is; so is what ends the process.
    """
    try:
        yield
    except (VideoError, ScratchError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # also the panic of a library in Rust, which is no Exception
        raise VideoError(stage, UNEXPECTED, f"{type(error).__name__}: {_text(error)}", transient=True) from error


_MESSAGE_CHARACTERS = 1000


def _text(error: BaseException) -> str:
    """The message of an error, shortened; its type may be unable to give one."""
    try:
        return str(error)[:_MESSAGE_CHARACTERS]
    except Exception as another:
        return f"without a message ({type(another).__name__})"


def write(uri: str, rejections: Iterable[Rejection], losses: Iterable[Loss] = ()) -> None:
    """Writes the ledger of the data set at `uri`, sorted by video, in place of the one that was there.

    Raises:
        ValueError: the place cannot be written.
    """
    write_sorted(uri, sorted(rejections, key=_by_video), sorted(losses, key=_by_video))


def write_sorted(uri: str, rejections: Iterable[Rejection], losses: Iterable[Loss]) -> None:
    """As `write`, of rows that are sorted by video already; memory does not grow with their number."""
    with storage.open_atomic(storage.join(uri, NAME)) as file:
        ordered: Iterator[Rejection | Loss] = heapq.merge(rejections, losses, key=_by_video)
        for row in ordered:
            values = dataclasses.asdict(row)
            if isinstance(row, Loss):
                values[_KEPT] = True
            elif not row.damaged:
                del values["damaged"]
            file.write((json.dumps(values, sort_keys=True) + "\n").encode())


def _by_video(row: Rejection | Loss) -> str:
    return row.video_id


_KEPT = "kept"
"""Marks the rows of videos that gave clips."""


def read(uri: str) -> list[Rejection]:
    """The rejected videos in the ledger of the data set at `uri`; empty if there is none.

    Raises:
        ValueError: a line is not a ledger row.
    """
    return [row for row in rows(uri) if isinstance(row, Rejection)]


def read_losses(uri: str) -> list[Loss]:
    """The videos in the ledger of the data set at `uri` that gave clips and of which a part is lost.

    Raises:
        ValueError: a line is not a ledger row.
    """
    return [row for row in rows(uri) if isinstance(row, Loss)]


def rows(uri: str) -> Iterator[Rejection | Loss]:
    """All rows of the ledger of the data set at `uri`, one after the other, sorted by video; none if there is none.

    Raises:
        ValueError: a line is not a ledger row.
    """
    place = storage.join(uri, NAME)
    for number, line in enumerate(storage.lines(place), start=1):
        try:
            values = json.loads(line)
            kept = values.pop(_KEPT, False)
            row = Loss.of(values) if kept else Rejection(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"line {number} of {place} is not a ledger row ({error}): "
                "remove the file, and the next ingest tries its videos again"
            ) from None
        yield row


def totals(reasons: Iterable[str] | Mapping[str, int]) -> str:
    """How many videos were rejected for each reason, the most frequent first: `truncated 2, empty 1`.

    Args:
        reasons: of all rejections, or the number of each.
    """
    ordered = sorted(Counter(reasons).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ordered)
