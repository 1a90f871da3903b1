"""The first look at videos: what each of them holds, before shards are planned. Knows nothing of Ray.

Every video is read once here, for its hash, its time stamps and whether it was cut off; nothing is decoded. The plan of
the shards follows from the results, which are kept beside the data set until it is complete: a run that was killed does
not read its videos again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from vmoco import storage
from vmoco.data import fetch
from vmoco.data.clips import ClipPlan
from vmoco.data.decoder import Decoder
from vmoco.data.ingest_settings import IngestSettings
from vmoco.data.ledger import Rejection, VideoError
from vmoco.data.parts import Part
from vmoco.data.source import Found

FOLDER = "probes"
"""Folder of the results in a data set that is being made."""
VIDEOS_PER_TASK = 32


@dataclasses.dataclass(frozen=True)
class Probed:
    """A video that was looked at."""

    found: Found
    sha256: str = ""
    """Hash of the file; empty where it could not be read."""
    num_clips: int = 0
    """Clips that it will give, unless the decoder finds other frames than the container promises."""
    parts: tuple[Part, ...] = ()
    """Parts of a long video; none where it is decoded as a whole."""
    duration: float = 0.0
    """Seconds."""
    rejection: Rejection | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Probed:
        """Reads `to_json` back."""
        return cls(
            found=found_from_json(values["found"]),
            sha256=values["sha256"],
            num_clips=values["num_clips"],
            parts=tuple(Part(**part) for part in values["parts"]),
            duration=values["duration"],
            rejection=Rejection(**values["rejection"]) if values["rejection"] else None,
        )


def found_from_json(values: dict[str, Any]) -> Found:
    """A `Found` from plain values."""
    return Found(**{**values, "splits": tuple(values["splits"])})


def clip_plan(settings: IngestSettings, found: Found) -> ClipPlan:
    """How clips are cut from a video."""
    return ClipPlan(
        num_frames=settings.num_frames,
        stride=settings.stride,
        max_clips=settings.max_clips_per_video,
        fps=settings.fps,
        short=settings.short_videos,
        start_seconds=found.start_seconds,
        end_seconds=found.end_seconds,
    )


def rejected(found: Found, error: VideoError) -> Rejection:
    """The ledger row of a video."""
    return Rejection(found.video_id, error.stage, error.reason, error.message, error.transient, entry=found.entry)


def probe_videos(
    videos: list[Found], *, root: str, output: str, settings: IngestSettings, decoder: Decoder
) -> list[Probed]:
    """Looks at a group of videos: what one task does. Results that are there already are taken.

    Raises:
        ValueError: the results cannot be written.
    """
    named = [settings.content(), settings.part_seconds, [found.entry for found in videos]]
    name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    place = storage.join(output, FOLDER, f"{name}.json")
    kept = _kept(place)
    if kept is None:
        kept = [_probe(found, root=root, settings=settings, decoder=decoder) for found in videos]
        if not any(each.rejection and each.rejection.transient for each in kept):
            storage.write_atomic(place, json.dumps([each.to_json() for each in kept]).encode())
    return kept


def _kept(place: str) -> list[Probed] | None:
    try:
        return [Probed.from_json(values) for values in json.loads(storage.read_bytes(place))]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _probe(found: Found, *, root: str, settings: IngestSettings, decoder: Decoder) -> Probed:
    sha256 = ""
    try:
        with fetch.local_copy(root, found) as path:
            sha256 = fetch.file_sha256(path)
            num_clips, parts, duration = decoder.probe(
                {"path": path},
                clip_plan(settings, found),
                part_seconds=settings.part_seconds,
                seconds=settings.seconds_per_video,
            )
        return Probed(found, sha256, num_clips, tuple(parts), duration)
    except VideoError as error:
        return Probed(found, sha256, rejection=rejected(found, error))
