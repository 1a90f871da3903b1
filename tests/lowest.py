"""Environments with the lowest versions that pyproject.toml allows, to test that its ranges say the truth.

pip finds everything that vmoco does not name in the environment of the tests, at the versions of the lock file, and
installs other versions only where the lowest ones need them. So a new release of such a package changes no result.
torch and torchvision come from there too, because each version of torch takes gigabytes.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.environments import mixed_environment, requirements

ROOT = Path(__file__).parents[1]
REUSED = {"torch", "torchvision"}


def named(root: str) -> list[Requirement]:
    """What pyproject.toml asks for under a root: "vmoco" or, with extras, "vmoco[cluster,onnx]"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in Requirement(root).extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in (*project["dependencies"], *extras)]


def lowest(wanted: Iterable[Requirement]) -> dict[str, Version]:
    """The lowest version that all of the requirements allow, by name; ValueError for one without a lower bound."""
    found: dict[str, Version] = {}
    for requirement in wanted:
        bounds = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(
                f"pyproject.toml has {requirement} without a lower bound: write {requirement.name}>=VERSION"
            )
        name = canonicalize_name(requirement.name)
        found[name] = max(bounds[0], found.get(name, bounds[0]))
    return found


def lowest_environment(folder: Path, root: str, without: Iterable[str] = ()) -> Path:
    """Makes the environment; returns its Python.

    Args:
        folder: of the environment; a folder beside it gets links to what is reused.
        root: "vmoco", with extras if wanted.
        without: distributions that must not be there.
    """
    wanted = named(root)
    pins = {name: version for name, version in lowest(wanted).items() if name not in REUSED}
    if "mlflow" in pins:  # which asks for its own version of the other
        pins["mlflow-skinny"] = pins["mlflow"]
    reused = requirements(map(str, wanted)) - set(pins)
    python = mixed_environment(
        folder,
        *map(str, wanted),
        reused=reused,
        constraints=[f"{name}=={version}" for name, version in pins.items()],
        sources=[ROOT / "vmoco"],
    )
    (packages,) = folder.glob("lib/*/site-packages")
    installed = {canonicalize_name(each.name) for each in importlib.metadata.distributions(path=[str(packages)])}
    unwanted = (reused | installed) & {canonicalize_name(name) for name in without}
    assert not unwanted, f"what {root} needs at its lowest holds {unwanted}"
    return python
