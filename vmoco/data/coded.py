"""Tables in which a text that repeats is kept once, so that the columns of a hundred million clips fit into memory.

The name of a video stands in the row of each of its clips. Here a row has a number for it, which takes 4 bytes, and the
names are Python strings that all rows share.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

UNIQUE = ("clip_id", "sha256")
"""Texts that hardly repeat: they stay as they are."""


def coded(pieces: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """Pieces as one table; its texts are dictionary-encoded, but not those of UNIQUE.

    Args:
        pieces: of any number of rows.
        schema: of each of them.
    """
    joined = [_coded(piece) for piece in (schema.empty_table(), *pieces)]
    return pa.concat_tables(joined).unify_dictionaries().combine_chunks()


def strings(column: pa.ChunkedArray) -> npt.NDArray[np.object_]:
    """A column of texts, coded or not: object (N,), equal ones are one Python string; None for a missing value."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    parts = []
    for chunk in column.chunks:
        names = np.array([*chunk.dictionary.to_pylist(), None], dtype=object)
        parts.append(names[chunk.indices.fill_null(len(names) - 1).to_numpy()])
    return np.concatenate(parts) if parts else np.empty(0, object)


def codes(column: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """A number for each row of a coded column without missing values, equal for equal texts: int32 (N,)."""
    return np.asarray(column.combine_chunks().indices.to_numpy(), np.int32)


def _coded(piece: pa.Table) -> pa.Table:
    for place, field in enumerate(piece.schema):
        if pa.types.is_string(field.type) and field.name not in UNIQUE:
            encoded = piece.column(place).dictionary_encode()
            piece = piece.set_column(place, pa.field(field.name, encoded.type, field.nullable), encoded)
    return piece
