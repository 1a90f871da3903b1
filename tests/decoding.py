"""A decoder without a process of its own, so that a test sees what it does and can change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vmoco.data import decoder as served
from vmoco.data import video
from vmoco.data.ledger import VideoError


class InProcess(served.Decoder):
    """Answers requests as the decoder's process does, but for its limits of time and memory."""

    def _ask(self, request: Any, *, seconds: float) -> Any:
        message = served._REQUEST.dump_json(request)
        nobody: Any = None  # only clips in pieces need another side
        answer = served._answer(served._REQUEST.validate_json(message), self.scratch.fileno(), nobody)
        if isinstance(answer, served._Rejected):
            raise VideoError(answer.stage, answer.reason, answer.message, transient=answer.transient)
        return answer

    def count_frames(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
        """From now on frames are counted; returns a function that tells how many were decoded since its last call."""
        numbers: list[int] = []
        honest = video.decoded

        def counting(*arguments: Any, **options: Any) -> Iterator[Any]:
            for frame in honest(*arguments, **options):
                numbers.append(len(numbers))
                yield frame

        def count() -> int:
            found = len(numbers)
            numbers.clear()
            return found

        monkeypatch.setattr(video, "decoded", counting)
        return count
