"""Whole files between this machine's disk and wherever a URI says: published, fetched, compared."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

import pyarrow.fs as pafs

from vmoco.storage import filesystem, local_path, open_atomic, patiently


def publish(path: Path, uri: str) -> None:
    """Gives a finished local file its place and name; it appears there whole, and is gone from where it was.

    Raises:
        ValueError: the place cannot be written; the message says why.
    """
    found, target = filesystem(uri)
    try:
        if isinstance(found, pafs.LocalFileSystem) and os.path.isdir(os.path.dirname(target)):
            with contextlib.suppress(OSError):  # on another disk: copied below
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(path, target)
                return
        with open(path, "rb") as source, open_atomic(uri) as file:
            shutil.copyfileobj(source, file, length=2**22)
        path.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {uri}: {error.strerror or error}") from error


def file_sha256(uri: str) -> str:
    """SHA-256 of a file, read in pieces.

    Raises:
        FileNotFoundError: it is not there.
    """
    digest = hashlib.sha256()
    found, path = filesystem(uri)
    with found.open_input_stream(path) as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def make_folder(uri: str) -> None:
    """Makes a folder with those above it, where the storage has folders; it may be there already."""
    if (local := local_path(uri)) is not None:
        local.mkdir(parents=True, exist_ok=True)


def fetch(uri: str, path: Path) -> None:
    """Copies a file onto this machine's disk.

    Raises:
        FileNotFoundError: it is not there.
    """
    found, source = filesystem(uri)

    def copy() -> None:
        with found.open_input_stream(source) as stream, open(path, "wb") as file:
            shutil.copyfileobj(stream, file, length=2**22)

    patiently(copy)
