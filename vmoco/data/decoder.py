"""Runs FFmpeg in a separate process, because nothing else stops a decoder that hangs or survives one that crashes.

    task                                   decoder process
      | request, one JSON message   --->     |
      |                                      | decodes, and appends stored clips to the scratch file
      | answer, one JSON message    <---     |   (a file without a name that both have open)

A sliding window over a long video has more clips than a disk should hold. They come in pieces: the process waits with
the next piece until the task has read the one before.

Requests and answers are dataclasses; JSON exists only on the socket. A request has a time limit: after it the process
is killed, and the next request starts another one. The process may use at most MEMORY_BYTES for its data, so one video
cannot exhaust the machine's memory. It ends with the task that started it, however that ends.

Linux has a system call for each of the last two. Elsewhere (macOS) memory is limited only as far as the system does it,
and the process asks once a second whether its task still exists.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import TypeAdapter

from vmoco.data.clips import ClipPlan
from vmoco.data.frames import Encoding, Frames, Shape
from vmoco.data.ledger import Damage, ScratchError, Stage, VideoError, attributed
from vmoco.data.parts import Part, contradicted, plan_parts
from vmoco.data.ranged_file import FileRange
from vmoco.data.scratch import PieceSink, ScratchSink
from vmoco.data.source import PictureFolder, Source, readable
from vmoco.data.timeline import plan_clips

MEMORY_BYTES = 768 * 2**20
# Signals by which a decoder ends itself. Another one may not come again: the kernel kills when memory is short.
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}

Extent = Part | Literal["choose", "whole"]
"""What of a video is decoded: the part that a task was given; what its clips need, which the decoder finds out
(`video.cut_clips`); or every frame (`video.cut_whole`), where parts were planned before and there are none."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a video holds, found without decoding it."""

    num_clips: int
    """Clips that it will give."""
    parts: tuple[Part, ...]
    """What of it is decoded, by one task or by several; empty where it is decoded from its start to its end."""
    duration: float
    """Seconds from the first frame to the last."""
    notes: tuple[str, ...] = ()
    """What is unusual about it, as in `Timeline.notes`, and why a file that could seek is decoded from its start."""


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
    """Bytes of the stored clip; empty where clips came in pieces."""
    notes: tuple[str, ...] = ()
    """What was done to the frames beyond scaling, as in `Timeline.notes`."""
    damage: Damage | None = None
    """What of the video is lost."""
    new_shots: tuple[int, ...] = ()
    """Numbers of the clips before which another shot is known to begin; as many as there are clips: after the last."""


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
    extent: Extent
    size: tuple[int, int]
    encoding: Encoding
    quality: int
    offset: int
    action: Literal["cut"] = "cut"


