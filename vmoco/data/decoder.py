"""Runs FFmpeg in a separate process, because nothing else stops a decoder that hangs or survives one that crashes.

    task                                   decoder process
      | request, one JSON message   --->     |
      |                                      | decodes, and appends stored clips to the scratch file
      | answer, one JSON message    <---     |   (a file without a name that both have open)

Requests and answers are dataclasses; JSON exists only on the socket. A request has a time limit: after it the process
is killed, and the next request starts another one. The process may use at most MEMORY_BYTES for its data, so one video
cannot exhaust the machine's memory. It ends with the task that started it, however that ends.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from vmoco.data import frames
from vmoco.data.clips import ClipPlan, Part, split
from vmoco.data.frames import Encoding
from vmoco.data.ledger import ScratchError, Stage, VideoError, attributed
from vmoco.data.source import Source, readable
from vmoco.data.timeline import on_clock

MEMORY_BYTES = 768 * 2**20
# Signals by which a decoder ends itself. Another one may not come again: the kernel kills when memory is short.
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a video holds, found without decoding it."""

    num_clips: int
    """Clips that it will give."""
    parts: tuple[Part, ...]
    """Parts of a long video; empty where it is decoded in one go."""
    duration: float
    """Seconds from the first frame to the last."""
    notes: tuple[str, ...] = ()
    """What is unusual about it, as in `Timeline.notes`."""


@dataclasses.dataclass(frozen=True)
class StoredClips:
    """Clips in the scratch file, one after the other: one item per clip."""

    start_times: list[int]
    """Time stamp of the first frame, in the video's own unit."""
    start_seconds: list[float]
    """The same in seconds."""
    fps: float
    """Frames per second of the video."""
    sizes: list[int]
    """Bytes of the stored clip."""
    notes: tuple[str, ...] = ()
    """What was done to the frames beyond scaling, as in `Timeline.notes`."""


@dataclasses.dataclass(frozen=True)
class _Probe:
    source: Source
    plan: ClipPlan
    part_seconds: float
    action: Literal["probe"] = "probe"


@dataclasses.dataclass(frozen=True)
class _Cut:
    source: Source
    plan: ClipPlan
    part: Part | None
    size: tuple[int, int]
    encoding: Encoding
    quality: int
    offset: int
    action: Literal["cut"] = "cut"


@dataclasses.dataclass(frozen=True)
class _Rejected:
    stage: Stage
    reason: str
    message: str
    transient: bool


@dataclasses.dataclass(frozen=True)
class _Failed:
    """The scratch file cannot be written."""

    failed: str


_Request = _Probe | _Cut
_Answer = Contents | StoredClips | _Rejected | _Failed
_REQUEST: TypeAdapter[_Request] = TypeAdapter(_Request)
_ANSWER: TypeAdapter[_Answer] = TypeAdapter(_Answer)


