"""Waits for a condition instead of for a while: a slow machine makes a test slower, and never wrong."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = 120.0) -> None:
    """Returns as soon as the condition holds; asked ten times a second.

    Args:
        condition: Asked again and again.
        what: What is waited for, for the error message.
        seconds: Limit of the wait.

    Raises:
        AssertionError: The condition did not hold in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
