"""What `--videos` names: video files, tar files of videos, or folders of numbered pictures.

A folder that holds a video file is one of video files, as it always was; its tar files and pictures are left out and
counted. Without any, tar files or pictures are taken if there is one kind of them, and the user is told.
"""

from __future__ import annotations

import dataclasses
import itertools
import posixpath
from collections.abc import Sequence
from typing import Literal

import pyarrow.fs as pafs

from vmoco import storage
from vmoco.data.endings import is_tar
from vmoco.data.found import Found
from vmoco.data.frame_folder import list_frame_folders
from vmoco.data.gathered import gather
from vmoco.data.source import Listing, find_videos, kind_of, list_videos
from vmoco.data.tar_files import how_to_uncompress, is_compressed, list_tars

Footage = Literal["auto", "files", "tar", "frames"]

_SPLITS = {"train", "training", "val", "valid", "validate", "validation", "test", "testing"}
"""Names of folders that are no classes."""


def list_footage(
    uri: str, footage: Footage = "auto", *, fps: float | None = None, suffixes: Sequence[str] = ()
) -> Listing:
    """Lists the videos that a folder, prefix, pattern or tar file holds.

    Args:
        uri: What `--videos` names.
        footage: What is in it; `auto` finds out.
        fps: Pictures per second of folders of pictures.
        suffixes: More endings of videos.

    Returns:
        What is there, with a note for the user where it is no video files.

    Raises:
        ValueError: it cannot be read or holds no video, it is not clear which kind it is, or a rate is missing.
    """
    if is_tar(uri) and footage in ("auto", "tar") and kind_of(uri) == pafs.FileType.File:
        root, _, name = uri.rpartition("/")
        return _tars(root or "/", [name], uri, suffixes)
    if footage == "frames":
        return _frames(uri, fps)
    there = find_videos(uri, suffixes)
    if footage == "tar":
        if not there.tars:
            raise ValueError(f"--layout tar: no .tar files found in {uri} and its folders; {_instead(there)}")
        return _tars(there.root, there.tars, uri, suffixes)
    if footage == "files" or there.videos or there.rejected:
        return there if there.videos or there.rejected else list_videos(uri, suffixes)
    if there.tars and there.picture_folders:
        raise ValueError(
            f"{uri} holds no video files, but {len(there.tars)} tar files and {len(there.picture_folders)} folders of "
            "numbered pictures: give --layout tar, or --layout frames and --fps"
        )
    if there.tars:
        return _tars(there.root, there.tars, uri, suffixes)
    if there.picture_folders:
        return _frames(uri, fps)
    return list_videos(uri, suffixes)


def _instead(there: Listing) -> str:
    """What a place holds where it does not hold what --layout names."""
    if not there.videos:
        return there.left_out or "it is empty"
    files = "1 video file" if len(there.videos) == 1 else f"{len(there.videos)} video files"
    return f"it holds {files}: leave out --layout to read them"


def _tars(root: str, tars: Sequence[str], uri: str, suffixes: Sequence[str]) -> Listing:
    if all(map(is_compressed, tars)):
        raise ValueError(f"{storage.join(root, tars[0])} cannot be read: {how_to_uncompress(tars[0])}")
    found = list_tars(root, tars, suffixes)
    if not found.videos:
        why = "; ".join(
            [*(f"{row.video_id}: {row.message}" for row in itertools.islice(found.rejected, 3)), found.left_out]
        )
        raise ValueError(f"no videos found in the {len(tars)} tar files of {uri}: {why or 'they are empty'}")
    number = f"{len(tars)} tar files" if len(tars) > 1 else "1 tar file"
    said = f"{uri} is read as --layout tar: {number} with {len(found.videos)} videos"
    return dataclasses.replace(found, notes=(said, *found.notes))


def _frames(uri: str, fps: float | None) -> Listing:
    if fps is None:
        raise ValueError(
            f"{uri} holds no video files, but folders of numbered pictures: give --layout frames and --fps, the number "
            "of pictures per second, for example --fps 25"
        )
    found = list_frame_folders(uri, fps)
    if not found.videos and not found.rejected:
        raise ValueError(
            f"--layout frames: no folders of numbered pictures (such as frame_000001.jpg, 1.png) found in {uri}; "
            f"{_instead(find_videos(uri))}"
        )
    said = f"{uri} is read as --layout frames: {len(found.videos)} folders of pictures, {fps:g} pictures per second"
    return dataclasses.replace(found, notes=(said, *found.notes))


def labelled_by_folder(listing: Listing) -> Listing:
    """Videos of tar files or of pictures with the names of their folders as labels, where there are several names.

    Not where a file beside a video has its label, and not where folders are named after splits.
    """
    videos = listing.videos
    one = next(iter(videos), None)
    if one is None or not (one.member or one.pictures):  # a listing is of one kind
        return listing
    if any(found.label is not None for found in videos):
        return dataclasses.replace(listing, notes=(*listing.notes, "labels are those of the files beside the videos"))
    names = {_folder(found) for found in videos}
    if len(names) < 2 or "" in names or {name.lower() for name in names} & _SPLITS:
        return listing
    note = f"labels are the names of the folders: {len(names)}, such as {min(names)!r}"
    labelled = gather(dataclasses.replace(found, label=_folder(found)) for found in videos)
    return dataclasses.replace(listing, videos=labelled, notes=(*listing.notes, note))


def _folder(found: Found) -> str:
    """Name of the folder in which a video is."""
    return posixpath.basename(posixpath.dirname(_own_path(found)))


def _own_path(found: Found) -> str:
    """The path of a video, in its tar file if it is in one."""
    return found.path.removeprefix(f"{found.member.tar}/") if found.member else found.path
