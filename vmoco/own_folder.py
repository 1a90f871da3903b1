"""A folder in /tmp that goes away with its owner: for the sockets, logs and token of a Ray that a process starts.

A process that is killed cannot remove its folder. So the folder says who owns it, and the next process that makes one
removes those whose owner is gone. A folder is left alone where that is not certain: it belongs to another user, was
made on another host or in another container, or names no owner.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREFIX = "vmoco-"
OWNER = "owner.json"


def make_folder(parent: Path | None = None) -> Path:
    """Makes a folder that belongs to this process, and removes those that dead processes of this user left.

    Args:
        parent: where it lies. Default: /tmp, because the paths of sockets may have 107 bytes.

    Returns:
        The folder, with a new token in its file `token`, which only this user can read.
    """
    parent = parent or Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
    remove_orphans(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    (folder / OWNER).write_text(json.dumps(_owner(os.getpid())))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_urlsafe(32))
    return folder


def remove_orphans(parent: Path) -> None:
    """Removes the folders of this user whose owner is gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it names no owner, or goes away now
            is_own = folder.lstat().st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink()
            if is_own and is_gone(json.loads((folder / OWNER).read_text())):
                shutil.rmtree(folder, ignore_errors=True)


def is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether the process that a folder names has certainly ended.

    Raises:
        KeyError: the folder does not name it completely.
    """
    here = _owner(os.getpid())
    if not here["boot"] or owner["host"] != here["host"]:
        return False  # no /proc to ask; or several hosts, or containers, share the folder
    if owner["boot"] != here["boot"]:
        return True
    if owner["pid_namespace"] != here["pid_namespace"]:
        return False
    started = _started(owner["pid"])
    return started is None or started != owner["started"]  # a later process may have got its number


def _owner(pid: int) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "pid": pid,
        "started": _started(pid),
    }


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the machine started; None where there is none that runs."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if fields and fields[0] != "Z" else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
