"""Which processes of a session or with a mark in their environment are alive: the independent look that tests take."""

from __future__ import annotations

import subprocess


def with_mark(mark: str) -> list[str]:
    """The processes whose command line or environment holds the text, as `ps` shows them; not the look itself."""
    listing = subprocess.run(["ps", "axeww", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True)
    return [line[:120] for line in listing.stdout.splitlines() if mark in line and "ps axeww" not in line]


def of_session(session: int) -> list[str]:
    """The processes of the session, those apart that have ended and wait for their parent."""
    listing = subprocess.run(["ps", "ax", "-o", "sid=,stat=,pid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    return [row[2][:120] for row in rows if int(row[0]) == session and not row[1].startswith("Z")]
