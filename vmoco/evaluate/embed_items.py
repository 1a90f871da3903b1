"""Plans an embedding job: its items, one for each shard of a data set or for a few videos, in rounds.

A hash of its clips or videos names the part of the table that an item makes. The driver holds the rows of one round of
items and the number of clips of each shard, so a data set may have any number of clips: each round reads the manifest
once more.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vmoco.data.distribute import in_groups
from vmoco.data.found import Found
from vmoco.data.manifest import Manifest
from vmoco.evaluate.table import SPLITS

_ROW_NAMES = ["clip_id", "video_id", "start_seconds", "label", *SPLITS, "held_out", "shard", "row"]
_ROW_NAMES += ["offset", "num_bytes", "sha256", "height", "width", "fps"]

CLIPS_PER_ROUND = 2**19
"""Clips whose rows the driver holds, about 500 bytes each. The pool starts anew for each round."""
_VIDEOS_PER_ROUND = 2**17

Item = dict[str, Any]
"""`part`, its name, and `plan`, JSON for `embed_task.EmbedTask`."""
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Items:
    """The items of a job."""

    count: int
    rounds: Iterable[list[Item]]
    """In order; each round is made when it is asked for."""


def of_rows(manifest: Manifest, rows: pa.Table) -> Items:
    """The items of some clips of a data set, which are rows of its manifest."""
    items = shard_items(manifest, rows)
    return Items(len(items), [items])


def of_data_set(manifest: Manifest, chosen: Mask | None = None) -> Items:
    """The items of all clips of a data set, or of those that are chosen, bool (N,) in the order of its manifest."""
    counts, begin = Counter[str](), 0
    for piece in manifest.batches(["shard"]):
        own = piece.filter(_chosen(chosen, begin, piece))["shard"].value_counts()
        counts.update(dict(zip(own.field("values").to_pylist(), own.field("counts").to_pylist(), strict=True)))
        begin += piece.num_rows
    return Items(len(counts), _rounds(manifest, chosen, counts))


def _rounds(manifest: Manifest, chosen: Mask | None, counts: Counter[str]) -> Iterator[list[Item]]:
    names, clips = list[str](), 0
    for name in [*sorted(counts), None]:
        if names and (name is None or clips + counts[name] > CLIPS_PER_ROUND):
            yield shard_items(manifest, _of_shards(manifest, chosen, names))
            names, clips = [], 0
        if name is not None:
            names.append(name)
            clips += counts[name]


def _of_shards(manifest: Manifest, chosen: Mask | None, names: list[str]) -> pa.Table:
    wanted, begin = pa.array(names), 0

    def keep(piece: pa.Table) -> pa.Array:
        nonlocal begin
        begin += piece.num_rows
        return pc.and_(pc.is_in(piece["shard"], wanted), _chosen(chosen, begin - piece.num_rows, piece))

    return manifest.rows(keep, _ROW_NAMES)


def _chosen(chosen: Mask | None, begin: int, piece: pa.Table) -> pa.Array:
    return pa.array(np.ones(piece.num_rows, bool) if chosen is None else chosen[begin : begin + piece.num_rows])


def shard_items(manifest: Manifest, rows: pa.Table) -> list[Item]:
    """One item per shard.

    Args:
        manifest: data set.
        rows: of its clips to embed.
    """
    if not rows.num_rows:
        return []
    table = rows.select(_ROW_NAMES).sort_by([("shard", "ascending"), ("row", "ascending")])
    about = {"data_set": manifest.uri, "frame_shape": manifest.frame_shape, "encoding": manifest.encoding}
    shards = table["shard"].combine_chunks().dictionary_encode()
    begins = np.flatnonzero(np.diff(shards.indices.to_numpy(), prepend=-1)).tolist()
    num_frames, items = manifest.frame_shape[0], list[Item]()
    for begin, end in zip(begins, [*begins[1:], table.num_rows], strict=True):
        own = table.slice(begin, end - begin).to_pylist()  # shard by shard: as Python objects they take much memory
        clips = [row | {"source": row["shard"], "clip_seconds": num_frames / row.pop("fps")} for row in own]
        named = "".join(row["clip_id"] + row["sha256"] for row in own)
        items.append({"part": _digest(own[0]["shard"], named), "plan": json.dumps(about | {"rows": clips})})
    return items


def of_videos(folder: str, videos: Collection[Found], *, videos_per_part: int) -> Items:
    """The items of the videos of a folder, in their order."""
    count = -(-len(videos) // videos_per_part)
    parts = in_groups(videos, videos_per_part)
    rounds = in_groups(parts, max(_VIDEOS_PER_ROUND // videos_per_part, 1))
    return Items(count, ([_video_item(folder, part) for part in each] for each in rounds))


def _video_item(folder: str, videos: tuple[Found, ...]) -> Item:
    group = [[found.video_id, found.num_bytes] for found in videos]
    return {"part": _digest(json.dumps(group), ""), "plan": json.dumps({"folder": folder, "videos": group})}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
