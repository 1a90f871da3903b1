"""Frames that wait in the deinterlacer reach their clips, and do not mix with frames that do not follow them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.data import videos
from vmoco.data.clips import ClipPlan
from vmoco.data.collector import Collector


def interlaced(path: Path) -> list[Any]:
    """Decoded interlaced frames whose content changes from frame to frame."""
    videos.write_video(path, videos.images(12), options={"x264-params": "tff=1"})
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert all(frame.interlaced_frame for frame in frames)
    return frames


def collect(frames: list[Any], *, gap: int | None = None) -> list[videos.Image]:
    """Each frame as a clip; at `gap` the frames do not follow each other."""
    sink = videos.Kept()
    wanted = np.arange(len(frames), dtype=np.int64)[:, None]
    collector = Collector(wanted, sink, ClipPlan(1), height=48, width=64)
    for number, frame in enumerate(frames):
        if number == gap:
            collector.flush()
        collector.take(number, frame)
    assert not collector.complete
    collector.flush()
    assert collector.complete
    return sink.clips


def test_a_gap_separates_frames(tmp_path: Path) -> None:
    """Frames on both sides of a gap are deinterlaced as if there were no others."""
    frames = interlaced(tmp_path / "a.mp4")
    near, far = frames[:4], frames[8:]
    apart = np.stack(collect(near) + collect(far))
    np.testing.assert_array_equal(np.stack(collect(near + far, gap=4)), apart)
    assert not np.array_equal(np.stack(collect(near + far)), apart)


def test_clips_may_overlap(tmp_path: Path) -> None:
    """Each frame is scaled once and reaches all clips that show it; frames that no later clip needs are let go."""
    path = videos.write_video(tmp_path / "a.mp4", videos.images(40))
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    wanted = np.array([[start, start + 2, start + 4, start + 4] for start in range(1, 34, 3)], np.int64)
    sink = videos.Kept()
    collector = Collector(wanted, sink, ClipPlan(4), height=48, width=64)
    scaled, held = [], []
    honest = collector.scaler.scale
    collector.scaler.scale = lambda frame: scaled.append(frame.pts) or honest(frame)  # type: ignore[method-assign, func-returns-value]
    for number, frame in enumerate(frames):
        collector.take(number, frame)
        held.append(len(collector._kept))
    collector.flush()
    assert collector.complete
    assert [[videos.number_of(frame) for frame in clip] for clip in sink.clips] == wanted.tolist()
    assert len(scaled) == len(set(wanted.ravel().tolist()))
    assert max(held) <= 5


def test_clips_without_one_of_their_frames_are_not_complete(tmp_path: Path) -> None:
    """A frame that never comes leaves no clip with the pixels of another one."""
    path = videos.write_video(tmp_path / "a.mp4", videos.images(8))
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    sink = videos.Kept()
    collector = Collector(np.arange(8, dtype=np.int64).reshape(2, 4), sink, ClipPlan(4), height=48, width=64)
    for number, frame in enumerate(frames):
        if number != 5:
            collector.take(number, frame)
    assert len(sink.clips) == 1
    assert not collector.complete
