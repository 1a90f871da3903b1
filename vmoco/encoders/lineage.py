"""Which encoders saw a video: for takedowns, and for whoever asks.

Every registered version carries the names of its videos; versions that were trained on one data set share a list,
which is fetched once.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from vmoco.encoders import registry
from vmoco.encoders.encoder_program import CARD
from vmoco.encoders.export import VIDEOS, read_card
from vmoco.train.state import file_sha256


@dataclass(frozen=True)
class Sighting:
    """A registered encoder that has to do with a video."""

    uri: str
    """models:/NAME/VERSION."""
    aliases: tuple[str, ...]
    held_out: bool
    """Whether the video was held out: then no weight depends on it, only scores."""
    manifest_hash: str


@dataclass(frozen=True)
class Lineage:
    """The answer for one video."""

    sightings: tuple[Sighting, ...]
    unknown: tuple[str, ...]
    """Versions whose videos are not known, such as imported weights."""


def encoders_that_saw(video_id: str) -> Lineage:
    """Looks a video up in the lineage of all registered versions.

    Args:
        video_id: as the manifest of the data set names it.

    Raises:
        ValueError: an encoder's files are damaged.
    """
    sightings, unknown = [], []
    found_in: dict[str, tuple[bool, bool]] = {}  # by the hash of the list: whether it is in it, and held out
    for version in registry.versions():
        uri = f"models:/{version.name}/{version.version}"
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            sha256 = registry.fetch(uri, folder, names=(CARD,))
            card = json.loads(read_card(folder, uri, sha256=sha256))
            listed = card["files"].get(VIDEOS)
            if listed is None:
                unknown.append(uri)
                continue
            if listed not in found_in:
                registry.fetch(uri, folder, names=(VIDEOS,))
                found_in[listed] = _look_up(folder / VIDEOS, video_id, sha256=listed, uri=uri)
        seen, held_out = found_in[listed]
        if seen:
            aliases = tuple(sorted(version.aliases))
            sightings.append(Sighting(uri, aliases, held_out, card["data"]["manifest_hash"]))
    return Lineage(tuple(sightings), tuple(unknown))


def _look_up(path: Path, video_id: str, *, sha256: str, uri: str) -> tuple[bool, bool]:
    if file_sha256(path) != sha256:
        raise ValueError(f"encoder {uri} is damaged or was changed: its {VIDEOS} does not have the hash of its card")
    row = pq.read_table(path, filters=pc.field("video_id") == video_id)
    return row.num_rows > 0, bool(row.num_rows and row["held_out"][0].as_py())
