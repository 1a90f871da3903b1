"""Imports go one way, heavy libraries stay where they belong, and files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("vmoco/**/*.py"), *ROOT.glob("jobs/*.py")])

# Who may import a library; all others may not, not even inside a function.
HOMES = {
    "ray": {
        "vmoco.job",
        "vmoco.sweep.sweep",
        "vmoco.sweep.trial_callback",
        "vmoco.evaluate.embed",
        "vmoco.evaluate.evaluate",
        "vmoco.cluster.check",
        "vmoco.data.distribute",
        "vmoco.train.launch",
        "vmoco.train.worker",
        "vmoco.train.machines",
        "vmoco.train.system_metrics",
        "vmoco.train.channel",
        "vmoco.train.evaluation",
        "vmoco.ray_internals",
        "vmoco.cluster.reservation",
    },
    "mlflow": {
        "vmoco.tracking",
        "vmoco.encoders.registry",
        "vmoco.encoders.encoder_program",
        "vmoco.mlflow_internals",
    },
    "av": {
        "vmoco.data.container",
        "vmoco.data.damage",
        "vmoco.data.opening",
        "vmoco.data.pictures",
        "vmoco.data.pixels",
        "vmoco.data.probing",
        "vmoco.data.reports",
    },
    "optuna": {"vmoco.sweep.space"},
    "plotly": {"vmoco.sweep.report"},
    "faiss": {"vmoco.evaluate.knn"},
    "sklearn": {"vmoco.evaluate.probe", "vmoco.evaluate.gallery"},
    "transformers": {"vmoco.encoders.modeling_vmoco"},
}

# Files that an export copies into its folder, where they are not part of a package: they import nothing of vmoco but
# each other, and that in the relative way of transformers.
COPIED = {
    "vmoco.encoders.encoder_program",
    "vmoco.encoders.modeling_vmoco",
    "vmoco.encoders.video_network",
    "vmoco.model.transformer",
}

# Modules of Ray and MLflow that are private by their name, or by their documentation.
PRIVATE = re.compile(r"\b(?:(?:ray|mlflow)(?:\.\w+)*\._\w+|ray\.experimental|mlflow\.system_metrics)[\w.]*")

# From the ground up: a module imports from its own package and from those below it. `vmoco.cluster` stands beside the
# packages that use it: it knows settings, storage, tracker and networks, and nothing of a training run.
GROUND = {
    "vmoco",
    "vmoco.clip_settings",
    "vmoco.config",
    "vmoco.job_settings",
    "vmoco.places",
    "vmoco.presets",
    "vmoco.storage",
    "vmoco.seed",
}
GROUND |= {
    "vmoco.architectures",
    "vmoco.settings",
    "vmoco.progress",
    "vmoco.spool",
    "vmoco.tracking",
    "vmoco.job",
    "vmoco.own_folder",
    "vmoco.mlflow_internals",
    "vmoco.ray_internals",
    "vmoco.unused_settings",
}
PACKAGES = ("data", "model", "encoders", "cluster", "evaluate", "train", "sweep")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int:
    if module.startswith("jobs"):
        return len(PACKAGES) + 2
    if module == "vmoco.demo":
        return len(PACKAGES) + 1
    if module in GROUND:
        return 0
    parts = module.split(".")
    assert parts[1] in PACKAGES, f"{module} has no layer: give it one in this test"
    return 1 + PACKAGES.index(parts[1])


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, anywhere in it, and whether that happens at import time."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    later = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if name_of(path) in COPIED and node.level == 1:
                module = f"{name_of(path).rpartition('.')[0]}.{module}"
            else:
                assert node.level == 0, f"{path} has a relative import: write it out"
            for alias in node.names:  # `from vmoco import storage` imports vmoco.storage
                inner = ROOT / (module + "." + alias.name).replace(".", "/")
                found = inner.with_suffix(".py").exists() or inner.is_dir()
                yield (f"{module}.{alias.name}" if found else module), id(node) not in later


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    """No module imports from a layer above its own, and nothing but the demo imports a job."""
    own = layer(name_of(path))
    for imported, _ in imports(path):
        if imported.split(".")[0] in ("vmoco", "jobs"):
            lazily_from_the_top = name_of(path) == "vmoco" and imported == "vmoco.encoders.package"
            assert layer(imported) <= own or lazily_from_the_top, f"{path} imports {imported}, which lies above it"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_ray_mlflow_and_av_stay_at_home(path: Path) -> None:
    """ray, mlflow and av are imported only by the few modules that are about them."""
    for imported, _ in imports(path):
        library = imported.split(".")[0]
        if library in HOMES:
            assert name_of(path) in HOMES[library], f"{path} imports {library}: only {sorted(HOMES[library])} may"


@pytest.mark.parametrize("module", sorted(COPIED))
def test_files_that_are_copied_import_nothing_of_vmoco(module: str) -> None:
    """They run where vmoco is not installed."""
    for imported, _ in imports(ROOT / f"{module.replace('.', '/')}.py"):
        assert imported.split(".")[0] != "vmoco" or imported in COPIED, f"{module} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_private_names_of_ray_and_mlflow_stay_in_their_file(path: Path) -> None:
    """Only `ray_internals` names a private module of Ray, and only `mlflow_internals` one of MLflow."""
    if name_of(path) in ("vmoco.ray_internals", "vmoco.mlflow_internals"):
        return
    found = PRIVATE.findall(path.read_text())
    assert not found, f"{path} names {found[0]}: move it to vmoco/ray_internals.py or vmoco/mlflow_internals.py"


@pytest.mark.parametrize("module", ["vmoco", "vmoco.config", "vmoco.job", "vmoco.cluster.local", "vmoco.demo"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    """Importing the package, its settings or the cluster's owner loads neither torch nor Ray nor MLflow."""
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'mlflow', 'av'}} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout == "[]\n"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_fit_in_a_head(path: Path) -> None:
    """A file of the library has at most 450 lines, and a job at most 80."""
    lines = len(path.read_text().splitlines())
    allowed = 80 if name_of(path).startswith("jobs") else 450
    assert lines <= allowed, f"{path} has {lines} lines, allowed are {allowed}"


def test_no_file_is_named_after_nothing() -> None:
    """No utils, misc, helpers or common: a file is named after what is in it."""
    assert not {"utils", "misc", "helpers", "common"} & {path.stem for path in SOURCES}


def test_loading_an_encoder_imports_nothing_of_training() -> None:
    """A process that pulls an encoder loads no file of `vmoco.train`, `vmoco.evaluate` or `vmoco.sweep`."""
    code = (
        "import sys, vmoco.encoders.package; print(sorted(name for name in sys.modules if name.startswith('vmoco.')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "vmoco.encoders.package" in loaded
    assert not any(f"vmoco.{package}" in loaded for package in ("train", "evaluate", "sweep"))
