"""Sinks that write the pixels of clips to the scratch file, from which the task of a decoder process reads them.

`ScratchSink` keeps all clips of a video. `PieceSink` keeps a few at a time, so the file stays small however many clips
there are: it waits until the task has read them before it writes the next ones.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

from vmoco.data import frames
from vmoco.data.frames import Encoding, Frames
from vmoco.data.ledger import ScratchError


class ScratchSink:
    """Appends stored clips to the scratch file, beginning at `offset`."""

    def __init__(self, descriptor: int, *, encoding: Encoding, quality: int, offset: int) -> None:
        self._descriptor, self._encoding, self._quality, self._offset = descriptor, encoding, quality, offset
        self.sizes: list[int] = []
        """Bytes of each clip."""

    def add(self, clip: Frames) -> None:
        stored = memoryview(frames.encode(clip, self._encoding, quality=self._quality))
        _write(self._descriptor, stored, self._offset + sum(self.sizes))
        self.sizes.append(len(stored))

    def restart(self) -> None:
        self.sizes.clear()


class PieceSink:
    """Hands raw clips over in pieces, each of which begins at byte 0 of the scratch file.

    Args:
        descriptor: The scratch file.
        clips_per_piece: Largest number of clips in a piece.
        send: Tells the task the number of the first clip of a piece, and how many there are.
        taken: Waits until the task has read the piece that was sent last.
    """

    def __init__(
        self, descriptor: int, *, clips_per_piece: int, send: Callable[[int, int], None], taken: Callable[[], None]
    ) -> None:
        self._descriptor, self._clips_per_piece, self._send, self._taken = descriptor, clips_per_piece, send, taken
        self._first = self._num_clips = 0
        self._sent = False

    def add(self, clip: Frames) -> None:
        self.wait()
        stored = memoryview(frames.encode(clip, "raw", quality=100))
        _write(self._descriptor, stored, self._num_clips * len(stored))
        self._num_clips += 1
        if self._num_clips == self._clips_per_piece:
            self.flush()

    def restart(self) -> None:
        self._first = self._num_clips = 0

    def flush(self) -> None:
        """Hands over the clips that are in the scratch file, if there are any."""
        if self._num_clips:
            self._send(self._first, self._num_clips)
            self._first, self._num_clips, self._sent = self._first + self._num_clips, 0, True

    def wait(self) -> None:
        """Waits until the task has read everything that was handed over."""
        if self._sent:
            self._taken()
            self._sent = False


def _write(descriptor: int, stored: memoryview, place: int) -> None:
    done = 0
    try:
        while done < len(stored):
            done += os.pwrite(descriptor, stored[done:], place + done)
    except OSError as error:
        folder = tempfile.gettempdir()
        raise ScratchError(
            f"cannot write pixels to {folder}: {error.strerror or error}; free space there, or set TMPDIR"
        ) from error
