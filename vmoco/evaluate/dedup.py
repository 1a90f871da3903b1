"""Finds clips that are copies of each other: encoded anew, made smaller, with a logo.

    embeddings  ->  nearest clips of other videos  ->  do the moving pictures agree?  ->  groups  ->  table, list, page

Embeddings alone cannot tell a copy from another moment before the same camera, so they only propose pairs;
`fingerprint.py` decides. Clips of one video are never compared. Clips are spread over a video, so those of a copy of
another length begin at other frames, also where only its end is missing. Such a clip is found the more surely, the more
frames it shares with one of the original, and missed if it shares less than half. A copy is also missed if it has
another frame rate (ingest with --fps), if it is mirrored, cropped or played faster, or if nothing moves in it.

On films that did not choose the default threshold, 99 % of the clips that were called copies were copies. All copies at
quality 23 and 29 of x264 were found, 61 % at 35, and 38 % of the clips of copies without their last tenth, at quality
23 (`python -m tests.benchmarks.dedup`).

A group is one clip that stays, and clips that agree with it directly; so there are no chains from one clip to another
that is unlike it. Of two clips that agree, the one stays that (1) is held out, because held-out clips are scored and
never trained on; (2) has the larger picture; (3) is of the larger file, because a poorer copy is smaller; (4) is first
by name. A clip that agrees with any held-out clip never stays in training.

Memory holds the name, the number of the video and `candidates` numbers for each clip; embeddings and fingerprints are
in temporary files, and are compared block by block.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from vmoco import storage
from vmoco.data import training_clips
from vmoco.data.coded import codes
from vmoco.data.manifest import NAME, Manifest
from vmoco.data.shard_reader import ClipReader
from vmoco.encoders.encoder import Encoder
from vmoco.evaluate.embed import embed
from vmoco.evaluate.fingerprint import agreement, fingerprint, size_of
from vmoco.evaluate.table import FeatureTable
from vmoco.job_settings import DedupSettings, EmbedSettings
from vmoco.progress import Progress

TABLE, LIST = "duplicates.parquet", "leave_out.txt"
FIELDS = [
    pa.field("clip_id", pa.string(), nullable=False),
    pa.field("video_id", pa.string(), nullable=False),
    pa.field("start_seconds", pa.float64(), nullable=False),
    pa.field("held_out", pa.bool_(), nullable=False),
    pa.field("group", pa.int32(), nullable=False),  # the same number for clips that are copies
    pa.field("duplicate_of", pa.string()),  # clip_id; null for the clip of a group that stays
    pa.field("similarity", pa.float32()),  # cosine of both embeddings, less the mean of all
    pa.field("agreement", pa.float32()),  # of what moves in both, as `fingerprint.agreement`
]

_QUERIES, _GALLERY, _PAIRS = 1024, 8192, 1024
"""Embeddings and pairs in memory at a time."""

Features = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """Pairs of clips; all arrays have one entry for each pair."""

    one: Rows
    """Row of the manifest."""
    other: Rows
    """A later row."""
    similarity: Features
    """Cosine of the embeddings."""

    def __len__(self) -> int:
        return len(self.one)

    def __getitem__(self, at: Any) -> Pairs:
        return Pairs(self.one[at], self.other[at], self.similarity[at])


@dataclass(frozen=True)
class Duplicates:
    """What was found in a data set."""

    table: pa.Table
    """Rows of FIELDS, group by group; in each the clip that stays comes first."""
    num_compared: int
    """Pairs whose pictures were compared."""

    @property
    def left_out(self) -> pa.Table:
        """The rows of clips that training should leave out: those with a copy that stays, unless held out."""
        rows = self.table.filter(pc.is_valid(self.table["duplicate_of"]))
        return rows.filter(pc.invert(rows["held_out"]))


def find_duplicates(
    encoder: Encoder, settings: DedupSettings, *, show: Callable[[str], None] = print
) -> tuple[Manifest, Duplicates]:
    """Finds the copies in a data set and writes the table and the list; needs an initialised Ray.

    Raises:
        ValueError: there is no data set, a clip is damaged, or the place cannot be written.
    """
    data = storage.require_absolute(settings.data, "--data")
    output = storage.require_absolute(settings.output, "--output")
    if not storage.exists(storage.join(data, NAME)):
        raise ValueError(f"--data {data} is not a data set: make one of the videos with jobs/ingest.py")
    manifest = Manifest.load(data)
    pool = {name: getattr(settings, name) for name in ("max_workers", "use_gpu", "cpus_per_worker", "batch_size")}
    made = embed(encoder, EmbedSettings(videos=data, output=output, gallery=False, **pool), show=show)
    found = duplicates_of(manifest, made.table, settings, show=show)
    sink = pa.BufferOutputStream()
    pq.write_table(found.table, sink, compression="zstd")
    storage.write_atomic(storage.join(output, TABLE), memoryview(sink.getvalue()))
    rows = found.left_out.to_pylist()
    about = [(row["clip_id"], f"{row['video_id']} @ {row['start_seconds']:.2f} s") for row in rows]
    title = f"{len(rows)} clips of {manifest.uri} (hash {manifest.hash}) with a copy that stays"
    training_clips.write_list(storage.join(output, LIST), about, title=title)
    return manifest, found


def duplicates_of(
    manifest: Manifest, table: FeatureTable, settings: DedupSettings, *, show: Callable[[str], None] = print
) -> Duplicates:
    """Finds the copies among the clips of a data set by the table of their embeddings.

    Raises:
        ValueError: as `compare`.
    """
    return choose(manifest, *compare(manifest, table, settings, show=show), min_agreement=settings.min_agreement)


def compare(
    manifest: Manifest, table: FeatureTable, settings: DedupSettings, *, show: Callable[[str], None] = print
) -> tuple[Pairs, Features]:
    """The pairs that the embeddings propose, and the agreement of each, float32 (number of pairs,).

    Raises:
        ValueError: the table has other clips than the data set, or a clip is damaged.
    """
    about = manifest.columns(["clip_id", "video_id"])
    rows = pc.index_in(table.columns(["clip_id"])["clip_id"], about["clip_id"].combine_chunks())
    if len(rows) != about.num_rows or rows.null_count:
        raise ValueError(f"the table of embeddings is not of the clips of {manifest.uri}: give another --output")
    with tempfile.TemporaryFile() as scratch:
        features = _unit_features(scratch, table, rows.to_numpy())
        candidates = _candidates(features, codes(about["video_id"]), settings, show=show)
    with tempfile.TemporaryFile() as scratch:
        return candidates, _agreements(scratch, manifest, candidates, show=show)


def choose(manifest: Manifest, pairs: Pairs, agrees: Features, *, min_agreement: float) -> Duplicates:
    """Groups the pairs that agree well enough; the first two arguments after the data set are those of `compare`."""
    copies = agrees >= min_agreement
    return Duplicates(_grouped(manifest, pairs[copies], agrees[copies]), len(pairs))


def _unit_features(scratch: Any, table: FeatureTable, rows: Rows) -> Features:
    """Unit features without their mean, in a file: float32 (N, D), in the order of the manifest."""
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in table.blocks()) / len(table)
    features = np.memmap(scratch, np.float32, mode="w+", shape=(len(table), len(mean)))
    first = 0
    for block in table.blocks():
        apart = block - mean
        apart /= np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-9)
        features[rows[first : first + len(block)]] = apart
        first += len(block)
    return features


def _candidates(
    features: Features, videos: npt.NDArray[np.int32], settings: DedupSettings, *, show: Callable[[str], None]
) -> Pairs:
    """Each clip with its nearest clips of other videos, each pair once, sorted by row.

    Exact. faiss cannot leave out the clips of the query's own video, which are the nearest ones of most clips.
    """
    progress = Progress(show, "dedup  looked for near clips of", total=len(features), unit="clips", every_seconds=5)
    found = []
    for queries in _blocks(len(features), _QUERIES):
        best = torch.full((len(queries), settings.candidates), -2.0)
        rows = torch.full((len(queries), settings.candidates), -1)
        asked = torch.from_numpy(np.array(features[queries]))
        for gallery in _blocks(len(features), _GALLERY):
            cosines = asked @ torch.from_numpy(np.array(features[gallery])).T
            own = videos[queries][:, None] == videos[gallery][None]
            cosines[torch.from_numpy(own)] = -2.0
            numbers = torch.arange(gallery.start, gallery.stop).expand(len(queries), -1)
            best, order = torch.cat([best, cosines], dim=1).topk(settings.candidates, dim=1)
            rows = torch.cat([rows, numbers], dim=1).gather(1, order)
        kept = (best >= settings.min_similarity).numpy()
        one = np.repeat(np.arange(queries.start, queries.stop), kept.sum(axis=1))
        other = rows.numpy()[kept]
        found.append((np.minimum(one, other), np.maximum(one, other), best.numpy()[kept]))
        progress.add(len(queries))
    one, other, similarity = (np.concatenate(each) for each in zip(*found, strict=True))
    _, first = np.unique(one * len(features) + other, return_index=True)
    return Pairs(one[first], other[first], similarity[first])


def _blocks(count: int, size: int) -> Iterator[range]:
    for first in range(0, count, size):
        yield range(first, min(first + size, count))


def _agreements(scratch: Any, manifest: Manifest, pairs: Pairs, *, show: Callable[[str], None]) -> Features:
    """The agreement of each pair; each clip is read once.

    Raises:
        ValueError: a clip is damaged.
    """
    if not len(pairs):
        return np.zeros(0, np.float32)
    clips = np.union1d(pairs.one, pairs.other)
    prints = np.memmap(scratch, np.float16, mode="w+", shape=(len(clips), 2, size_of(manifest.frame_shape[0])))
    progress = Progress(show, "dedup  compared the pictures of", total=len(clips), unit="clips", every_seconds=5)
    for place, frames in _stored_order(manifest, clips):
        prints[place] = fingerprint(frames)
        progress.add()
    one, other = np.searchsorted(clips, pairs.one), np.searchsorted(clips, pairs.other)
    num_frames = manifest.frame_shape[0]
    parts = []
    for at in _blocks(len(pairs), _PAIRS):
        parts.append(agreement(prints[one[list(at)]], prints[other[list(at)]], num_frames=num_frames))
    return np.concatenate(parts)


def _stored_order(manifest: Manifest, clips: Rows) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """The place of each clip in `clips`, and its frames without padding, shard by shard."""
    rows = manifest.take(clips)
    columns = [rows[name].to_pylist() for name in ("shard", "row")]
    order = sorted(range(len(clips)), key=lambda at: (columns[0][at], columns[1][at]))
    reader = ClipReader.of(manifest, rows, crop=True)
    yield from zip(order, reader.several(order), strict=True)


def _grouped(manifest: Manifest, pairs: Pairs, agrees: Features) -> pa.Table:
    """Decides which clip of each group stays: the table of FIELDS."""
    partners: dict[int, list[tuple[int, float, float]]] = {}
    for one, other, similarity, agreed in zip(
        pairs.one.tolist(), pairs.other.tolist(), pairs.similarity.tolist(), agrees.tolist(), strict=True
    ):
        partners.setdefault(one, []).append((other, similarity, agreed))
        partners.setdefault(other, []).append((one, similarity, agreed))
    involved = sorted(partners)
    facts = dict(zip(involved, manifest.take(np.array(involved, np.int64)).to_pylist(), strict=True))
    # Every held-out clip is scored, so it counts as one that stays also where it is a copy of another held-out clip.
    stays, group_of, found = set[int](), dict[int, int](), []
    for row in sorted(involved, key=lambda row: _rank(facts[row])):
        fact = facts[row]
        copies = [each for each in partners[row] if each[0] in stays]
        original = max(copies, key=lambda each: (each[2], -each[0])) if copies else None
        group_of[row] = group_of[original[0]] if original else len(group_of)
        if original is None or fact["held_out"]:
            stays.add(row)
        named = {name: fact[name] for name in ("clip_id", "video_id", "start_seconds", "held_out")}
        about: dict[str, Any] = {"group": group_of[row]}
        if original:
            name, similarity, agreed = facts[original[0]]["clip_id"], original[1], original[2]
            about |= {"duplicate_of": name, "similarity": similarity, "agreement": agreed}
        found.append(named | about)
    sizes = Counter(row["group"] for row in found)
    found = [row for row in found if sizes[row["group"]] > 1]  # alone: all its copies have another copy that stays
    numbers = {group: number for number, group in enumerate(dict.fromkeys(row["group"] for row in found))}
    for each in found:
        each["group"] = numbers[each["group"]]
    found.sort(key=lambda row: row["group"])  # stable: the clip that stays remains the first one
    return pa.Table.from_pylist(found, schema=pa.schema(FIELDS))


def _rank(fact: dict[str, Any]) -> tuple[Any, ...]:
    """Smaller for a clip that is rather kept."""
    picture = fact["height"] * fact["width"]
    return (
        not fact["held_out"],
        -picture,
        -fact["video_bytes"],
        fact["video_id"],
        fact["start_seconds"],
        fact["clip_id"],
    )
