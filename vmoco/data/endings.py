"""Which files of a folder are videos, by their endings, and how many files of which endings are left out.

The films of a Video CD end in `.dat`, as files of many other programs do: one of these is a video only if it begins as
MPEG does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from vmoco import storage

# fmt: off
EXTENSIONS = (
    ".264", ".265", ".3g2", ".3gp", ".asf", ".avc", ".avi", ".dat", ".dav", ".divx", ".f4v", ".flv", ".gif", ".h264",
    ".h265", ".hevc", ".ivf", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg",
    ".mts", ".nut", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv",
)
# fmt: on
_VIDEO_CD = ".dat"
_MPEG_STARTS = (b"\0\0\1\xba", b"\0\0\1\xb3")
_SHOWN = 10
"""Most endings that a message names."""


class Wanted:
    """Which names are those of videos; counts the others.

    Args:
        suffixes: Endings of videos, besides EXTENSIONS; an empty one stands for names without an ending.
        chosen: Whether a path below the root is looked at.

    Raises:
        ValueError: a suffix is not an ending.
    """

    def __init__(self, suffixes: Sequence[str] = (), *, chosen: Callable[[str], bool] = lambda name: True) -> None:
        for suffix in suffixes:
            if "." in suffix[1:] or "/" in suffix:
                raise ValueError(
                    f"--suffixes {suffix!r} is not an ending: give one with at most one dot, at its start, such as .mod"
                )
        self._chosen = chosen
        self._added = {f".{suffix.lstrip('.').lower()}" if suffix else "" for suffix in suffixes}
        self.endings = {*EXTENSIONS, *self._added}
        self.others: Counter[str] = Counter()
        """Numbers of files that are not taken, by ending."""

    def takes(self, name: str) -> bool:
        """Whether a path below the root is that of a video; it is counted if only its ending is another."""
        if not self._chosen(name):
            return False
        if not self.is_video(name):
            self.reject(name)
        return self.is_video(name)

    def is_video(self, name: str) -> bool:
        """Whether a name has the ending of a video."""
        return _ending(name) in self.endings

    def is_doubtful(self, name: str) -> bool:
        """Whether only the first bytes tell that it is a video."""
        return _ending(name) == _VIDEO_CD and _VIDEO_CD not in self._added

    def reject(self, name: str) -> None:
        """Counts a file that is not taken."""
        self.others[_ending(name)] += 1


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def begins_as_a_video(uri: str) -> bool:
    """Whether a file begins as the film of a Video CD; True for one that cannot be read, so the ledger says why."""
    filesystem, path = storage.filesystem(uri)

    def read() -> bytes:
        with filesystem.open_input_stream(path) as file:
            return bytes(file.read(12))

    try:
        begin = storage.patiently(read) if storage.local_path(uri) is None else read()
    except (OSError, ValueError):
        return True
    return begin.startswith(_MPEG_STARTS) or (begin[:4] == b"RIFF" and begin[8:] == b"CDXA")


def left_out(others: Mapping[str, int]) -> str:
    """Names files that are not taken: `3 files are not looked at: .txt 2, without ending 1 ...`; empty for none."""
    if not others:
        return ""
    ordered = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{ending or 'without ending'} {count}" for ending, count in ordered]
    more = f" and {len(named) - _SHOWN} more endings" if len(named) > _SHOWN else ""
    total = sum(others.values())
    files = "file is" if total == 1 else "files are"
    listed = ", ".join(named[:_SHOWN]) + more
    return f"{total} {files} not looked at: {listed}; add endings of videos with --suffixes"
