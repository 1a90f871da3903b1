"""The clips that training takes, in files of fixed width that all ranks of a node map: they share one copy of it.

A manifest in memory takes 1 GiB for a million clips, in every rank. The index keeps only what a step needs, 64 bytes of
each clip and 16 of each video, and of a mapped file only the pages that are used are in memory:

    clips     clip_id  sha256  offset  num_bytes  shard  place_in_shot  num_of_shot   in the order of the manifest
    videos    first_clip  name                                                        and one more, which ends the last
    shards    name

A node makes the index of a data set when it is used for the first time, from the manifest, which it reads piece by
piece; it lies below --data.cache. Its name is made of the manifest's place, size and time, and of the settings that
choose clips, so the index of another manifest is never used. Where no file can be written, and for a manifest whose
rows are in memory already, it is made in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vmoco import storage
from vmoco.clip_settings import DataSettings
from vmoco.data.manifest import NAME, Manifest
from vmoco.data.training_clips import Selection
from vmoco.seed import UInt64Array, hash64

CLIP = np.dtype(
    [
        ("clip_id", "<u8"),
        ("sha256", "V32"),
        ("offset", "<i8"),
        ("num_bytes", "<u4"),
        ("shard", "<u4"),
        ("place_in_shot", "<u4"),
        ("num_of_shot", "<u4"),
    ]
)
VIDEO = np.dtype([("first_clip", "<i8"), ("name", "<i8")])
SHARD = np.dtype("S64")
_FILES = {"clips": CLIP, "videos": VIDEO, "shards": SHARD}
_COLUMNS = ["clip_id", "video_id", "sha256", "shard", "offset", "num_bytes", "cuts", "shot"]
_VERSION = 3
_KEPT = 8
"""Indexes that stay on a node: those that were opened last."""
_ABOUT = "about.json"
_WITHOUT_SHOTS = "without_shots"
"""In this file, beside the sizes of the others."""
_AT_ONCE = 2**20
"""Clips whose shots are counted at once."""
_UNKNOWN = 2**32 - 1
"""A shot that nobody knows, while the index is made."""

Records = npt.NDArray[Any]


class ClipIndex:
    """The clips that training takes, numbered in the order of the manifest.

    Args:
        clips: CLIP (N,).
        videos: VIDEO (V + 1,).
        shards: SHARD (number of shards,).

    Attributes:
        first_clip: int64 (V + 1,), first clip of each video, and N.
        video_names: int64 (V + 1,), a hash of each video's name, and 0. It is not an index, so that a key still names
            its video when the data set grows between two runs.
        clip_ids: uint64 (N,).
        place_in_shot: uint32 (N,), number of clips of its shot before each clip. A clip that crosses a cut shows two
            shots, so it is a shot of its own. A video is one shot where that of one of its clips is not known.
        num_of_shot: uint32 (N,), number of clips of its shot.
        num_without_shots: number of videos of several clips whose shots are not known.
    """

    def __init__(self, clips: Records, videos: Records, shards: Records, *, num_without_shots: int = 0) -> None:
        # As plain arrays: an item of a memmap takes several times as long.
        clips, videos, self._shards = (np.asarray(each).view(np.ndarray) for each in (clips, videos, shards))
        self._sha256, self._offset, self._num_bytes = clips["sha256"], clips["offset"], clips["num_bytes"]
        self._shard_of = clips["shard"]
        self.first_clip: npt.NDArray[np.int64] = videos["first_clip"]
        self.video_names: npt.NDArray[np.int64] = videos["name"]
        self.clip_ids: UInt64Array = clips["clip_id"]
        self.place_in_shot: npt.NDArray[np.uint32] = clips["place_in_shot"]
        self.num_of_shot: npt.NDArray[np.uint32] = clips["num_of_shot"]
        self.num_without_shots = num_without_shots

    @property
    def num_clips(self) -> int:
        return len(self.clip_ids)

    @property
    def num_videos(self) -> int:
        return len(self.first_clip) - 1

    def clip_id(self, clip: int) -> str:
        """Its name in the manifest."""
        return f"{int(self.clip_ids[clip]):016x}"

    def sha256(self, clip: int) -> str:
        """Hash of its stored bytes."""
        return bytes(self._sha256[clip]).hex()

    def extent(self, clip: int) -> tuple[int, int]:
        """First byte in its shard, and number of bytes."""
        return int(self._offset[clip]), int(self._num_bytes[clip])

    def shard(self, clip: int) -> int:
        """Number of its shard."""
        return int(self._shard_of[clip])

    def shard_name(self, shard: int) -> str:
        """Name of a shard, by its number."""
        name: str = self._shards[shard].decode()
        return name

    @classmethod
    def of(cls, manifest: Manifest, data: DataSettings, *, others: Sequence[Manifest] = ()) -> ClipIndex:
        """The index of what training takes of a data set; `others` are further data sets of the run.

        Raises:
            ValueError: as `Selection` and `Selection.check`.
        """
        if not manifest.is_read:
            folder = Path(data.cache or storage.join(storage.home(), "cache")).expanduser() / "indexes"
            with contextlib.suppress(OSError):  # a full disk, or a folder that is not ours
                return _mapped(manifest, Selection(manifest, data, others), folder)
        files = {name: io.BytesIO() for name in _FILES}
        _write(manifest, Selection(manifest, data, others), files)
        made = {name: np.frombuffer(files[name].getbuffer(), dtype) for name, dtype in _FILES.items()}
        return cls(**made, num_without_shots=_count_shots(made["clips"], made["videos"]["first_clip"]))


def _mapped(manifest: Manifest, selection: Selection, folder: Path) -> ClipIndex:
    """The index in its files, which are made if they are not there.

    Raises:
        OSError: the folder cannot be used.
        ValueError: as `Selection` and `Selection.check`.
    """
    filesystem, path = storage.filesystem(storage.join(manifest.uri, NAME))
    info = filesystem.get_file_info(path)
    named = [_VERSION, manifest.uri, manifest.hash, info.size, info.mtime_ns, selection.name]
    place = folder / hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]
    found = _open(place)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks of this node wait for the first one
        found = _open(place)
        if found is None:
            for left in (*folder.glob(".*.tmp"), place):  # of a process that was killed; damaged
                shutil.rmtree(left, ignore_errors=True)
            _make(manifest, selection, folder / f".{uuid.uuid4().hex}.tmp", place)
            found = _open(place)
            for old in sorted(folder.glob("?" * 32), key=lambda each: each.stat().st_mtime)[:-_KEPT]:
                shutil.rmtree(old, ignore_errors=True)  # whoever has mapped it keeps it
    if found is None:
        raise OSError(f"{place} is not there after it was made")
    return found


def _make(manifest: Manifest, selection: Selection, temporary: Path, place: Path) -> None:
    temporary.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(temporary / name, "wb")) for name in _FILES}
            _write(manifest, selection, files)
            about = {name: file.tell() for name, file in files.items()} | {_WITHOUT_SHOTS: 0}
        if about["clips"]:
            made = {name: np.memmap(temporary / name, dtype, mode="r+") for name, dtype in list(_FILES.items())[:2]}
            about[_WITHOUT_SHOTS] = _count_shots(made["clips"], made["videos"]["first_clip"])
            made["clips"].flush()
        for name in _FILES:
            with open(temporary / name, "rb+") as file:
                os.fsync(file.fileno())
        (temporary / _ABOUT).write_text(json.dumps(about))
        os.rename(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(place: Path) -> ClipIndex | None:
    """The index of a folder; None if there is none that is complete."""
    try:
        about = json.loads((place / _ABOUT).read_text())
        num_without_shots = int(about[_WITHOUT_SHOTS])
        if any((place / name).stat().st_size != about[name] for name in _FILES):
            return None
        os.utime(place)  # used just now, so it is removed late
        files = {
            name: np.memmap(place / name, dtype, mode="r") if about[name] else np.empty(0, dtype)
            for name, dtype in _FILES.items()
        }
    except (OSError, ValueError, KeyError):
        return None
    return ClipIndex(**files, num_without_shots=num_without_shots)


def _write(manifest: Manifest, selection: Selection, files: Mapping[str, BinaryIO]) -> None:
    """Writes the records: `place_in_shot` is the number of the shot, and `num_of_shot` that of cuts."""
    numbers: dict[str, int] = {}
    count, last = 0, None
    for piece in _chosen(manifest, selection):
        names = piece["video_id"].combine_chunks().dictionary_encode()
        videos = names.indices.to_numpy()
        begins = np.flatnonzero(np.diff(videos, prepend=-1))
        started = names.dictionary.take(pa.array(videos[begins])).to_pylist()
        if started[0] == last:  # it began in the piece before
            begins, started = begins[1:], started[1:]
        last = names.dictionary[int(videos[-1])].as_py()
        heads = np.empty(len(begins), VIDEO)
        heads["first_clip"] = count + begins
        heads["name"] = np.array([hash64("video", name) for name in started], np.uint64).view(np.int64)
        files["videos"].write(heads.tobytes())

        shards = piece["shard"].combine_chunks().dictionary_encode()
        own = np.array([numbers.setdefault(name, len(numbers)) for name in shards.dictionary.to_pylist()], np.uint32)
        largest = pc.max(piece["num_bytes"]).as_py()
        if largest >= 2**32:
            raise ValueError(
                f"a clip of {manifest.uri} has {largest} bytes, and 4 GiB is too much: ingest shorter clips"
            )
        records = np.empty(piece.num_rows, CLIP)
        records["clip_id"] = _from_hex(piece["clip_id"], ">u8")
        records["sha256"] = _from_hex(piece["sha256"], "V32")
        for name in ("offset", "num_bytes"):
            records[name] = piece[name].to_numpy()
        records["shard"] = own[shards.indices.to_numpy()]
        records["place_in_shot"] = piece["shot"].fill_null(-1).to_numpy().astype(np.int32).view(np.uint32)
        records["num_of_shot"] = piece["cuts"].fill_null(0).to_numpy()
        files["clips"].write(records.tobytes())
        count += piece.num_rows
    files["videos"].write(np.array([(count, 0)], VIDEO).tobytes())
    files["shards"].write(np.array([name.encode() for name in numbers], SHARD).tobytes())


def _from_hex(texts: pa.ChunkedArray, dtype: str) -> Records:
    return np.frombuffer(bytes.fromhex("".join(texts.to_pylist())), dtype)


def _chosen(manifest: Manifest, selection: Selection) -> Iterator[pa.Table]:
    """The rows of the clips that are taken, in pieces; no piece is empty."""
    for piece in manifest.batches(list(dict.fromkeys([*_COLUMNS, *selection.columns]))):
        taken = piece.filter(pa.array(selection.keep(piece)))
        if taken.num_rows:
            yield taken
    selection.check()


def _count_shots(clips: Records, first_clip: npt.NDArray[np.int64]) -> int:
    """Makes the number of the shot of each clip, and that of its cuts, its place in the shot and the shot's length.

    Returns:
        How many videos of several clips are one shot, because that of a clip is not known.
    """
    without = 0
    for begin, end, heads in _whole_videos(first_clip):
        own, firsts = clips[begin:end], heads - begin
        lengths = np.diff(firsts, append=len(own))
        unknown = np.logical_or.reduceat(own["place_in_shot"] == _UNKNOWN, firsts)
        without += int((unknown & (lengths > 1)).sum())
        known, crosses = np.repeat(~unknown, lengths), own["num_of_shot"] > 0
        begins = crosses & known
        begins[1:] |= ((own["place_in_shot"][1:] != own["place_in_shot"][:-1]) | crosses[:-1]) & known[1:]
        begins[firsts] = True
        starts, shot = np.flatnonzero(begins), np.cumsum(begins) - 1
        own["place_in_shot"] = np.arange(len(own)) - starts[shot]
        own["num_of_shot"] = np.diff(starts, append=len(own))[shot]
    return without


def _whole_videos(first_clip: npt.NDArray[np.int64]) -> Iterable[tuple[int, int, npt.NDArray[np.int64]]]:
    """Pieces of about _AT_ONCE clips that cut no video: their first clip, the clip after, first clip of each video."""
    at, last = 0, len(first_clip) - 1
    while at < last:
        until = int(np.searchsorted(first_clip, first_clip[at] + _AT_ONCE, side="right")) - 1
        until = min(max(until, at + 1), last)
        yield int(first_clip[at]), int(first_clip[until]), np.asarray(first_clip[at:until])
        at = until
