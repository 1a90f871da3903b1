"""A decoder that hangs, crashes or takes too much memory costs one video and no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import videos
from vmoco.data import decoder as under_test
from vmoco.data.clips import ClipPlan
from vmoco.data.decoder import Decoder, StoredClips
from vmoco.data.frames import decode
from vmoco.data.ledger import VideoError

PLAN = ClipPlan(4, max_clips=3)

# What a decoder process does instead of decoding a file of this name.
MISCHIEF = """
import ctypes, os, signal, sys, time
from vmoco.data import decoder, video
honest = video.cut_whole
def strange(source, *rest, **options):
    name = os.path.basename(source)
    if name == "hang.mp4":
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        ctypes.CDLL(None).sleep(1000)
    if name == "crash.mp4":
        ctypes.string_at(0)
    if name == "memory.mp4":
        bytearray(2**30)
    if name == "strange.mp4":
        raise ZeroDivisionError("strange")
    return honest(source, *rest, **options)
video.cut_whole = strange
decoder.main(*sys.argv[1:])
"""


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoder]:
    """A decoder whose process misbehaves on some names."""
    honest = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "vmoco.data.decoder"]
        return honest([command[0], "-c", MISCHIEF, *command[3:]], **options)

    monkeypatch.setattr(under_test.subprocess, "Popen", popen)
    made = Decoder()
    yield made
    made.close()


def cut(decoder: Decoder, path: Path, **changes: Any) -> StoredClips:
    options: dict[str, Any] = {"extent": "whole", "size": (24, 32), "encoding": "raw", "quality": 92, "offset": 0}
    return decoder.cut(str(path), PLAN, **{**options, "seconds": 60.0, **changes})


def test_clips_lie_in_the_scratch_file(tmp_path: Path) -> None:
    """Raw or JPEG, at the offset that was asked for, one after the other; the process serves many videos."""
    path = videos.write_video(tmp_path / "a.mp4", videos.images(30))
    decoder = Decoder()
    for encoding, offset in (("raw", 0), ("jpeg", 123)):
        made = cut(decoder, path, encoding=encoding, offset=offset)
        for number, size in enumerate(made.sizes):
            stored = os.pread(decoder.scratch.fileno(), size, offset + sum(made.sizes[:number]))
            clip = decode(stored, encoding, (4, 24, 32, 3))  # type: ignore[arg-type]
            first = round(made.start_seconds[number] * 25)
            assert [videos.number_of(frame) for frame in clip] == list(range(first, first + 4))
    first_process = decoder._process
    cut(decoder, path)
    assert decoder._process is first_process
    decoder.close()


@pytest.mark.parametrize(
    ("name", "reason", "said", "transient"),
    [
        ("hang.mp4", "timeout", "not done after 3 s", True),
        ("crash.mp4", "decoder-crash", "the decoder died: signal SIGSEGV", False),
        ("memory.mp4", "unexpected-error", "MemoryError", True),
        ("strange.mp4", "unexpected-error", "ZeroDivisionError: strange", True),
    ],
)
def test_mischief_costs_one_video(
    tmp_path: Path, strange: Decoder, name: str, reason: str, said: str, transient: bool
) -> None:
    """A hang in C with all signals blocked ends at the limit, a segfault is told; the next video is cut as ever."""
    bad = videos.write_video(tmp_path / name, videos.images(30))
    good = videos.write_video(tmp_path / "good.mp4", videos.images(30))
    began = time.monotonic()
    with pytest.raises(VideoError) as caught:
        cut(strange, bad, seconds=3.0)
    assert time.monotonic() - began < 10
    assert (caught.value.reason, caught.value.transient) == (reason, transient)
    assert said in caught.value.message
    assert len(cut(strange, good).sizes) == 3


def test_a_frame_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one frame needs more memory than a decoder may take, the video is rejected for good, and not as damaged."""
    frames = [np.zeros((2160, 3840, 3), np.uint8)] * 4
    path = videos.write_video(tmp_path / "large.mp4", frames, options={"preset": "ultrafast"})
    monkeypatch.setattr(under_test, "MEMORY_BYTES", 110 * 2**20)
    code = (
        f"import sys; from vmoco.data import decoder; decoder.MEMORY_BYTES = {110 * 2**20}; decoder.main(*sys.argv[1:])"
    )
    honest = subprocess.Popen
    monkeypatch.setattr(
        under_test.subprocess, "Popen", lambda c, **options: honest([c[0], "-c", code, *c[3:]], **options)
    )
    decoder = Decoder()
    with pytest.raises(VideoError) as caught:
        cut(decoder, path)
    assert (caught.value.reason, caught.value.transient) == ("too-much-memory", False)
    decoder.close()


# A task over the videos of a folder, with all that a Ray worker loads; prints the peak of its memory and its decoder's.
TASK = """
import sys
from pathlib import Path
import ray.data
from tests.data.test_ingest_tasks import make, settings
from vmoco.data.decoder import Decoder, StoredClips
decoder = Decoder()
made = make(settings(Path(sys.argv[1]), num_frames=16, height=128, width=171), decoder)
assert not made.rejected, made.rejected
for pid in ("self", decoder._process.pid):
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(int(line.split()[1]) / 1024)
decoder.close()
"""


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (2160, 3840)])
def test_large_frames_fit_in_a_task(tmp_path: Path, height: int, width: int) -> None:
    """At most 1 GiB for a task and its decoder together, where streams refer to as many frames as they may."""
    frames = [np.roll(frame, 8 * at, axis=0) for at, frame in enumerate(videos.images(32, height=height, width=width))]
    options = {"preset": "ultrafast", "refs": "5", "bf": "3", "b-pyramid": "strict"}
    videos.write_video(tmp_path / "in/h264.mp4", frames, options=options)
    videos.write_video(tmp_path / "in/hevc.mkv", frames, codec="libx265", options={"preset": "ultrafast"})
    videos.write_video(tmp_path / "in/mpeg4.avi", frames, codec="mpeg4")
    command = [sys.executable, "-c", TASK, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sum(map(float, done.stdout.split())) < 1024


@pytest.mark.parametrize("hangs", [True, False])
def test_the_process_ends_with_its_task(tmp_path: Path, hangs: bool) -> None:
    """kill -9 of the task ends the decoder too, even one that hangs."""
    path = videos.write_video(tmp_path / "a.mp4", videos.images(30))
    code = (
        "import sys, time\n"
        "from vmoco.data.decoder import Decoder; from vmoco.data.clips import ClipPlan\n"
        "decoder = Decoder(); decoder.probe(sys.argv[1], ClipPlan(4), part_seconds=9, seconds=9)\n"
        "print(decoder._process.pid, flush=True); time.sleep(100)"
    )
    task = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert task.stdout
    pid = int(task.stdout.readline())
    if hangs:
        os.kill(pid, signal.SIGSTOP)  # it cannot even notice that its socket was closed
    task.kill()
    task.wait()
    end = time.monotonic() + 10
    while _alive(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_decoder_that_was_killed_may_be_tried_again(tmp_path: Path) -> None:
    """Killed from outside, as by a machine short of memory, the video is rejected for now, and not for good."""
    path = videos.write_video(tmp_path / "a.mp4", videos.images(30))
    decoder = Decoder()
    cut(decoder, path)
    assert decoder._process is not None
    os.kill(decoder._process.pid, signal.SIGSTOP)
    threading.Timer(0.5, decoder._process.kill).start()
    with pytest.raises(VideoError) as caught:
        cut(decoder, path)
    assert (caught.value.reason, caught.value.transient) == ("decoder-crash", True)
    decoder.close()
