"""The plans of ingest: which videos one task probes, and which videos, or parts of long ones, make one shard.

The name of a shard follows from its plan, so a shard of a killed run is found again, and the shards of a data set that
grows stay as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from vmoco.data.found import Found
from vmoco.data.ledger import Rejection
from vmoco.data.parts import Part
from vmoco.data.shard import VERSION
from vmoco.job_settings import IngestSettings

VIDEOS_PER_TASK = 32
"""Videos that one task probes."""
# Size of a JPEG at quality 92 over that of its raw frame, roughly: only the size of shards depends on it.
JPEG_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """The plan of a task that probes."""

    videos: tuple[Found, ...]


@dataclasses.dataclass(frozen=True)
class Probed:
    """A video, and what probing found."""

    found: Found
    sha256: str = ""
    """Hash of the file; empty where it could not be read."""
    num_clips: int = 0
    """Clips that it will give, unless decoding finds other frames than the file lists, or cuts to split it at."""
    parts: tuple[Part, ...] = ()
    """What of it is decoded, by one task or by several; empty where it is decoded from its start to its end."""
    duration: float = 0.0
    """Seconds."""
    notes: tuple[str, ...] = ()
    """What is unusual about it, as in `Timeline.notes`."""
    rejection: Rejection | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """A video, or a part of a long one: what one request to the decoder cuts."""

    found: Found
    sha256: str
    part: Part | None = None
    """What of it is decoded; None decodes it from its start to its end."""
    number: int = 0
    """Of the part."""
    num_parts: int = 1
    duration: float = 0.0
    """Seconds of the video."""
    notes: tuple[str, ...] = ()
    """What probing found unusual."""
    num_clips: int = 0
    """As in `Probed`."""

    @property
    def num_bytes(self) -> int:
        """Its share of the bytes of the video."""
        return self.found.num_bytes // self.num_parts


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """The plan of a task that cuts: the content of one shard, and the shard's name, which follows from that."""

    name: str
    units: tuple[Unit, ...]


def plan_shards(probed: Iterable[Probed], settings: IngestSettings, *, whole: bool = False) -> Iterator[ShardPlan]:
    """Groups neighbouring videos into shards of the wanted size; names follow from settings and content.

    Args:
        probed: The videos to cut, in the order of the shards; none is rejected.
        settings: Of the ingest.
        whole: Decode every video from its start to its end.
    """
    shape = settings.frame_shape
    clip_bytes = shape[0] * shape[1] * shape[2] * shape[3] * (1.0 if settings.encoding == "raw" else JPEG_SHARE)
    group: list[Unit] = []
    size = 0.0
    for each in probed:
        for unit in _units(each, whole=whole):
            full = size + unit.num_clips * clip_bytes > settings.shard_megabytes * 2**20
            if group and (full or len(group) == settings.videos_per_shard):
                yield ShardPlan(_name(group, settings), tuple(group))
                group, size = [], 0.0
            group.append(unit)
            size += unit.num_clips * clip_bytes
    if group:
        yield ShardPlan(_name(group, settings), tuple(group))


def _units(each: Probed, *, whole: bool) -> Iterator[Unit]:
    complete = Unit(each.found, each.sha256, duration=each.duration, notes=each.notes, num_clips=each.num_clips)
    if whole or not each.parts:
        yield complete
        return
    for number, part in enumerate(each.parts):
        yield dataclasses.replace(
            complete, part=part, number=number, num_parts=len(each.parts), num_clips=len(part.clips)
        )


def _name(group: list[Unit], settings: IngestSettings) -> str:
    units: list[list[Any]] = [
        [unit.found.entry, unit.sha256, unit.part and [unit.part.runs[0].start, unit.part.runs[-1].last]]
        for unit in group
    ]
    for unit, named_so in zip(group, units, strict=True):
        if unit.found.source is not None:  # it decides what is held out, which is a column of the shard
            named_so.append(unit.found.source)
    named = json.dumps([VERSION, settings.content(), units], sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()[:16]
