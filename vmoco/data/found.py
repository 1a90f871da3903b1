"""A video that was found: its name in the data set, where it lies, and what a list says of it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vmoco.seed import hash64

Splits = tuple[str | None, str | None, str | None]


@dataclasses.dataclass(frozen=True)
class TarMember:
    """Where a video lies in a tar file (vmoco/data/tar_files.py)."""

    tar: str
    """Path of the tar file below the root."""
    offset: int
    """Byte of the tar file at which the video begins."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Which pictures of a folder are the frames of a video (vmoco/data/frame_folder.py)."""

    fps: float
    """Pictures per second."""
    prefix: str = ""
    """What their names have before the number."""
    kind: Literal["jpeg", "png"] = "jpeg"


@dataclasses.dataclass(frozen=True)
class Found:
    """A video, or a range of one, and its fields from a list of videos."""

    video_id: str
    """Its name in the data set: the path, unless a list gives another name."""
    num_bytes: int
    """Size of the file, or of all pictures of a folder."""
    path: str = ""
    """Below the root, with slashes; of a video in a tar file, the path of the tar file and then its path in it."""
    start_seconds: float | None = None
    end_seconds: float | None = None
    label: str | None = None
    splits: Splits = (None, None, None)
    """`train`, `test` or `validate` in each official split; None where it is in no part of it."""
    group: str | None = None
    """Column `group` of a list: entries of one group come from one source, such as a camera, a patient or a match."""
    source: str | None = None
    """Recording that it is cut from: its group, the id of a YouTube video, or the path of the file. None for a complete
    file that is a source of its own."""
    member: TarMember | None = None
    """Its place, if it is in a tar file."""
    pictures: Pictures | None = None
    """Its frames, if it is a folder of pictures."""

    def __post_init__(self) -> None:
        if not self.path:
            object.__setattr__(self, "path", self.video_id)

    @property
    def range(self) -> str | None:
        """The seconds as `0.5-3`, `-3` or `0.5-`; None for the complete file."""
        if self.start_seconds is None and self.end_seconds is None:
            return None
        return "-".join("" if value is None else f"{value:g}" for value in (self.start_seconds, self.end_seconds))

    @property
    def entry(self) -> str:
        """16 hex digits over all fields: if one of them changes, it counts as another video.

        Without the source, which follows from the others, and without the place in a tar file. A group or the rate of
        pictures counts where there is one, so that the entries of earlier data sets stay the same.
        """
        fields = [self.video_id, self.num_bytes, self.path, self.start_seconds, self.end_seconds, self.label]
        later = [self.group, self.pictures]
        values = [*fields, self.splits, *(value for value in later if value is not None)]
        return f"{hash64(*(str(value) for value in values)):016x}"