@dataclasses.dataclass(frozen=True)
class _Stream:
    source: str | FileRange
    plan: ClipPlan
    size: tuple[int, int]
    clips_per_piece: int
    action: Literal["stream"] = "stream"


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Raw clips that begin at byte 0 of the scratch file."""

    first: int
    """Number of the first one; 0 also where decoding has started again, and earlier pieces do not count."""
    num_clips: int


_TAKEN = b"taken"
"""The message that a piece was read, and may be overwritten."""


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


_Request = _Probe | _Cut | _Stream
_Answer = Contents | StoredClips | _Piece | _Rejected | _Failed
_REQUEST: TypeAdapter[_Request] = TypeAdapter(_Request)
_ANSWER: TypeAdapter[_Answer] = TypeAdapter(_Answer)

Result = TypeVar("Result")


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
        answer = self._ask(_Probe(source, plan, part_seconds), seconds=seconds)
        assert isinstance(answer, Contents), answer
        return answer

    def cut(
        self,
        source: Source,
        plan: ClipPlan,
        *,
        extent: Extent,
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
            extent: What of the video to decode. The clips are the same whichever way they are decoded.
            size: Height and width of a frame in pixels.
            encoding: How frames are stored.
            quality: Of JPEG frames, 1 to 100.
            offset: Byte of the scratch file where the first clip goes.
            seconds: Time limit.

        Raises:
            VideoError: the video is damaged or too short, or the decoder hangs or crashes.
            ScratchError: the scratch file cannot be written.
        """
        answer = self._ask(_Cut(source, plan, extent, size, encoding, quality, offset), seconds=seconds)
        assert isinstance(answer, StoredClips), answer
        return answer

    def cut_in_pieces(
        self,
        source: str | FileRange,
        plan: ClipPlan,
        compute: Callable[[int, Frames], Result],
        *,
        size: tuple[int, int],
        clips_per_piece: int,
        seconds: float,
    ) -> tuple[StoredClips, list[Result]]:
        """Decodes the clips of a video and computes something of each piece of them, while the next one is decoded.

        Memory and the scratch file hold one piece each, however long the video is.

        Args:
            source: The video.
            plan: Which clips to cut.
            compute: Takes the number of the first clip and the clips, uint8 (N, T, H, W, 3). Decoding may start again,
                with clip 0: at damage that was found late. Earlier results are discarded then.
            size: Height and width of a frame in pixels.
            clips_per_piece: Largest number of clips in a piece.
            seconds: Time limit of a piece.

        Returns:
            The clips without their pixels, and the result for each piece.

        Raises:
            VideoError: the video is damaged or too short, or the decoder hangs or crashes.
            ScratchError: the scratch file cannot be written.
        """
        shape: Shape = (plan.num_frames, *size, 3)
        results: list[Result] = []
        answer = self._ask(_Stream(source, plan, size, clips_per_piece), seconds=seconds)
        while isinstance(answer, _Piece):
            if not answer.first:
                results.clear()
            try:
                clips = self._read(answer.num_clips, shape)
                self._send(_TAKEN)
                results.append(compute(answer.first, clips))
            except BaseException:
                self.close()  # it would wait for ever
                raise
            answer = self._receive(seconds)
        assert isinstance(answer, StoredClips), answer
        return answer, results

    def _read(self, num_clips: int, shape: Shape) -> Frames:
        stored = os.pread(self.scratch.fileno(), num_clips * math.prod(shape), 0)
        return np.frombuffer(stored, np.uint8).reshape(num_clips, *shape).copy()

    def close(self) -> None:
        """Kills the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _ask(self, request: _Request, *, seconds: float) -> _Answer:
        with attributed("read"):  # a path that is not valid Unicode has no JSON
            message = _REQUEST.dump_json(request)
        self._start()
        self._send(message)
        return self._receive(seconds)

    def _send(self, message: bytes) -> None:
        assert self._connection is not None
        try:
            self._connection.send_bytes(message)
        except ConnectionError:
            raise self._died() from None

    def _receive(self, seconds: float) -> _Answer:
        connection = self._connection
        assert connection is not None
        try:
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

    def _start(self) -> None:
        if self._connection is not None and self._process is not None and self._process.poll() is None:
            return
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


def _probe(request: _Probe) -> Contents:
    from vmoco.data import pictures, probing

    plan = request.plan
    if isinstance(request.source, PictureFolder):
        line = pictures.probe(request.source, damaged=plan.damaged)
    else:
        line = probing.probe(readable(request.source), damaged=plan.damaged)
    indices = plan_clips(line, plan)
    parts = plan_parts(line, plan, indices=indices, seconds=request.part_seconds)
    # Of a folder of pictures, no more than those of clips is read anyway.
    if isinstance(request.source, PictureFolder) and len(parts) == 1:
        parts = []
    duration = float((line.times[-1] - line.times[0]) * line.time_base) if len(line.times) else 0.0
    notes = (*line.notes, *contradicted(line, plan, indices=indices))
    return Contents(len(indices), tuple(parts), duration, notes)


def _cut(request: _Cut, scratch: int) -> StoredClips:
    from vmoco.data import pictures, video

    sink = ScratchSink(scratch, encoding=request.encoding, quality=request.quality, offset=request.offset)
    size = dict(zip(("height", "width"), request.size, strict=True))
    part = request.extent if isinstance(request.extent, Part) else None
    if isinstance(request.source, PictureFolder):
        cut = pictures.cut(request.source, request.plan, part=part, **size, sink=sink)
    elif part:
        cut = video.cut_part(readable(request.source), part, request.plan, **size, sink=sink)
    else:
        cut_video = video.cut_clips if request.extent == "choose" else video.cut_whole
        cut = cut_video(readable(request.source), request.plan, **size, sink=sink)
    return StoredClips(cut.start_times, cut.start_seconds, cut.fps, sink.sizes, cut.notes, cut.damage, cut.new_shots)


def _stream(request: _Stream, scratch: int, connection: Connection) -> StoredClips:
    from vmoco.data import video

    def send(first: int, num_clips: int) -> None:
        connection.send_bytes(_ANSWER.dump_json(_Piece(first, num_clips)))

    def taken() -> None:
        answer = connection.recv_bytes()
        assert answer == _TAKEN, answer

    sink = PieceSink(scratch, clips_per_piece=request.clips_per_piece, send=send, taken=taken)
    height, width = request.size
    try:
        cut = video.cut_clips(readable(request.source), request.plan, height=height, width=width, sink=sink)
        sink.flush()
    finally:
        sink.wait()  # also after an error: the next message is a request again
    return StoredClips(cut.start_times, cut.start_seconds, cut.fps, [], cut.notes, cut.damage, cut.new_shots)


def _answer(request: _Request, scratch: int, connection: Connection) -> _Answer:
    try:
        with attributed("decode"):
            if isinstance(request, _Probe):
                return _probe(request)
            if isinstance(request, _Cut):
                return _cut(request, scratch)
            return _stream(request, scratch, connection)
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
        connection.send_bytes(_ANSWER.dump_json(_answer(request, scratch, connection)))


def main(connection: str, scratch: str, parent: str) -> None:
    """The decoder process."""
    _end_with(int(parent))
    if os.getppid() != int(parent):
        return
    for ignored in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to every process; the task decides
        signal.signal(ignored, signal.SIG_IGN)
    _limit_memory()
    _serve(Connection(int(connection)), int(scratch))


def _end_with(parent: int) -> None:
    """Makes this process end when its parent does."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also while it hangs
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on every system
        return
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    except (OSError, ValueError):
        if sys.platform == "linux":
            raise
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(*sys.argv[1:])
