"""Writes the manifest of a data set, piece by piece: memory does not grow with the number of clips.

The file is one, also of a data set that grows: a manifest that is replaced as a whole is complete or not there. What
is added costs reading and writing about 150 bytes of each clip.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vmoco import storage
from vmoco.data.clip_rows import ClipRows, Counts
from vmoco.data.frames import Encoding, Shape
from vmoco.data.manifest import FIELDS, LATER, NAME, Manifest, with_all_fields
from vmoco.data.shard import METADATA_KEY, VERSION, ShardFile


def write_manifest(
    uri: str,
    rows: ClipRows | pa.Table,
    *,
    settings: Mapping[str, Any],
    frame_shape: Shape,
    encoding: Encoding,
    shards: Mapping[str, ShardFile],
    num_rejected: int,
) -> Manifest:
    """Writes the manifest of the data set at `uri`: from now on the data set exists, or has grown.

    Args:
        uri: folder of the data set.
        rows: of its clips; a table may lack fields that came later.
        settings: `IngestSettings.content()`.
        frame_shape: (T, H, W, C) of every clip.
        encoding: how its frames are stored.
        shards: all of them, by name.
        num_rejected: videos.

    Raises:
        ValueError: the place, or the disk for temporary files, cannot be written.
    """
    if isinstance(rows, pa.Table):
        rows = ClipRows.of(with_all_fields(rows))
    uri, notes = storage.absolute_uri(uri), rows.note_counts()
    content_hash, repeated = rows.content_hash()
    assert not repeated, "two clips have one clip_id"
    left_out = rows.without_values(LATER)
    schema = pa.schema([field for field in FIELDS if field.name not in left_out])
    counts = Counts()
    with (
        storage.open_atomic(storage.join(uri, NAME)) as file,
        # Without Arrow's own copy of the schema, a reader finds the facts also in the schema's metadata, as ever.
        pq.ParquetWriter(pa.PythonFile(file, mode="w"), schema, store_schema=False) as writer,
    ):
        for piece in rows.batches():
            counts.add(piece)
            writer.write_table(piece.select(schema.names))
        manifest = Manifest(
            uri=uri,
            settings=dict(settings),
            hash=content_hash,
            frame_shape=frame_shape,
            encoding=encoding,
            counts={**counts.found, "rejected": num_rejected, **notes},
            shards=dict(sorted(shards.items())),
        )
        about = {
            "version": VERSION,
            "settings": manifest.settings,
            "hash": manifest.hash,
            "frame_shape": manifest.frame_shape,
            "encoding": manifest.encoding,
            "counts": manifest.counts,
            "shards": {name: dataclasses.asdict(shard) for name, shard in manifest.shards.items()},
        }
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(about, sort_keys=True)})
    return manifest
