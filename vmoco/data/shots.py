"""Numbers the shots of a video: which of its clips are of one shot, however they are spread over shards.

From one clip to the next another shot begins

    where a cut lies in the first of the two              its stored frames say so
    where ingest knows a border between the two           the shard says so (`shard.Video.new_shots`)
    where its last frame and the first of the next        the stored frames say so; of a video whose frames all were
    differ as at a cut                                    looked at (--at-cuts split), this is not asked

A border is a cut that was seen while every frame was decoded, a seam between two recordings, frames that are lost where
all others were looked at, or a clip that is left out because it crosses a cut. All of this follows from the shard, so
one that is there already gives the same numbers.

A shard counts the shots of each of its videos from 0. Where other parts of a long video are in other shards, a
`Stretch` tells what these need to know, and `first_numbers` counts on from shard to shard. So the numbers depend
neither on the size of shards nor on that of parts.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from vmoco.data.clip_scores import Looked
from vmoco.data.cuts import Grey, is_cut, written


@dataclasses.dataclass(frozen=True)
class End:
    """The frame with which some clips begin or end, as text, so that a task can send it."""

    frame: str
    """As `clip_scores.small_frames`: float32 in base 64."""
    changes: tuple[float, ...]
    """The two changes from frame to frame that are next to it."""

    @classmethod
    def of(cls, frame: Grey, changes: tuple[float, ...]) -> End:
        """One of a frame (h, w)."""
        return cls(base64.b64encode(np.ascontiguousarray(frame, "<f4").tobytes()).decode(), changes)

    @property
    def grey(self) -> Grey:
        """The frame as one row of pixels."""
        return np.frombuffer(base64.b64decode(self.frame), "<f4")


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The clips of one shard that are of consecutive parts of a long video, which has other parts in other shards."""

    video_id: str
    part: int
    """Number of the first of these parts."""
    num_shots: int
    """How many shots begin with or in its clips, after the first one."""
    known_before: bool
    """Whether a border is known before its first clip, in these parts; without clips, anywhere in them."""
    known_after: bool
    """Whether one is known after its last clip."""
    first: End | None
    """How it begins; None where it has no clip."""
    last: End | None
    """How it ends."""


def numbers(looked: Sequence[Looked], *, known: Collection[int], every_frame: bool) -> list[int]:
    """Number of the shot in which each clip begins, from 0.

    Args:
        looked: consecutive clips of a video.
        known: numbers of the clips before which a border is known.
        every_frame: whether all borders are known, because every frame was looked at.
    """
    found = [0] * bool(looked)
    for number, (before, each) in enumerate(itertools.pairwise(looked), start=1):
        border = number in known or (not every_frame and _differ(before.last, before.tail, each.first, each.head))
        found.append(found[-1] + before.scores.cuts + border)
    return found


def stretch(
    video_id: str, part: int, looked: Sequence[Looked], shots: Sequence[int], known: Collection[int]
) -> Stretch:
    """What the shots of other parts depend on.

    Args:
        video_id: name of the video.
        part: number of the first part.
        looked: the clips.
        shots: what `numbers` says of them.
        known: as there.
    """
    if not looked:
        return Stretch(video_id, part, 0, bool(known), bool(known), None, None)
    first, last = looked[0], looked[-1]
    ends = End.of(first.first, first.head), End.of(last.last, last.tail)
    return Stretch(video_id, part, shots[-1] + last.scores.cuts, 0 in known, len(looked) in known, *ends)


def first_numbers(stretches: Iterable[Stretch]) -> Iterator[int]:
    """Number of the shot in which the first clip of each stretch begins; they are those of one video, in order."""
    shot, known, last = 0, False, None
    for each in stretches:
        known = known or each.known_before
        if each.first is None:
            yield shot
            continue
        if last is not None:
            shot += known or _differ(last.grey, last.changes, each.first.grey, each.first.changes)
        yield shot
        shot, known, last = shot + each.num_shots, each.known_after, each.last


def _differ(last: Grey, tail: tuple[float, ...], first: Grey, head: tuple[float, ...]) -> bool:
    """Whether the last frame of a clip and the first of the next one are of two shots, given the changes around."""
    return is_cut(written(np.abs(first.ravel() - last.ravel()).mean()), [*tail, *head])
