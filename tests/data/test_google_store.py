"""gs://, as far as an emulator shows: the functions of `storage`, and ingest from a bucket into it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from tests.data import videos
from tests.google_store import BUCKET, GoogleStore
from tests.names import FOLDER, NAMES
from vmoco import storage
from vmoco.data.check import check
from vmoco.data.manifest import Manifest
from vmoco.data.shard_reader import ClipReader

ROOT = Path(__file__).parents[2]
HOME = f"gs://{BUCKET}"
OUT = f"out {FOLDER}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoogleStore]:
    with GoogleStore(tmp_path_factory.mktemp("google")) as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


@pytest.mark.usefixtures("store")
def test_storage_reads_and_writes(tmp_path: Path) -> None:
    """Whole files, files in pieces, names with umlauts, lists, ranges, and what is not there."""
    content = os.urandom(3 * 2**20)
    storage.check_writable(f"{HOME}/a")
    storage.write_atomic(f"{HOME}/a/b é.bin", content)
    with storage.open_atomic(f"{HOME}/a/sub/c") as file:
        file.write(content[:1000])
    assert storage.list_files(f"{HOME}/a") == ["b é.bin", "sub/c"]
    assert storage.read_bytes(f"{HOME}/a/b é.bin") == content
    filesystem, path = storage.filesystem(f"{HOME}/a/b é.bin")
    with filesystem.open_input_file(path) as opened:
        assert opened.read_at(1000, 2**20) == content[2**20 : 2**20 + 1000]
    assert storage.exists(f"{HOME}/a/sub/c")
    storage.delete_folder(f"{HOME}/a/sub")
    assert not storage.exists(f"{HOME}/a/sub/c")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{HOME}/a/none")
    with pytest.raises(ValueError, match=r"cannot write gs://none/a"):
        storage.write_atomic("gs://none/a", b"content")


def test_ingest_from_a_bucket_into_it(store: GoogleStore, tmp_path: Path) -> None:
    """The job, Ray and all, with any names: shards as from disk to disk, each clip readable, nothing half done."""
    for number, name in enumerate(NAMES):
        path = videos.write_video(tmp_path / FOLDER / name, videos.images(20 + number))
        storage.write_atomic(f"{HOME}/{FOLDER}/{name}", path.read_bytes())
    manifests = []
    for place in (str(tmp_path), HOME):
        command = [sys.executable, "jobs/ingest.py", "--videos", f"{place}/{FOLDER}", "--output", f"{place}/{OUT}"]
        command += ["--num-frames", "4", "--height", "24", "--width", "32", "--held-out-percent", "0"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            command, env=environment | store.environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert check(f"{place}/{OUT}", lambda line: None) == []
        manifests.append(Manifest.load(f"{place}/{OUT}"))
    here, there = manifests
    assert here.counts == {
        "videos": len(NAMES),
        "clips": sum((20 + number) // 4 for number in range(len(NAMES))),
        "rejected": 0,
        "held_out": 0,
    }
    assert there.hash == here.hash
    assert there.shards == here.shards
    first, second = (ClipReader.of(manifest).frames(7) for manifest in manifests)  # a clip of the second video
    assert first.tolist() == second.tolist()
    names = storage.list_files(f"{HOME}/{OUT}")
    assert "contact_sheet.png" in names
    filesystem, path = storage.filesystem(f"{HOME}/{OUT}")
    listed = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    assert not [entry.path for entry in listed if entry.path.endswith(".tmp") or "probes" in entry.path]


def test_without_credentials_it_is_told_before_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow alone would try for a quarter of an hour to sign in."""
    monkeypatch.setattr(storage, "_GOOGLE_SECONDS", 2)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot write gs://bucket/a: .*OAuth2 access token"):
        storage.write_atomic(f"{HOME}/a", b"content")
    assert time.monotonic() - began < 30
