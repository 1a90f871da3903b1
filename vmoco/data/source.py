"""The video files of a folder, a URI prefix or a pattern: lists them, and gives a decoder one video.

The name of a video is its path below the root, so a data set does not change when the root moves. Each real folder is
listed once, however many links lead to it, so a loop of links ends.

A remote video is copied to a temporary file, in pieces, so memory does not depend on its size, and a slow store does
not use up the decoder's time limit. Ingest copies it for probing. Then, where only some runs of frames are decoded,
their ranges are read instead of a second copy. Embedding copies it once and decodes the copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import itertools
import os
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import pyarrow.fs as pafs

from vmoco import storage
from vmoco.data.endings import Wanted, begins_as_a_video, left_out
from vmoco.data.found import Found, Pictures
from vmoco.data.gathered import gather
from vmoco.data.ledger import Rejection, ScratchError, VideoError
from vmoco.data.ranged_file import FileRange, RangedFile, read_errors

_PIECE_BYTES = 2**22
_SNIFF_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Listing:
    """The videos of a folder."""

    videos: Collection[Found]
    """Sorted by video_id."""
    rejected: Collection[Rejection]
    """Files with a video's extension, and folders, that cannot be read; what a list names and is not there.

    Many videos, and many of these, are on disk (`gathered.gather`).
    """
    num_hidden: int
    """Number of videos that are skipped because their name, or a folder's, starts with a dot."""
    others: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Numbers of files that are not looked at, by ending; hidden ones are not counted."""

    @property
    def left_out(self) -> str:
        """What is not looked at, such as `3 files are not looked at: .txt 2, without ending 1`; empty for nothing."""
        return left_out(self.others)

    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """Sentences for the user: how a list was read, and which of its names are not exactly those of the files."""
    root: str = dataclasses.field(default="", compare=False)
    """Folder or URI prefix below which the paths are."""
    tars: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """Paths of tar files among the others."""
    picture_folders: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """Paths of folders with numbered pictures among the others."""


def list_videos(uri: str, suffixes: Sequence[str] = ()) -> Listing:
    """Lists the videos below a folder or URI prefix, or those that match a pattern such as `/data/*/part-?.mp4`.

    Args:
        uri: Folder, prefix or pattern.
        suffixes: More endings of videos than EXTENSIONS, such as `.mod`.

    Raises:
        ValueError: the folder cannot be read, or it holds no video; a suffix is not an ending.
    """
    listing = find_videos(uri, suffixes)
    if not listing.videos and not listing.rejected:
        root, pattern = split_pattern(uri)
        hidden = f" ({listing.num_hidden} hidden ones are skipped)" if listing.num_hidden else ""
        where = f"that match {pattern} " if pattern else ""
        others = f"; {listing.left_out}" if listing.left_out else ""
        looked_for = " ".join(sorted(Wanted(suffixes).endings))
        raise ValueError(
            f"no videos {where}found in {root}{hidden}: looked for {looked_for} in it and its folders{others}"
        )
    return listing


def find_videos(uri: str, suffixes: Sequence[str] = ()) -> Listing:
    """As `list_videos`, but there may be none.

    Raises:
        ValueError: the folder cannot be read; a suffix is not an ending.
    """
    root, pattern = split_pattern(uri)
    wanted = Wanted(suffixes, chosen=lambda name: not pattern or matches(name, pattern))
    local = storage.local_path(root)
    listing = _list_remote(root, wanted) if local is None else _list_local(str(local), wanted)
    rejected = tuple(row for row in listing.rejected if not pattern or matches(row.video_id, pattern))
    tars, folders = tuple(sorted(wanted.tars)), tuple(sorted(wanted.picture_folders))
    return dataclasses.replace(listing, rejected=rejected, root=root, tars=tars, picture_folders=folders)


def split_pattern(uri: str) -> tuple[str, str]:
    """The folder of a pattern, and the pattern below it; the pattern is empty if `uri` is a folder."""
    parts = (str(storage.local_path(uri)) if uri.startswith("file://") else uri).split("/")
    for number, part in enumerate(parts):
        # The name of a folder may be `[old]`.
        if any(sign in part for sign in "*?[") and kind_of("/".join(parts[: number + 1])) != pafs.FileType.Directory:
            return "/".join(parts[:number]) or "/", "/".join(parts[number:])
    return uri, ""


def kind_of(uri: str) -> pafs.FileType | None:
    """Whether a file or a folder has that name; None where it cannot be asked, which listing explains."""
    filesystem, path = storage.filesystem(uri)
    try:
        return filesystem.get_file_info(path).type
    except OSError:
        return None


def matches(path: str, pattern: str) -> bool:
    """Whether a path matches a pattern, part by part; `**` stands for any number of folders."""
    return _match(path.split("/"), pattern.split("/"))


def _match(parts: list[str], patterns: list[str]) -> bool:
    if not patterns or not parts:
        return not parts and all(pattern == "**" for pattern in patterns)
    if patterns[0] == "**":
        return _match(parts, patterns[1:]) or _match(parts[1:], patterns)
    return fnmatch.fnmatchcase(parts[0], patterns[0]) and _match(parts[1:], patterns[1:])


def _list_remote(uri: str, wanted: Wanted) -> Listing:
    rejected: list[Rejection] = []
    num_hidden = 0

    def walk() -> Iterator[Found]:
        nonlocal num_hidden
        doubtful: list[Found] = []
        for name, entry in remote_files(uri):
            if {"", ".", ".."} & set(name.split("/")):
                if wanted.takes(name):
                    message = "a part of its name is empty, . or .., which is no path: rename the object"
                    rejected.append(rejection(name, "name-not-a-path", message))
            elif any(part.startswith(".") for part in name.split("/")):
                num_hidden += wanted.is_video(name)
            elif wanted.takes(name):
                if wanted.is_doubtful(name):
                    doubtful.append(Found(name, entry.size))
                else:
                    yield Found(name, entry.size)
        with ThreadPoolExecutor(_SNIFF_THREADS) as pool:  # each waits for the store
            begin = pool.map(lambda found: begins_as_a_video(storage.join(uri, found.path)), doubtful)
            for found, good in zip(doubtful, begin, strict=True):
                if good:
                    yield found
                else:
                    wanted.reject(found.path)

    videos = gather(walk())
    return Listing(videos, tuple(rejected), num_hidden, wanted.others)


MAX_FOLDERS = 1000
"""Most folders of a bucket that are listed one after the other."""


def remote_files(uri: str) -> Iterator[tuple[str, pafs.FileInfo]]:
    """The files below a URI prefix, each with its path below it.

    A store answers with all names at once, 260 bytes each. So its folders are listed one after the other, unless there
    are more than MAX_FOLDERS of them: each is a request.

    Raises:
        ValueError: the store cannot list them; raised when the first file is asked for, or a later one.
    """
    filesystem, path = storage.filesystem(uri)
    root = path.rstrip("/")

    def listed(folder: str, *, recursive: bool) -> list[pafs.FileInfo]:
        try:
            found = pafs.FileSelector(folder, recursive=recursive)
            entries: list[pafs.FileInfo] = storage.patiently(lambda: filesystem.get_file_info(found))
        except OSError as error:
            raise ValueError(f"{uri} cannot be listed ({error}): check the address and its permissions") from error
        return entries

    top = listed(root, recursive=False)
    folders = [entry.path for entry in top if entry.type == pafs.FileType.Directory]
    strange = any(folder[len(root) + 1 :] in ("", ".", "..") for folder in folders)  # it would be taken for another one
    if strange or len(folders) > MAX_FOLDERS:
        top, folders = listed(root, recursive=True), []
    for entries in itertools.chain([top], (listed(folder, recursive=True) for folder in folders)):
        yield from ((entry.path[len(root) + 1 :], entry) for entry in entries if entry.type == pafs.FileType.File)


def local_folders(root: str, rejected: list[Rejection]) -> Iterator[tuple[str, list[str]]]:
    """A folder and all folders below it that are not hidden, each with the names of its files.

    A folder that cannot be read goes into `rejected`.

    Raises:
        ValueError: the root cannot be read.
    """
    if not os.path.isdir(root):
        raise ValueError(f"{root} is not a folder that can be read: check the path and its permissions")
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        name = os.path.relpath(error.filename, root)
        rejected.append(rejection(name, "unreadable-folder", error.strerror or "", transient=True))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        try:
            status = os.stat(folder)
        except OSError as error:  # it was removed just now
            subfolders.clear()
            unreadable(error)
            continue
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, sorted(names)


def _list_local(root: str, wanted: Wanted) -> Listing:
    rejected: list[Rejection] = []
    num_hidden = 0

    def walk() -> Iterator[Found]:
        nonlocal num_hidden
        for folder, names in local_folders(root, rejected):
            num_hidden += sum(wanted.is_video(name) for name in names if name.startswith("."))
            for name in names:
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, root).replace(os.sep, "/")
                if name.startswith(".") or not wanted.takes(relative):
                    continue
                found = _found(path, relative)
                if isinstance(found, Rejection):
                    rejected.append(found)
                elif wanted.is_doubtful(name) and not begins_as_a_video(path):
                    wanted.reject(name)
                else:
                    yield found

    videos = gather(walk())
    return Listing(videos, tuple(rejected), num_hidden, wanted.others)


def _found(path: str, name: str) -> Found | Rejection:
    try:
        name.encode()
    except UnicodeEncodeError:
        return rejection(name, "name-not-utf8", "the name of the file is not valid UTF-8: rename it")
    try:
        status = os.stat(path)
    except OSError as error:
        return rejection(name, "dangling-link" if os.path.islink(path) else "missing", error.strerror or "")
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait forever
        return rejection(name, "not-a-file", "a FIFO, socket, device or folder")
    return Found(name, status.st_size)


def rejection(name: str, reason: str, message: str, *, transient: bool = True) -> Rejection:
    """The ledger row of what is listed, but cannot be a video; its name may be any bytes."""
    printable = os.fsencode(name).decode("utf-8", "backslashreplace")
    return Rejection(video_id=printable, stage="list", reason=reason, message=message, transient=transient)


@dataclasses.dataclass(frozen=True)
class PictureFolder:
    """A folder whose pictures are the frames of a video."""

    uri: str
    pictures: Pictures
    num_bytes: int
    """Size of all of them when they were listed."""


Source = str | FileRange | PictureFolder
"""Where a decoder reads a video: the path of a file on this machine, a range of a file, or a folder of pictures."""


@contextlib.contextmanager
def fetched(root: str, found: Found) -> Iterator[Source]:
    """A video that a decoder can read several times; a remote file is copied and deleted at the end of the block.

    Raises:
        VideoError: it cannot be read, is empty, or has changed since it was listed.
        ScratchError: the copy cannot be written.
    """
    if found.pictures:
        yield ranged(root, found)
    elif found.member and (local := storage.local_path(root)) is not None:
        with read_errors():
            end = found.member.offset + found.num_bytes
            if (size := os.stat(local / found.member.tar).st_size) < end:
                message = f"it ended at byte {end} of its tar file, which has {size} bytes now"
                raise VideoError("read", "changed", message, transient=True)
        if not found.num_bytes:
            raise VideoError("read", "empty", "the file has no bytes")
        yield ranged(root, found)
    else:
        with local_copy(root, found) as path:
            yield path


@contextlib.contextmanager
def local_copy(root: str, found: Found) -> Iterator[str]:
    """Path of the video on this machine; a remote one is copied and deleted at the end of the block.

    Raises:
        VideoError: it cannot be read, is empty, or has changed since it was listed.
        ScratchError: the copy cannot be written.
    """
    place = storage.join(root, found.member.tar if found.member else found.path)
    local = storage.local_path(root)
    with contextlib.ExitStack() as stack:
        with read_errors():
            if local is not None:
                path = str(local / found.path)
                size = os.stat(path).st_size
            else:
                suffix = os.path.splitext(found.path)[1]
                with _scratch_errors():
                    copy: Any = stack.enter_context(tempfile.NamedTemporaryFile(prefix="vmoco-video-", suffix=suffix))
                path, size = copy.name, _copy(place, copy, found)
        if not size:
            raise VideoError("read", "empty", "the file has no bytes")
        if size != found.num_bytes:
            message = f"{found.num_bytes} bytes when it was listed, {size} when it was read"
            raise VideoError("read", "changed", message, transient=True)
        yield path


def file_sha256(file: str | FileRange) -> str:
    """Hash of a local file, or of a range of a file.

    Raises:
        VideoError: it cannot be read.
    """
    if isinstance(file, FileRange):
        digest, opened = hashlib.sha256(), RangedFile.of(file)
        while piece := opened.read(_PIECE_BYTES):
            digest.update(piece)
        return digest.hexdigest()
    with read_errors(), open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def ranged(root: str, found: Found) -> Source:
    """A source of which no more is read than the decoder asks for."""
    if found.pictures:
        return PictureFolder(storage.join(root, found.path), found.pictures, found.num_bytes)
    if found.member:
        return FileRange(storage.join(root, found.member.tar), found.num_bytes, found.member.offset, found.path)
    local = storage.local_path(root)
    if local is not None:
        return str(local / found.path)
    return FileRange(storage.join(root, found.path), found.num_bytes)


def readable(source: str | FileRange) -> str | BinaryIO:
    """What PyAV opens: the path, or a file that reads a range of one."""
    return source if isinstance(source, str) else RangedFile.of(source)  # type: ignore[return-value]


def _copy(place: str, target: BinaryIO, found: Found) -> int:
    """Copies a file, or that range of a tar file; returns its size."""
    filesystem, path = storage.filesystem(place)

    def pieces() -> Iterator[bytes]:
        if found.member:
            file = RangedFile(place, num_bytes=found.num_bytes, offset=found.member.offset)
            yield from iter(lambda: file.read(_PIECE_BYTES), b"")
            return
        with filesystem.open_input_stream(path) as stream:
            yield from iter(lambda: stream.read(_PIECE_BYTES), b"")

    def copy() -> int:
        with _scratch_errors():
            target.seek(0)
            target.truncate()
        for piece in pieces():
            with _scratch_errors():
                target.write(piece)
        with _scratch_errors():
            target.flush()
        return target.tell()

    return storage.patiently(copy)


@contextlib.contextmanager
def _scratch_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = tempfile.gettempdir()
        raise ScratchError(
            f"cannot copy a video to {folder}: {error.strerror or error}; free space there, or set TMPDIR"
        ) from error
