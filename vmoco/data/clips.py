"""Which frames of a video become clips: pure functions of numbers, no pixels."""

from __future__ import annotations


def start_indices(total: int, *, num_frames: int, stride: int, max_clips: int) -> list[int]:
    """First frames of the clips that are cut from a video of `total` frames.

    As many clips as fit side by side, at most `max_clips`, spread evenly: each clip lies in the middle of its equal
    share of the video, so clips never overlap and a long video is covered from end to end.

    Example: total=23, num_frames=4, stride=2. A clip of frames 0 2 4 6 spans 7 frames, so three fit (21 of 23):

        frame  0    5    10   15   20
               |....|....|....|....|..
               AAAAAAA.BBBBBBBCCCCCCC.      starts 0, 8, 15

    Args:
        total: Frames of the video.
        num_frames: T, frames of a clip.
        stride: Distance between two frames of a clip, in frames of the video.
        max_clips: At most this many.

    Returns:
        Increasing indices; empty where the video is shorter than one clip.
    """
    span = clip_span(num_frames=num_frames, stride=stride)
    count = min(max_clips, total // span)
    # Clip i lies in the middle of [i * total / count, (i + 1) * total / count); in integers, so it is exact everywhere.
    return [((2 * i + 1) * total - count * span) // (2 * count) for i in range(count)]


def clip_span(*, num_frames: int, stride: int) -> int:
    """Frames of the video from the first to the last frame of a clip, both counted."""
    return (num_frames - 1) * stride + 1
