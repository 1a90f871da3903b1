"""What a shard says of itself in its schema metadata: every video that went in, also those that gave no clip.

With it a shard stands on its own: a manifest can be rebuilt from shards, and a later run knows what was done.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from vmoco.data.frames import Encoding, Shape
from vmoco.data.ledger import Rejection

VERSION = 2
"""Of the schema of shards and manifest. 2: JPEG, byte ranges, sizes of pictures, splits, parts of long videos."""


@dataclasses.dataclass(frozen=True)
class Video:
    """A video, or a part of a long one, that a shard accounts for, as it was when it was read."""

    video_id: str
    num_bytes: int
    sha256: str
    """Hash of the file; empty where it could not be read."""
    entry: str = ""
    """Hash of what the list of videos said of it: size, range, label, splits."""
    range: str | None = None
    """Which seconds of the file it is, as `0.5-3`; None where it is all of it."""
    part: int = 0
    num_parts: int = 1
    """A long video is cut in parts, which may be in different shards."""


@dataclasses.dataclass(frozen=True)
class Account:
    """Which videos went into a shard, with which settings, and which of them were rejected."""

    settings: dict[str, Any]
    """`IngestSettings.content()`."""
    frame_shape: Shape
    """(T, H, W, C) of every clip."""
    videos: tuple[Video, ...]
    """All of them, in the order in which they were planned."""
    rejected: tuple[Rejection, ...] = ()
    encoding: Encoding = "raw"
    """How the frames of every clip are stored."""

    def to_json(self) -> str:
        """The account as canonical JSON: equal accounts give equal bytes."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, *, uri: str) -> Account:
        """Reads `to_json` back.

        Raises:
            ValueError: it is of another version.
        """
        values = json.loads(text)
        version = values.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"shard {uri} has schema version {version}, this vmoco reads version {VERSION}: "
                "use the vmoco that made it, or run jobs/ingest.py again into another folder"
            )
        return cls(
            settings=values["settings"],
            frame_shape=tuple(values["frame_shape"]),
            videos=tuple(Video(**video) for video in values["videos"]),
            rejected=tuple(Rejection(**rejection) for rejection in values["rejected"]),
            encoding=values["encoding"],
        )
