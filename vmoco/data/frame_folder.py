"""Folders of numbered pictures: each is a video whose frames are the pictures, in the order of their numbers.

    run/clip7/frame_000001.jpg  frame_000002.jpg  frame_000004.jpg      video `run/clip7`, of which frame 3 is missing

Names may have anything before the number, and any number of digits. If all numbers are multiples of 5, say, apart from
where they begin, then nothing is missing: the step is the greatest common divisor of their distances.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pyarrow.fs as pafs

from vmoco import storage
from vmoco.data.endings import NUMBERED_PICTURE, Wanted
from vmoco.data.found import Found, Pictures
from vmoco.data.ledger import Rejection, VideoError
from vmoco.data.ranged_file import read_errors
from vmoco.data.source import Listing, PictureFolder, local_folders, matches, rejection, remote_files, split_pattern

_THREADS = 8
_MOST_MISSING = 100
"""Missing frames for each picture that is there, at most: beyond that the numbers do not count frames."""
_KINDS: dict[str, Literal["jpeg", "png"]] = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png"}


@dataclasses.dataclass(frozen=True)
class Frames:
    """The pictures of a folder in the order of their numbers."""

    names: tuple[str | None, ...]
    """Name of each frame; None for one that is missing."""
    first: int
    """Number of the first one."""
    step: int
    """Distance of the numbers."""
    num_bytes: int
    """Size of all pictures."""

    @property
    def missing(self) -> str:
        """The missing frames, such as `3 of 20 pictures are missing: number 7, 11-12`; empty for none."""
        gaps = [place for place, name in enumerate(self.names) if name is None]
        if not gaps:
            return ""
        spans: list[list[int]] = []
        for place in gaps:
            if spans and place == spans[-1][1] + 1:
                spans[-1][1] = place
            else:
                spans.append([place, place])
        numbers = [[self.first + place * self.step for place in span] for span in spans]
        named = [str(low) if low == high else f"{low}-{high}" for low, high in numbers[:5]]
        more = f" and {len(spans) - 5} more gaps" if len(spans) > 5 else ""
        verb = "picture is" if len(gaps) == 1 else "pictures are"
        return f"{len(gaps)} of {len(self.names)} {verb} missing: number {', '.join(named)}{more}"


def in_order(pictures: Iterable[tuple[str, int]]) -> Frames:
    """Puts pictures of one prefix and kind in order.

    Args:
        pictures: Name and size of each; at least one.

    Raises:
        VideoError: two have one number, or most are missing.
    """
    named: dict[int, str] = {}
    num_bytes = 0
    for name, size in pictures:
        match = NUMBERED_PICTURE.fullmatch(name)
        assert match, name
        number = int(match["number"])
        if number in named:
            other, name = sorted([named[number], name])
            message = f"{other} and {name} have the same number: keep one of them"
            raise VideoError("list", "number-twice", message, transient=True)
        named[number] = name
        num_bytes += size
    numbers = sorted(named)
    step = math.gcd(*(later - number for number, later in itertools.pairwise(numbers))) or 1
    count = (numbers[-1] - numbers[0]) // step + 1
    if count > _MOST_MISSING * len(numbers):
        message = f"{len(numbers)} pictures with numbers from {numbers[0]} to {numbers[-1]}: most are missing"
        raise VideoError("list", "missing-pictures", message, transient=True)
    names = tuple(named.get(number) for number in range(numbers[0], numbers[-1] + 1, step))
    return Frames(names, numbers[0], step, num_bytes)


def list_frame_folders(uri: str, fps: float) -> Listing:
    """Lists the folders with numbered pictures below a folder or URI prefix, this one included.

    Args:
        uri: Folder or prefix; or a pattern of folders, or of pictures, such as `/data/**/img_*.jpg`, which chooses one
            of several sequences in a folder.
        fps: Pictures per second.

    Returns:
        What is there; the root is the folder above `uri` if that holds pictures itself.

    Raises:
        ValueError: the folder cannot be read.
    """
    root, pattern = split_pattern(uri)
    of_pictures = pattern.lower().endswith(tuple(f".{ending}" for ending in _KINDS))

    def chosen(folder: str, names: Iterable[str]) -> bool:
        paths = (posixpath.join(folder, name) for name in names) if of_pictures else (folder,)
        return not pattern or any(matches(path, pattern) for path in paths)

    wanted = Wanted()
    rejected: list[Rejection] = []
    videos: list[Found] = []
    num_hidden, of_root = 0, False
    local = storage.local_path(root)
    for folder, names, size_of in _remote(root) if local is None else _local(str(local), rejected):
        sequences = _sequences(name for name in names if name[:1] != ".")
        sequences = {key: own for key, own in sequences.items() if chosen(folder, own)}
        taken = set().union(*sequences.values())
        if taken:
            num_hidden += sum(name[:1] == "." and NUMBERED_PICTURE.fullmatch(name) is not None for name in names)
            of_root = of_root or not folder
            found = _found(folder, sequences, size_of, fps)
            (videos if isinstance(found, Found) else rejected).append(found)  # type: ignore[arg-type]
        if taken or chosen(folder, names):
            for name in names:
                if name not in taken and name[:1] != ".":
                    wanted.reject(name)
    if of_root:
        above, _, own_name = root.rstrip("/").rpartition("/")
        root = above or "/"
        videos = [
            dataclasses.replace(each, path=(path := _below(own_name, each.path)), video_id=path) for each in videos
        ]
        rejected = [dataclasses.replace(each, video_id=_below(own_name, each.video_id)) for each in rejected]
    ordered = sorted(videos, key=lambda found: found.video_id)
    return Listing(tuple(ordered), tuple(rejected), num_hidden, wanted.others, root=root)


def _below(folder: str, path: str) -> str:
    return folder if path in ("", ".") else f"{folder}/{path}"


_Key = tuple[str, Literal["jpeg", "png"]]
_Sequences = dict[_Key, list[str]]
"""Names of the numbered pictures of a folder, by what they have before the number and by kind."""
_SizeOf = Callable[[str], "int | None"]
"""Size of a file of a folder, by its name; None if it is no file."""


def _sequences(names: Iterable[str]) -> _Sequences:
    found: _Sequences = {}
    for name in names:
        if match := NUMBERED_PICTURE.fullmatch(name):
            found.setdefault((match["prefix"], _KINDS[match["ending"].lower()]), []).append(name)
    return found


def _found(folder: str, sequences: _Sequences, size_of: _SizeOf, fps: float) -> Found | Rejection:
    if len(sequences) > 1:
        shown = ", ".join(f"{own[0]} and {len(own) - 1} more" for own in list(sequences.values())[:4])
        message = (
            f"it holds {len(sequences)} sequences ({shown}), and a video has one: choose one with a pattern of "
            "pictures, such as --videos 'FOLDER/**/img_*.jpg'"
        )
        return rejection(folder, "several-sequences", message)
    (((prefix, kind), names),) = sequences.items()
    try:
        folder.encode()
        prefix.encode()
    except UnicodeEncodeError:
        return rejection(
            folder, "name-not-utf8", "the name of the folder or of its pictures is not valid UTF-8: rename it"
        )
    try:
        frames = in_order(_sized(names, size_of))
    except VideoError as error:
        return rejection(folder, error.reason, error.message)
    return Found(folder, frames.num_bytes, pictures=Pictures(fps, prefix, kind))


def _sized(names: Iterable[str], size_of: _SizeOf) -> list[tuple[str, int]]:
    return [(name, size) for name in names if (size := size_of(name)) is not None]


def _local(root: str, rejected: list[Rejection]) -> Iterator[tuple[str, list[str], _SizeOf]]:
    """Each folder below a local one: its path, the names of its files, and their sizes, asked for when needed."""
    for folder, names in local_folders(root, rejected):
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        yield ("" if relative == "." else relative), names, functools.partial(_local_size, folder)


def _local_size(folder: str, name: str) -> int | None:
    try:
        status = os.stat(os.path.join(folder, name))
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None  # opening a FIFO would wait forever


def _remote(root: str) -> Iterator[tuple[str, list[str], _SizeOf]]:
    """The same of a store."""
    folders: dict[str, dict[str, int]] = {}
    for path, entry in remote_files(root):
        folder, _, name = path.rpartition("/")
        if not {"", ".", ".."} & set(path.split("/")) and not any(part[:1] == "." for part in folder.split("/")):
            folders.setdefault(folder, {})[name] = entry.size
    for folder, sizes in sorted(folders.items()):
        yield folder, sorted(sizes), sizes.get


def frames_of(source: PictureFolder) -> Frames:
    """The pictures of a folder, listed again where they are read.

    Raises:
        VideoError: it cannot be read, or has changed since it was listed.
    """
    wanted = (source.pictures.prefix, source.pictures.kind)
    local = storage.local_path(source.uri)
    with read_errors():
        if local is None:
            filesystem, path = storage.filesystem(source.uri)
            entries = storage.patiently(lambda: filesystem.get_file_info(pafs.FileSelector(path)))
            sizes = {entry.base_name: entry.size for entry in entries if entry.type == pafs.FileType.File}
            names, size_of = list(sizes), sizes.get
        else:
            names, size_of = os.listdir(local), functools.partial(_local_size, str(local))
    pictures = _sized(_sequences(names).get(wanted, []), size_of)
    num_bytes = sum(size for _, size in pictures)
    if num_bytes != source.num_bytes:
        message = f"{source.num_bytes} bytes of pictures when it was listed, {num_bytes} when it was read"
        raise VideoError("read", "changed", message, transient=True)
    if not pictures:
        raise VideoError("read", "missing", "it was listed, but is gone", transient=True)
    return in_order(pictures)


def contents(source: PictureFolder, names: Sequence[str]) -> Iterator[bytes]:
    """The bytes of some pictures of a folder, one after the other; from a store a few are fetched at a time.

    Raises:
        VideoError: one cannot be read.
    """
    if storage.local_path(source.uri) is not None:
        yield from (_content(source, name) for name in names)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        for at in range(0, len(names), _THREADS):
            yield from pool.map(functools.partial(_content, source), names[at : at + _THREADS])


def _content(source: PictureFolder, name: str) -> bytes:
    with read_errors():
        return storage.read_bytes(storage.join(source.uri, name))


def sha256(source: PictureFolder) -> str:
    """Hash of the pictures and of their places; their names do not count.

    Raises:
        VideoError: one cannot be read, or they have changed since they were listed.
    """
    frames = frames_of(source)
    digest = hashlib.sha256()
    names = [name for name in frames.names if name is not None]
    there = contents(source, names)
    for name in frames.names:
        digest.update(b"missing" if name is None else hashlib.sha256(next(there)).digest())
    return digest.hexdigest()
