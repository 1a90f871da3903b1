"""A process of its own for FFmpeg: a decoder that hangs cannot be stopped, and one that crashes takes its process.

    task                                   decoder process
      | request, one message of JSON  --->   |
      |                                      | decodes, and appends stored clips to the scratch file
      | answer, one message of JSON   <---   |   (a file without a name that both have open)

A request has a time limit: when it is over the process is killed, and the next request starts another. The process may
not take more than MEMORY_BYTES for its data, so one video cannot take the memory of the machine. It ends with the task
that started it, however that ends.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vmoco.data import fetch, frames
from vmoco.data.clips import ClipPlan, Part, clip_indices, split
from vmoco.data.frames import Encoding
from vmoco.data.ledger import VideoError

MEMORY_BYTES = 768 * 2**20
# What a decoder dies of by itself; another signal (the kernel was short of memory) may not come again.
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


class Decoder:
    """Runs requests in a decoder process, which is started when it is needed and used for many videos."""

    def __init__(self) -> None:
        self.scratch = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as this object
        """Where the stored clips of `cut` requests lie, from the `offset` of each."""
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def probe(
        self, source: dict[str, Any], plan: ClipPlan, *, part_seconds: float, seconds: float
    ) -> tuple[int, list[Part], float]:
        """How many clips a video will give, its parts where it is long, and how many seconds it lasts.

        Raises:
            VideoError: it is no video, is cut off, or the decoder hangs or crashes.
        """
        request = {"source": source, "plan": dataclasses.asdict(plan), "part_seconds": part_seconds}
        answer = self._run("probe", request, seconds=seconds)
        return answer["num_clips"], [Part(**part) for part in answer["parts"]], answer["duration"]

    def cut(
        self,
        source: dict[str, Any],
        plan: ClipPlan,
        *,
        part: Part | None,
        size: tuple[int, int],
        encoding: Encoding,
        quality: int,
        offset: int,
        seconds: float,
    ) -> dict[str, Any]:
        """Decodes the clips of a video, or of a part of it, into the scratch file.

        Returns:
            `start_times`, `start_seconds` and stored `sizes` in bytes, one per clip, and the `fps` of the video.

        Raises:
            VideoError: the video is damaged or too short, or the decoder hangs or crashes.
            ValueError: the scratch file cannot be written.
        """
        request = {
            "source": source,
            "plan": dataclasses.asdict(plan),
            "part": dataclasses.asdict(part) if part else None,
            "size": size,
            "encoding": encoding,
            "quality": quality,
            "offset": offset,
        }
        return self._run("cut", request, seconds=seconds)

    def close(self) -> None:
        """Ends the process, and with it what it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _run(self, action: str, request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        try:
            connection = self._start()
            connection.send_bytes(json.dumps({"action": action, **request}).encode())
            if not connection.poll(seconds):
                self.close()
                raise VideoError("decode", "timeout", f"not done after {seconds:g} s", transient=True)
            answer: dict[str, Any] = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise self._died() from None
        if "rejected" in answer:
            raise VideoError(**answer["rejected"])
        if "failed" in answer:
            raise ValueError(answer["failed"])
        return answer

    def _died(self) -> VideoError:
        assert self._process is not None
        code = self._process.wait()
        self.close()
        said = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return VideoError("decode", "decoder-crash", f"the decoder died: {said}", transient=-code not in _CRASHES)

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
            # Its stderr is FFmpeg's own, which says nothing that is not in the answers.
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

    def __init__(self, descriptor: int, request: dict[str, Any]) -> None:
        self._descriptor, self._offset = descriptor, request["offset"]
        self._encoding, self._quality = request["encoding"], request["quality"]
        self.sizes: list[int] = []

    def add(self, clip: frames.Frames) -> None:
        stored = memoryview(frames.encode(clip, self._encoding, quality=self._quality))
        place = self._offset + sum(self.sizes)
        done = 0
        while done < len(stored):
            done += os.pwrite(self._descriptor, stored[done:], place + done)
        self.sizes.append(len(stored))

    def restart(self) -> None:
        self.sizes.clear()


def _answer(request: dict[str, Any], scratch: int) -> dict[str, Any]:
    from vmoco.data import video

    plan = ClipPlan(**request["plan"])
    with fetch.opened(request["source"]) as source:
        if request["action"] == "probe":
            line = video.probe(source)
            indices = clip_indices(line.times, line.time_base, plan)
            parts = split(
                line.times,
                line.keyframes,
                line.time_base,
                indices=indices,
                plan=plan,
                seconds=request["part_seconds"],
                fps=line.fps,
            )
            duration = float((line.times[-1] - line.times[0]) * line.time_base) if len(line.times) else 0.0
            return {
                "num_clips": len(indices),
                "parts": [dataclasses.asdict(part) for part in parts],
                "duration": duration,
            }
        sink, (height, width) = _ScratchSink(scratch, request), request["size"]
        if request["part"]:
            part = Part(**request["part"])
            start_seconds = video.cut_part(source, part, height=height, width=width, sink=sink)
            start_times = [clip[0] for clip in part.clips]
            return {"start_times": start_times, "start_seconds": start_seconds, "fps": part.fps, "sizes": sink.sizes}
        cut = video.cut_clips(source, plan, height=height, width=width, sink=sink)
        return {**dataclasses.asdict(cut), "sizes": sink.sizes}


def _serve(connection: Connection, scratch: int) -> None:
    """Answers requests until the other side is gone."""
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = _answer(request, scratch)
        except VideoError as error:
            answer = {"rejected": vars(error)}
        except OSError as error:
            answer = {"failed": f"cannot write pixels to {tempfile.gettempdir()}: {error.strerror or error}"}
        except Exception as error:  # one strange video must not end a job of many hours; it is counted and tried again
            said = f"{type(error).__name__}: {error}"
            rejected = {"stage": "decode", "reason": "unexpected-error", "message": said, "transient": True}
            answer = {"rejected": rejected}
        connection.send_bytes(json.dumps(answer).encode())


def main(connection: str, scratch: str, parent: str) -> None:
    """The decoder process."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also while it hangs
    if os.getppid() != int(parent):
        return
    for ignored in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all; the task decides
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve(Connection(int(connection)), int(scratch))


if __name__ == "__main__":
    main(*sys.argv[1:])
