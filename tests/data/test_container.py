"""Whether a file is whole follows from the boxes of its container."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import videos
from vmoco.data.container import ends_whole

FILES: dict[str, dict[str, Any]] = {
    "matroska.mkv": {},
    "webm.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "live.mkv": {"container_options": {"live": "1"}},
    "small-clusters.mkv": {"container_options": {"cluster_time_limit": "200"}},
    "avi.avi": {"codec": "mpeg4"},
}
NAMES = {".mkv": "matroska,webm", ".webm": "matroska,webm", ".avi": "avi"}


@pytest.mark.parametrize("name", FILES)
def test_only_whole_files_end_whole(tmp_path: Path, name: str) -> None:
    """A whole file does, from a path or from memory; cut anywhere inside its pictures, it does not."""
    path = videos.write_video(tmp_path / name, videos.images(40), **FILES[name])
    content, form = path.read_bytes(), NAMES[path.suffix]
    assert ends_whole(str(path), form)
    assert ends_whole(io.BytesIO(content), form)
    for size in np.linspace(len(content) * 0.1, len(content) * 0.9, 23).astype(int):
        assert not ends_whole(io.BytesIO(content[:size]), form), f"cut at {size} of {len(content)}"


def test_other_formats_do_not_tell(tmp_path: Path) -> None:
    """An MPEG-TS file has no boxes, and text has none either."""
    path = videos.write_video(tmp_path / "a.ts", videos.images(10))
    assert not ends_whole(str(path), "mpegts")
    for form in NAMES.values():
        for content in (b"text", b"\0" * 99, b"\xff" * 99):
            assert not ends_whole(io.BytesIO(content), form)
