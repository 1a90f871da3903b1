"""Fresh virtual environments that hold a few installed packages with what they require, and nothing else.

Linked ones have the packages of the environment of the tests, those that the metadata of the roots ask for: to install
torch anew takes minutes and gigabytes. An installed one is what pip makes of the project. A mixed one has some packages
linked and others by pip.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements(roots: Iterable[str], *, extras: Iterable[str] = ()) -> set[str]:
    """Names of the distributions that the roots (requirements as pip takes them) need here, themselves included."""
    found: dict[str, set[str]] = {}
    todo = [Requirement(root) for root in roots]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        new = (set(wanted.extras) | {""}) - found.get(name, set())
        if not new:
            continue
        found.setdefault(name, set()).update(new)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if any(requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in new):
                todo.append(requirement)
    return set(found)


def link(names: Iterable[str], packages: Path) -> None:
    """Links the distributions of those names, as they are installed here, into a folder of packages."""
    for name in names:
        distribution = importlib.metadata.distribution(name)
        root = Path(str(distribution.locate_file("")))
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (packages / top).is_symlink():  # several distributions may share a folder
                (packages / top).symlink_to(root / top)


def light_environment(folder: Path, *roots: str, without: Iterable[str] = ()) -> Path:
    """Makes the environment; returns its Python.

    Args:
        folder: of the environment.
        roots: requirements, such as "torch" or "vmoco[cluster]".
        without: distributions that must not be among what the roots need.
    """
    names = requirements(roots)
    assert not names & {canonicalize_name(name) for name in without}, "the roots need what they should not"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    link(names, packages)
    return folder / "bin" / "python"


def mixed_environment(
    folder: Path, *wanted: str, reused: Iterable[str], constraints: Iterable[str], sources: Iterable[Path] = ()
) -> Path:
    """Makes an environment in which pip installs what is wanted, beside packages that are linked; returns its Python.

    Args:
        folder: of the environment; a folder beside it gets the links.
        wanted: requirements as pip takes them.
        reused: names of distributions that are linked as they are here.
        constraints: lines of a constraints file of pip.
        sources: packages that are linked too, such as the folder vmoco/.
    """
    # Outside of the environment: pip takes what is there, and removes nothing from it.
    linked = folder.with_name(f"{folder.name}-linked")
    linked.mkdir(parents=True)
    link(reused, linked)
    for source in sources:
        (linked / source.name).symlink_to(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "linked.pth").write_text(f"{linked}\n")
    listed = folder / "constraints.txt"
    listed.write_text("".join(f"{line}\n" for line in constraints))
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--only-binary", ":all:", "-c", str(listed), *wanted], check=True)
    return python


def installed_environment(folder: Path, *roots: str, without: Iterable[str] = ()) -> Path:
    """The same by pip: installs this project, at the versions of the lock; returns the environment's Python.

    Args:
        folder: of the environment.
        roots: "vmoco", with extras if wanted.
        without: distributions that must not be there afterwards.
    """
    project = Path(__file__).parents[1]
    source = folder.with_name("source")
    shutil.copytree(project / "vmoco", source / "vmoco", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.lock"):
        shutil.copy(project / name, source)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    words = [str(source) + root.removeprefix("vmoco") for root in roots]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "-c", str(source / "requirements.lock"), *words], check=True)
    listed = subprocess.run([*pip, "list", "--format", "json"], check=True, capture_output=True, text=True)
    names = {canonicalize_name(row["name"]) for row in json.loads(listed.stdout)}
    assert not names & {canonicalize_name(name) for name in without}, "pip installed what a light install does not need"
    return python
