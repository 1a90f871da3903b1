"""Checks a data set: every file and clip of the manifest is there, is what ingest wrote, and can be decoded.

Each shard is read once from one end to the other; the checksum of the file and those of its clips come from the same
bytes. There is one finding, a sentence, for each error. Nothing is repaired.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vmoco.data import frames, ledger
from vmoco.data.clip_rows import SCHEMA, ClipRows, Counts
from vmoco.data.cores import own_cores
from vmoco.data.manifest import Manifest
from vmoco.data.shard import ROW_FIELDS, read_rows
from vmoco.data.shard_reader import ShardScan
from vmoco.progress import Progress


def check(uri: str, progress: Callable[[str], None] = print) -> list[str]:
    """Reads the complete data set at `uri` and returns what is wrong with it; an empty list where nothing is.

    Args:
        uri: Folder of the data set.
        progress: Is called with a progress line at most once a second.

    Raises:
        ValueError: there is no data set, or its shards are missing.
    """
    manifest = Manifest.load(uri)
    rows = ClipRows()
    for piece in manifest.batches(SCHEMA.names):
        rows.add(piece)
    reasons = Counter(row.reason for row in ledger.rows(uri) if isinstance(row, ledger.Rejection))
    findings = _check_manifest(manifest, rows, num_rejected=reasons.total())
    if reasons:
        progress(f"check  {reasons.total()} videos are rejected: {ledger.totals(reasons)}; see {uri}/{ledger.NAME}")
    printed = Progress(
        progress,
        "check  read",
        total=len(manifest.shards),
        unit="shards",
        counts=["wrong"],
        total_work=sum(file.num_bytes for file in manifest.shards.values()),
    )
    # Hashing and decoding let other threads run.
    threads = own_cores()
    waiting: deque[tuple[str, Future[list[str]]]] = deque()

    def wait(most: int) -> None:
        while len(waiting) > most:
            name, future = waiting.popleft()
            findings.extend(future.result())
            printed.add(work=manifest.shards[name].num_bytes, wrong=len(future.result()))

    with ThreadPoolExecutor(threads) as pool:
        for name, own in _by_shard(rows, manifest.shards):
            if name not in manifest.shards:
                findings.append(f"clips of shard {name} are in the manifest, but the shard is not among its shards")
                continue
            waiting.append((name, pool.submit(_check_shard, manifest, name, own)))
            wait(2 * threads)
        wait(0)
    return findings


def _by_shard(rows: ClipRows, shards: Iterable[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each shard, sorted by its name; also of shards without rows, and of those that are not listed."""
    there = (row for piece in rows.batches(order=("shard", "row")) for row in piece.to_pylist())
    grouped = ((name, list(own)) for name, own in itertools.groupby(there, key=lambda row: str(row["shard"])))
    empty = ((name, list[dict[str, Any]]()) for name in sorted(shards))
    merged = heapq.merge(grouped, empty, key=lambda each: each[0])
    for name, both in itertools.groupby(merged, key=lambda each: each[0]):
        yield name, [row for _, own in both for row in own]


def _check_manifest(manifest: Manifest, rows: ClipRows, *, num_rejected: int) -> list[str]:
    findings: list[str] = []
    found, repeated = rows.content_hash()
    if found != manifest.hash:
        findings.append(f"manifest: its hash is {manifest.hash}, and that of its rows is {found}")
    counts = Counts()
    for piece in rows.batches():
        counts.add(piece)
    counted = counts.found | {"rejected": num_rejected}
    for name, count in counted.items():
        if manifest.counts.get(name) != count:
            where = "ledger" if name == "rejected" else "manifest"
            findings.append(f"manifest: it counts {manifest.counts.get(name)} {name}, and the {where} has {count}")
    if repeated:
        findings.append(f"manifest: {repeated} clip_ids occur more than once")
    return findings


def _check_shard(manifest: Manifest, name: str, rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with one shard and the clips of the manifest that lie in it."""
    findings: list[str] = []
    try:
        there = read_rows(manifest.shard_uri(name))
        own = there.table.to_pylist()
        findings += _check_bytes(manifest, name, own, listed={row["row"]: row["sha256"] for row in rows})
    except (OSError, ValueError) as error:
        return [*findings, f"shard {name}: {error}"]
    if there.metadata.encoding != manifest.encoding or there.metadata.frame_shape != manifest.frame_shape:
        stored = f"{there.metadata.encoding} {there.metadata.frame_shape}"
        findings.append(f"shard {name}: its clips are {stored}, not {manifest.encoding} {manifest.frame_shape}")
    for row in rows:
        stands = own[row["row"]] if 0 <= row["row"] < len(own) else {}
        other = [field.name for field in ROW_FIELDS if stands.get(field.name) != row[field.name]]
        if other:
            findings.append(f"shard {name}, row {row['row']}: {', '.join(other)} differ from the manifest")
    return findings


def _check_bytes(manifest: Manifest, name: str, own: list[dict[str, Any]], *, listed: dict[int, str]) -> list[str]:
    """What is wrong with the bytes of a shard.

    Args:
        manifest: Of the data set.
        name: Of the shard.
        own: The rows of the shard, in its order.
        listed: Hashes in the manifest, by row; other rows are of videos that have changed since.
    """
    expected = manifest.shards[name]
    findings: list[str] = []
    every = [row | {"row": number, "sha256": listed.get(number)} for number, row in enumerate(own)]
    scan = ShardScan(manifest.shard_uri(name), every, by_clips=expected.by_clips)
    for row, stored, intact in scan:
        if row["row"] not in listed:
            continue
        wrong = [] if intact else ["its checksum is wrong"]
        try:
            frames.decode(stored, manifest.encoding, manifest.frame_shape)
        except ValueError as error:
            wrong.append(f"it cannot be decoded: {error}")
        if wrong:
            clip = f"row {row['row']}, clip {row['clip_id']} of {row['video_id']!r}"
            findings.append(f"shard {name}, {clip}: {', and '.join(wrong)}")
    if scan.file.num_bytes != expected.num_bytes:
        findings.append(f"shard {name}: it has {scan.file.num_bytes} bytes, and should have {expected.num_bytes}")
    elif scan.file != expected:
        findings.append(f"shard {name}: its SHA-256 is {scan.file.sha256}, and should be {expected.sha256}")
    return findings
