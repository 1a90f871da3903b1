"""Queues metrics and documents for a tracker: in memory, and on disk where they must outlive their process.

Training never waits for the tracker. A thread sends in order. It sends again what failed for now (no connection, 429,
5xx), and sets aside what the tracker refuses for good (400, 413). `save` writes what has not been sent yet into one
file of the run's folder. It runs before a checkpoint becomes visible, which is enough: a run that was killed starts
again from a checkpoint and makes the later points again. Points that the tracker has already are left out then, by the
latest step that it knows of each name, because it can neither replace nor remove them. Points that were measured by the
clock, such as those of a machine, are never made again, so they are all sent.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vmoco import storage

_RETRY_SECONDS = 2.0
_BATCH = 900  # points in one request; MLflow takes at most 1,000

Document = str | bytes


@dataclass(frozen=True)
class Points:
    """Numbers of one step."""

    step: int
    time_ms: int
    """When they were made, in milliseconds since 1970."""
    numbers: dict[str, float]
    once: bool = False
    """Whether they were measured by the clock: a run that resumes makes the points of a step again, but not these."""


class RefusedError(Exception):
    """The tracker refuses this for good: it is too large, not allowed, or not valid."""


class Tracker(Protocol):
    """Where a spool sends. A call that raises is made again, unless it raises RefusedError."""

    def latest_steps(self) -> dict[str, int]:
        """Of each name, the latest step that has arrived in this run."""

    def send(self, points: list[Points], documents: Mapping[str, Document]) -> None:
        """Takes points and documents; the same ones a second time change nothing."""


class Spool:
    """Sends what it is given, in the background.

    Args:
        tracker: receives it.
        name: of the tracker, for messages.
        uri: file that `save` writes, and whose content is sent first; None to keep nothing on disk.
        may_send: raises RuntimeError once this process has lost its right to the run; then nothing more is sent.
        warn: receives a warning for each name that the tracker refuses for good.

    Attributes:
        set_aside: by name, the message about what the tracker refused for good. It blocks nothing that can still be
            sent, and its content is kept in a file beside `uri`, with `-refused` in its name.
    """

    def __init__(
        self,
        tracker: Tracker,
        *,
        name: str,
        uri: str | None = None,
        may_send: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._tracker = tracker
        self._name = name
        self._uri = uri
        self._may_send = may_send
        self._warn = warn
        self.set_aside: dict[str, str] = {}
        self._refused: tuple[list[Points], dict[str, Document]] = ([], {})
        self._points: collections.deque[Points] = collections.deque()
        self._documents: dict[str, Document] = {}
        self._on_disk = False
        self._wake = threading.Condition()
        self._saving = threading.Lock()
        self._closing = False
        self._last_error = ""
        self._load()
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def points(
        self, numbers: Mapping[str, float], *, step: int, time_ms: int | None = None, once: bool = False
    ) -> None:
        """Queues one point per name.

        Args:
            numbers: by name.
            step: of the points.
            time_ms: when they were made, in milliseconds since 1970; now when left out.
            once: see `Points`.
        """
        with self._wake:
            made = int(time.time() * 1000) if time_ms is None else time_ms
            self._points.append(Points(step, made, dict(numbers), once))
            self._wake.notify()

    def document(self, name: str, content: Document) -> None:
        """Queues an artifact, a text or the bytes of a file; of two under one name the later counts."""
        with self._wake:
            self._documents[name] = content
            self._wake.notify()

    def save(self) -> None:
        """Writes what has not been sent yet to disk; removes the file when everything has been sent.

        Raises:
            ValueError: it cannot be written.
        """
        if self._uri is None:
            return
        with self._saving:
            with self._wake:
                points, documents = list(self._points), dict(self._documents)
            if points or documents:
                storage.write_atomic(self._uri, _to_json(points, documents))
                self._on_disk = True
            elif self._on_disk:
                storage.delete_file(self._uri)
                self._on_disk = False

    def close(self, *, timeout: float = 30.0) -> str:
        """Sends what is queued, for at most `timeout` seconds; what is left then is saved.

        Returns:
            An error message about what could not be sent yet; empty when nothing is left. What the tracker refused for
            good is in `set_aside` and does not count.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        self.save()
        left = sum(len(points.numbers) for points in self._points) + len(self._documents)
        if not left:
            return ""
        kept = f"; they are kept in {self._uri} and sent when the run is resumed" if self._uri else ""
        return f"{left} points or documents could not be sent to the tracker {self._name}: {self._last_error}{kept}"

    def _load(self) -> None:
        if self._uri is None:
            return
        storage.delete_leftovers(self._uri)
        with contextlib.suppress(FileNotFoundError):  # an earlier life of the run may have set things aside
            self._refused = _from_json(storage.read_bytes(refused_uri(self._uri)))
        try:
            content = storage.read_bytes(self._uri)
        except FileNotFoundError:
            return
        points, documents = _from_json(content)
        self._points.extend(points)
        self._documents |= documents
        self._on_disk = True

    def _run(self) -> None:
        taken: dict[str, int] | None = None
        while True:
            with self._wake:
                while not (self._points or self._documents or self._closing):
                    self._wake.wait()
                if self._closing and not (self._points or self._documents):
                    return
                batch = self._next_batch()
                documents = dict(self._documents)
            try:
                self._may_send()
            except RuntimeError:
                self._give_up()
                return
            except Exception as error:  # the storage does not answer: ask again
                self._wait(error)
                continue
            try:
                if taken is None:
                    taken = self._tracker.latest_steps()
                self._send_points([_without(points, taken) for points in batch])
                with self._wake:
                    for _ in batch:
                        self._points.popleft()
                for name, content in documents.items():
                    self._send_document(name, content)
                    with self._wake:
                        if self._documents.get(name) == content:
                            del self._documents[name]
            except Exception as error:  # whatever the tracker does, training goes on and the points stay queued
                self._wait(error)

    def _send_points(self, rows: list[Points]) -> None:
        """Sends rows together; where the tracker refuses them, one number at a time, so that only that one is lost."""
        try:
            self._tracker.send(rows, {})
            return
        except RefusedError:
            pass
        num_before = len(self._refused[0])
        for row in rows:
            for name, number in row.numbers.items():
                single = replace(row, numbers={name: number})
                if single in self._refused[0]:  # this batch is sent again, because the connection broke in its middle
                    continue
                try:
                    self._tracker.send([single], {})
                except RefusedError as error:
                    self._refused[0].append(single)
                    self._report_refused(f"the metric {name}", error)
        if len(self._refused[0]) > num_before:
            self._save_refused()

    def _send_document(self, name: str, content: Document) -> None:
        try:
            self._tracker.send([], {name: content})
        except RefusedError as error:
            self._refused[1][name] = content
            self._report_refused(f"the document {name}", error)
            self._save_refused()

    def _report_refused(self, what: str, error: RefusedError) -> None:
        """Warns once for each name: a metric that is not valid is refused at every step."""
        message = f"the tracker {self._name} refuses {what} for good ({error})"
        if what not in self.set_aside:
            place = f"; it is kept in {refused_uri(self._uri)}" if self._uri else ""
            self._warn(f"warning: {message}{place}")
        self.set_aside.setdefault(what, message)

    def _save_refused(self) -> None:
        if self._uri is not None:
            with contextlib.suppress(ValueError):  # the storage cannot be written: `save` raises the same error
                storage.write_atomic(refused_uri(self._uri), _to_json(*self._refused))

    def _next_batch(self) -> list[Points]:
        batch: list[Points] = []
        size = 0
        for points in self._points:
            size += len(points.numbers)
            if batch and size > _BATCH:
                break
            batch.append(points)
        return batch

    def _give_up(self) -> None:
        with self._wake:
            self._points.clear()
            self._documents.clear()
            self._uri = None

    def _wait(self, error: Exception) -> None:
        self._last_error = f"{type(error).__name__}: {error}".splitlines()[0]
        time.sleep(_RETRY_SECONDS)


def refused_uri(uri: str) -> str:
    """The file of what the tracker refused for good, beside the file of a spool."""
    return f"{uri.removesuffix('.json')}-refused.json"


def _without(points: Points, taken: Mapping[str, int]) -> Points:
    """The points of a step without those that an earlier life of the run has sent."""
    if points.once:  # the tracker keeps a point of the same time, step and value only once
        return points
    return replace(
        points, numbers={name: value for name, value in points.numbers.items() if points.step > taken.get(name, -1)}
    )


def _to_json(points: list[Points], documents: Mapping[str, Document]) -> bytes:
    texts = {name: content for name, content in documents.items() if isinstance(content, str)}
    files = {
        name: base64.b64encode(content).decode() for name, content in documents.items() if isinstance(content, bytes)
    }
    rows = [[row.step, row.time_ms, row.numbers, row.once] for row in points]
    return json.dumps({"points": rows, "texts": texts, "files": files}).encode()


def _from_json(content: bytes) -> tuple[list[Points], dict[str, Document]]:
    values: dict[str, Any] = json.loads(content)
    documents: dict[str, Document] = dict(values["texts"])
    documents |= {name: base64.b64decode(text) for name, text in values["files"].items()}
    return [Points(*row) for row in values["points"]], documents
