"""A system without Linux's own calls decodes videos too: macOS is imitated by what it does not have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.data.videos import images, write_video
from tests.made import encoder_of
from tests.waiting import wait_until
from vmoco.encoders.package import load_encoder, write_folder

ROOT = Path(__file__).parents[2]

# Python imports a file of this name first, in the decoder's process too. It takes away what only Linux has.
MACOS = """
import builtins, ctypes, io, os, sys
sys.modules["resource"] = None  # its import fails
honest = {module: module.open for module in (builtins, io, os)}
def guarded(module):
    def opened(path, *rest, **options):
        if os.fspath(path).startswith("/proc") if isinstance(path, (str, os.PathLike)) else False:
            raise FileNotFoundError(2, "there is no /proc", path)
        return honest[module](path, *rest, **options)
    return opened
for module in honest:
    module.open = guarded(module)
library = ctypes.CDLL
class Library(library):
    def __getattr__(self, name):
        if name == "prctl":
            raise AttributeError(name)
        return super().__getattr__(name)
ctypes.CDLL = Library
for name in ("fork", "forkpty", "memfd_create", "pidfd_open", "sched_getaffinity", "sched_setaffinity", "eventfd",
             "posix_fadvise", "posix_fallocate", "copy_file_range", "splice", "O_TMPFILE", "O_DIRECT", "setns"):
    if hasattr(os, name):
        delattr(os, name)
"""

USE = """
import multiprocessing, os, sys
import torch, vmoco
if __name__ == "__main__":
    assert not hasattr(os, "fork") and not hasattr(os, "sched_getaffinity")
    encoder, path = vmoco.load_encoder(sys.argv[1]), sys.argv[2]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = {"here": encoder.embed(path), "spawned": pool.apply(encoder.embed, (path,)),
                 "dense": encoder.embed_dense(path, every_seconds=0.2).features}
    torch.save(found, sys.argv[3])
"""

# Starts a decoder, prints its process and waits until it is killed.
OWNER = """
import sys, time
from vmoco.data.clips import ClipPlan
from vmoco.data.decoder import Decoder
decoder = Decoder()
decoder.probe(sys.argv[1], ClipPlan(4), part_seconds=9, seconds=60)
print(decoder._process.pid, flush=True)
time.sleep(100)
"""


def macos(folder: Path) -> dict[str, str]:
    """The environment of a process that finds only what macOS has too."""
    (folder / "sitecustomize.py").write_text(MACOS)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def test_an_encoder_is_loaded_and_embeds_a_file_without_linux(tmp_path: Path) -> None:
    """Here and in a process that was spawned, the features are those of Linux."""
    encoder = encoder_of()
    (tmp_path / "encoder").mkdir()
    write_folder(tmp_path / "encoder", encoder.backbone, "r3d_nano", encoder.preprocessing, lineage={})
    path = write_video(tmp_path / "a.mp4", images(40))
    (tmp_path / "use.py").write_text(USE)
    command = [sys.executable, str(tmp_path / "use.py"), str(tmp_path / "encoder"), str(path), str(tmp_path / "found")]
    used = subprocess.run(
        command, env=macos(tmp_path), capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert used.returncode == 0, used.stderr
    found, loaded = torch.load(tmp_path / "found"), load_encoder(str(tmp_path / "encoder"))
    for name, expected in (
        ("here", loaded.embed(path)),
        ("spawned", loaded.embed(path)),
        ("dense", loaded.embed_dense(path, every_seconds=0.2).features),
    ):
        torch.testing.assert_close(found[name], expected)


def test_the_decoder_ends_with_its_task_without_linux(tmp_path: Path) -> None:
    """kill -9 of the task ends the decoder too."""
    path = write_video(tmp_path / "a.mp4", images(20))
    command = [sys.executable, "-c", OWNER, str(path)]
    owner = subprocess.Popen(command, env=macos(tmp_path), stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert owner.stdout
    pid = int(owner.stdout.readline())
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max data size +unlimited", limits), "the imitation does not reach the decoder's process"
    owner.kill()
    owner.wait()
    wait_until(lambda: not alive(pid), "the end of the decoder", seconds=60)


def alive(pid: int) -> bool:
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listing.stdout.strip() not in ("", "Z")
