"""The image: clean Dockerfile, small build context without secrets, and steps that build an image without root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pip
import pytest

from tests.cluster import dockerfile

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker/Dockerfile"
BIN = Path(sys.executable).parent
CI_NEEDS_IT = "building needs root (overlay mounts)"

# Run in the finished image: the user, that vmoco is the installed one, that a job starts, and the check of node.sh.
PROOF = """
id -u; stat -c %U /data /certificates
python -c 'import vmoco; print(vmoco.__file__)'
python jobs/pretrain.py tiny 2>&1 | tail -1
RAY_USE_TLS=1 RAY_TLS_CA_CERT=/nowhere docker/node.sh true 2>&1 || true
"""


def context(place: Path) -> Path:
    """Copies what .dockerignore lets into the build: only what it names with `!`."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    for name in (line[1:] for line in lines if line.startswith("!")):
        source, to = ROOT / name, place / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, to)
    return place


def test_the_dockerfile_is_clean() -> None:
    """hadolint reports nothing."""
    said = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")


def test_the_context_is_small_and_holds_no_secret(tmp_path: Path) -> None:
    """The context is below 2 MB, contains every source of a COPY, and no file of docker/secrets.sh."""
    folder = context(tmp_path)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert not [path for path in files if path.suffix in (".env", ".key", ".crt") or path.name in (".env", "token")]
    for stage in dockerfile.parse(DOCKERFILE).values():
        for instruction, rest in stage.steps:
            if instruction == "COPY" and not rest.startswith("--from="):
                assert all((folder / source).exists() for source in rest.split()[:-1]), rest


def test_every_image_runs_without_root_and_has_a_health_check() -> None:
    """Both targets build on the stage with the user, the health check and the entry point that creates certificates."""
    stages = dockerfile.parse(DOCKERFILE)
    steps = dict(stages["node"].steps)
    assert steps["USER"] == "1000"
    assert "HEALTHCHECK" in steps
    assert steps["ENTRYPOINT"] == '["/vmoco/docker/node.sh"]'
    assert {stages[target].parent for target in ("cpu", "gpu")} == {"node"}
    assert next(reversed(stages)) == "cpu", "a build without --target gives the last stage"


def test_the_image_for_gpus_can_compile() -> None:
    """It has a C compiler, which --train.compile needs, and still ends as user 1000."""
    steps = dockerfile.parse(DOCKERFILE)["gpu"].steps
    assert any(instruction == "RUN" and " gcc " in rest for instruction, rest in steps)
    assert [rest for instruction, rest in steps if instruction == "USER"][-1] == "1000"


def test_its_steps_build_it(tmp_path: Path) -> None:
    """Run one after the other over a clean root, the steps build an image in which user 1000 can start a job.

    pip also sees the packages of this environment, so it compares each with the lock file and downloads none.
    """
    if os.geteuid() != 0 and not os.environ.get("CI"):
        pytest.skip(CI_NEEDS_IT)
    folder, work = context(tmp_path / "context"), tmp_path / "work"
    work.mkdir()
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(path.stat().st_mode | 0o011)  # user 1000 passes through them
    packages = {"PYTHONPATH": str(Path(pip.__file__).parents[1])}
    said = dockerfile.build(
        DOCKERFILE, target="cpu", context=folder, work=work, arguments=packages, command=PROOF
    ).splitlines()
    assert said[:3] == ["1000", "vmoco", "vmoco"]
    assert said[3].startswith("/opt/vmoco/lib/python3")
    assert said[4] == "error: --data.uri is missing: give the data set that jobs/ingest.py made"
    assert said[5] == "error: RAY_USE_TLS is 1 but RAY_TLS_CA_KEY is not set: set it to the path of its file"
