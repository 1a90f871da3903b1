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
