"""Clips reach the scratch file one after the other, or a few at a time that are read before the next ones come."""

from __future__ import annotations

import tempfile

import numpy as np

from vmoco.data.scratch import PieceSink


def clip(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.full((2, 1, 1, 3), number, np.uint8)


def test_pieces_are_read_before_they_are_overwritten() -> None:
    """Two clips a piece, five clips. Then decoding starts again: numbers begin with 0, and what waits is dropped."""
    said: list[tuple[int, int] | str] = []
    with tempfile.TemporaryFile() as file:

        def taken() -> None:
            file.seek(0)
            said.append(" ".join(map(str, file.read()[::6])))

        sink = PieceSink(
            file.fileno(), clips_per_piece=2, send=lambda first, count: said.append((first, count)), taken=taken
        )
        for number in range(5):
            sink.add(clip(number))
        assert said == [(0, 2), "0 1", (2, 2), "2 3"]
        sink.restart()
        said.clear()
        for number in range(10, 13):
            sink.add(clip(number))
        sink.flush()
        sink.flush()
        sink.wait()
        sink.wait()
        assert said == [(0, 2), "10 11", (2, 1), "12 11"]
        assert len(file.read()) == 0, "the file holds one piece"
