"""The ledger: one JSON line per video that gave no clips, with the reason, so that no video ever just disappears.

`reason` is a short code that can be counted; `message` comes from the decoder or the system. The next run tries the
`transient` ones again (a time limit, a read error); the others stay until the file itself changes.

Whatever is raised while one video is read becomes its row (`attributed`), so no video ends a job of many hours. Only an
error of the place that the job writes to ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from vmoco import storage

NAME = "ledger.jsonl"

NOT_SEEKABLE = "not-seekable"
"""Reason of a part of a long video that cannot be decoded alone: then the video is decoded from its start."""
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


def write(uri: str, rejections: Iterable[Rejection]) -> None:
    """Writes the ledger of the data set at `uri`, sorted by video, in place of the one that was there.

    Raises:
        ValueError: the place cannot be written.
    """
    ordered = sorted(rejections, key=lambda rejection: rejection.video_id)
    lines = [json.dumps(dataclasses.asdict(rejection), sort_keys=True) + "\n" for rejection in ordered]
    storage.write_atomic(storage.join(uri, NAME), "".join(lines).encode())


def read(uri: str) -> list[Rejection]:
    """The ledger of the data set at `uri`; empty if there is none.

    Raises:
        ValueError: a line is not a ledger row.
    """
    place = storage.join(uri, NAME)
    try:
        lines = storage.read_bytes(place).decode().splitlines()
    except FileNotFoundError:
        return []
    rejections = []
    for number, line in enumerate(lines, start=1):
        try:
            rejections.append(Rejection(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"line {number} of {place} is not a ledger row ({error}): "
                "remove the file, and the next ingest tries its videos again"
            ) from None
    return rejections


def totals(rejections: Iterable[Rejection]) -> str:
    """How many videos were rejected for each reason, the most frequent first: `truncated 2, empty 1`."""
    counts = Counter(rejection.reason for rejection in rejections)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ordered)