class Decoder:
    """Sends requests to a decoder process, which starts with the first one and serves many videos."""

    def __init__(self) -> None:
        self.scratch = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as this object
        """Where `cut` puts stored clips, from the `offset` of each request."""
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def probe(self, source: Source, plan: ClipPlan, *, part_seconds: float, seconds: float) -> Contents:
        """Reads a video without decoding it.

        Args:
            source: The video.
            plan: Which clips will be cut.
            part_seconds: Length of the parts of a long video.
            seconds: Time limit.

        Raises:
            VideoError: it is no video or is cut off, or the decoder hangs or crashes.
        """
        answer = self._run(_Probe(source, plan, part_seconds), seconds=seconds)
        assert isinstance(answer, Contents), answer
        return answer

    def cut(
        self,
        source: Source,
        plan: ClipPlan,
        *,
        part: Part | None,
        size: tuple[int, int],
        encoding: Encoding,
        quality: int,
        offset: int,
        seconds: float,
    ) -> StoredClips:
        """Decodes the clips of a video, or of a part of it, into the scratch file.

        Args:
            source: The video.
            plan: Which clips to cut.
            part: The part of a long video; None decodes the video from its start.
            size: Height and width of a frame in pixels.
            encoding: How frames are stored.
            quality: Of JPEG frames, 1 to 100.
            offset: Byte of the scratch file where the first clip goes.
            seconds: Time limit.

        Raises:
            VideoError: the video is damaged or too short, or the decoder hangs or crashes.
            ScratchError: the scratch file cannot be written.
        """
        answer = self._run(_Cut(source, plan, part, size, encoding, quality, offset), seconds=seconds)
        assert isinstance(answer, StoredClips), answer
        return answer

    def close(self) -> None:
        """Kills the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _run(self, request: _Request, *, seconds: float) -> Contents | StoredClips:
        with attributed("read"):  # a path that is not valid Unicode has no JSON
            message = _REQUEST.dump_json(request)
        try:
            connection = self._start()
            connection.send_bytes(message)
            if not connection.poll(seconds):
                self.close()
                raise VideoError("decode", "timeout", f"not done after {seconds:g} s", transient=True)
            answer = _ANSWER.validate_json(connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise self._died() from None
        if isinstance(answer, _Rejected):
            raise VideoError(answer.stage, answer.reason, answer.message, transient=answer.transient)
        if isinstance(answer, _Failed):
            raise ScratchError(answer.failed)
        return answer

    def _died(self) -> VideoError:
        assert self._process is not None
        code = self._process.wait()
        self.close()
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return VideoError("decode", "decoder-crash", f"the decoder died: {cause}", transient=-code not in _CRASHES)

    def _start(self) -> Connection:
        if self._connection is not None and self._process is not None and self._process.poll() is None:
            return self._connection
        self.close()
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            descriptors = (theirs.fileno(), self.scratch.fileno())
            # FFmpeg writes to its stderr, and the answers hold all of that already.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vmoco.data.decoder", *map(str, descriptors), str(os.getpid())],
                pass_fds=descriptors,
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        return self._connection


class _ScratchSink:
    """Appends stored clips to the scratch file."""

    def __init__(self, descriptor: int, request: _Cut) -> None:
        self._descriptor, self._request = descriptor, request
        self.sizes: list[int] = []

    def add(self, clip: frames.Frames) -> None:
        stored = memoryview(frames.encode(clip, self._request.encoding, quality=self._request.quality))
        place = self._request.offset + sum(self.sizes)
        done = 0
        try:
            while done < len(stored):
                done += os.pwrite(self._descriptor, stored[done:], place + done)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise ScratchError(
                f"cannot write pixels to {folder}: {error.strerror or error}; free space there, or set TMPDIR"
            ) from error
        self.sizes.append(len(stored))

    def restart(self) -> None:
        self.sizes.clear()


def _probe(request: _Probe) -> Contents:
    from vmoco.data import video

    plan = request.plan
    line = video.probe(readable(request.source))
    indices = video.plan_clips(line, plan)
    if len(line.times):  # as `split` counts
        plan = on_clock(plan, first=int(line.times[0]), time_base=line.time_base, origin=line.origin)
    parts = split(
        line.times,
        line.keyframes,
        line.time_base,
        indices=indices,
        plan=plan,
        seconds=request.part_seconds,
        fps=line.fps,
    )
    duration = float((line.times[-1] - line.times[0]) * line.time_base) if len(line.times) else 0.0
    parts = [dataclasses.replace(part, stream=line.stream) for part in parts]
    return Contents(len(indices), tuple(parts), duration, line.notes)


def _cut(request: _Cut, scratch: int) -> StoredClips:
    from vmoco.data import video

    sink, (height, width) = _ScratchSink(scratch, request), request.size
    source = readable(request.source)
    if request.part:
        policy: Any = {"hdr": request.plan.hdr, "deinterlace": request.plan.deinterlace}
        cut = video.cut_part(source, request.part, height=height, width=width, sink=sink, **policy)
    else:
        cut = video.cut_clips(source, request.plan, height=height, width=width, sink=sink)
    return StoredClips(cut.start_times, cut.start_seconds, cut.fps, sink.sizes, notes=cut.notes)


def _answer(request: _Request, scratch: int) -> _Answer:
    try:
        with attributed("decode"):
            return _probe(request) if isinstance(request, _Probe) else _cut(request, scratch)
    except VideoError as error:
        return _Rejected(error.stage, error.reason, error.message, error.transient)
    except ScratchError as error:
        return _Failed(str(error))


def _serve(connection: Connection, scratch: int) -> None:
    """Answers requests until the other side is gone."""
    while True:
        try:
            request = _REQUEST.validate_json(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(_ANSWER.dump_json(_answer(request, scratch)))


def main(connection: str, scratch: str, parent: str) -> None:
    """The decoder process."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also while it hangs
    if os.getppid() != int(parent):
        return
    for ignored in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to every process; the task decides
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve(Connection(int(connection)), int(scratch))


if __name__ == "__main__":
    main(*sys.argv[1:])
