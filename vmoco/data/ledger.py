"""The ledger: one JSON line per video that gave no clips, with the reason, so that no video ever just disappears.

`reason` is a short code that can be counted; `message` is what the decoder or the system said. A `transient` rejection
(a time limit, a read error) is tried again by the next run; the others stay until the file itself changes.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from vmoco import storage

NAME = "ledger.jsonl"

NOT_SEEKABLE = "not-seekable"
"""Reason of a part of a long video that cannot be decoded alone: then the whole video is."""

Stage = Literal["list", "read", "probe", "decode", "clip"]


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A video that gave no clips, and why."""

    video_id: str
    """Path of the video below the root."""
    stage: Stage
    """How far it came."""
    reason: str
    """Short stable code, such as `truncated`."""
    message: str
    """What the decoder or the system said."""
    transient: bool = False
    """Whether another try may succeed."""
    entry: str = ""
    """Hash of what the list of videos said of it: another entry is another video."""
    shard: str = ""
    """Shard that accounts for the video; empty where it was rejected before any shard was planned."""

    def to_json(self) -> dict[str, Any]:
        """The rejection as plain values."""
        return dataclasses.asdict(self)


class VideoError(Exception):
    """A video that gives no clips: the fields of a ledger row."""

    def __init__(self, stage: Stage, reason: str, message: str, *, transient: bool = False) -> None:
        super().__init__(f"{stage}: {reason}: {message}")
        self.stage: Stage = stage
        self.reason = reason
        self.message = message
        self.transient = transient


def write(uri: str, rejections: Iterable[Rejection]) -> None:
    """Writes the ledger of the data set at `uri`, sorted by video, in place of the one that was there.

    Raises:
        ValueError: the place cannot be written.
    """
    ordered = sorted(rejections, key=lambda rejection: rejection.video_id)
    lines = [json.dumps(rejection.to_json(), sort_keys=True) + "\n" for rejection in ordered]
    storage.write_atomic(storage.join(uri, NAME), "".join(lines).encode())


def read(uri: str) -> list[Rejection]:
    """The ledger of the data set at `uri`; empty where there is none.

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
