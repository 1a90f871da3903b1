"""Where the videos come from: lists a folder or URI prefix, and reads one video of it.

A video is named by its path below the root, so a data set does not change when the root moves. Every real folder is
listed once, however many links lead to it, so a loop of links ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat

import pyarrow.fs as pafs

from vmoco import storage
from vmoco.data.ledger import Rejection
from vmoco.data.video import InMemory, VideoError

# fmt: off
EXTENSIONS = (
    ".3gp", ".asf", ".avi", ".flv", ".gif", ".ivf", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".nut", ".ogv", ".ts", ".vob", ".webm", ".wmv",
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Found:
    """A file with a video's extension."""

    video_id: str
    """Path below the root, with slashes."""
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a folder holds."""

    videos: tuple[Found, ...]
    """Sorted by video_id."""
    rejected: tuple[Rejection, ...]
    """Names with a video's extension that are no readable file, and folders that cannot be read."""
    num_hidden: int
    """Videos left out because their name, or a folder's, starts with a dot."""


def list_videos(uri: str) -> Listing:
    """Lists the videos below a folder or URI prefix.

    Raises:
        ValueError: the folder cannot be read, or there is no video in it.
    """
    local = storage.local_path(uri)
    listing = _list_remote(uri) if local is None else _list_local(str(local))
    if not listing.videos and not listing.rejected:
        hidden = f" ({listing.num_hidden} hidden ones are left out)" if listing.num_hidden else ""
        raise ValueError(f"no videos found in {uri}{hidden}: looked for {' '.join(EXTENSIONS)} in it and its folders")
    return listing


@dataclasses.dataclass(frozen=True)
class Content:
    """A video ready to be decoded."""

    source: str | InMemory
    """Path on this machine, or the content in memory."""
    num_bytes: int
    sha256: str


def read_video(uri: str, found: Found) -> Content:
    """Reads a video once, for its hash; a remote one is kept in memory.

    Raises:
        VideoError: it cannot be read, is empty, or is not what was listed.
    """
    place = storage.join(uri, found.video_id)
    local = storage.local_path(uri)
    try:
        if local is None:
            content = storage.read_bytes(place)
            read = Content(InMemory(content, found.video_id), len(content), hashlib.sha256(content).hexdigest())
        else:
            path = str(local / found.video_id)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                read = Content(path, file.tell(), digest)
    except FileNotFoundError:
        raise VideoError("read", "missing", "it was listed, but is gone", transient=True) from None
    except PermissionError:
        raise VideoError("read", "no-permission", "its rights do not allow reading it", transient=True) from None
    except OSError as error:
        raise VideoError("read", "read-error", error.strerror or type(error).__name__, transient=True) from None
    if not read.num_bytes:
        raise VideoError("read", "empty", "the file has no bytes")
    if read.num_bytes != found.num_bytes:
        said = f"{found.num_bytes} bytes when it was listed, {read.num_bytes} when it was read"
        raise VideoError("read", "changed", said, transient=True)
    return read


def _is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _list_remote(uri: str) -> Listing:
    filesystem, path = storage.filesystem(uri)
    root = path.rstrip("/")
    try:
        entries = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except OSError as error:
        raise ValueError(f"{uri} cannot be listed ({error}): check the address, or the rights to it") from error
    videos, num_hidden = [], 0
    for entry in entries:
        name = entry.path[len(root) :].lstrip("/")
        if entry.type != pafs.FileType.File or not _is_video(name):
            continue
        if any(part.startswith(".") for part in name.split("/")):
            num_hidden += 1
        else:
            videos.append(Found(name, entry.size))
    return Listing(tuple(sorted(videos, key=lambda found: found.video_id)), (), num_hidden)


def _list_local(root: str) -> Listing:
    if not os.path.isdir(root):
        raise ValueError(f"{root} is not a folder that can be read: check the path, or the rights to it")
    videos: list[Found] = []
    rejected: list[Rejection] = []
    num_hidden = 0
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        name = os.path.relpath(error.filename, root)
        rejected.append(_rejection(name, "unreadable-folder", error.strerror or "", transient=True))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        num_hidden += sum(_is_video(name) for name in names if name.startswith("."))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and _is_video(name):
                path = os.path.join(folder, name)
                found = _look_at(path, os.path.relpath(path, root).replace(os.sep, "/"))
                (videos if isinstance(found, Found) else rejected).append(found)  # type: ignore[arg-type]
    return Listing(tuple(sorted(videos, key=lambda found: found.video_id)), tuple(rejected), num_hidden)


def _look_at(path: str, name: str) -> Found | Rejection:
    try:
        name.encode()
    except UnicodeEncodeError:
        return _rejection(name, "name-not-utf8", "the name of the file is not valid UTF-8: rename it")
    try:
        about = os.stat(path)
    except OSError as error:
        return _rejection(name, "dangling-link" if os.path.islink(path) else "missing", error.strerror or "")
    if not stat.S_ISREG(about.st_mode):  # opening a FIFO would wait for ever
        return _rejection(name, "not-a-file", "a FIFO, socket, device or folder")
    return Found(name, about.st_size)


def _rejection(name: str, reason: str, message: str, *, transient: bool = True) -> Rejection:
    printable = os.fsencode(name).decode("utf-8", "backslashreplace")
    return Rejection(video_id=printable, stage="list", reason=reason, message=message, transient=transient)
