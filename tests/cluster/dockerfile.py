"""Runs the build steps of a Dockerfile without Docker: each stage is a layer over this machine's own root.

In a private mount namespace each stage gets an overlay (what it writes lands in its own folder), and its RUN steps run
in a chroot, with the paths, the user and the variables that Docker would give them. FROM an image of a registry is
this machine's root: a Debian with Python, as there.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """The steps of one FROM ... AS name: (instruction, rest of the line)."""

    name: str
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def parse(path: Path) -> dict[str, Stage]:
    """The stages of a Dockerfile, in order."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in re.sub(r"\\\n", " ", text).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            image, _, name = rest.partition(" AS ")
            current = stages[name] = Stage(name, image)
        elif instruction:
            assert current is not None
            current.steps.append((instruction, rest.strip()))
    return stages


def build(path: Path, *, target: str, context: Path, work: Path, arguments: Mapping[str, str], command: str) -> str:
    """Builds a stage and runs a command in it as its user.

    Args:
        path: the Dockerfile.
        target: the stage.
        context: folder that COPY takes from, with its .dockerignore already applied.
        work: empty folder for the layers.
        arguments: build arguments; they are also set in the environment of each RUN, as Docker does with ARG.
        command: shell command that runs in the result.

    Returns:
        What the command printed.

    Raises:
        AssertionError: a step failed; with its output.
    """
    script = ["set -euo pipefail"]
    stages, done = parse(path), set[str]()

    def add(stage: Stage) -> tuple[dict[str, str], str, str]:
        """Builds a stage after what it needs; its variables, folder and user go on to its children."""
        variables, folder, user = (
            {"PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"},
            "/",
            "0",
        )
        if stage.parent in stages:
            variables, folder, user = add(stages[stage.parent])
        for instruction, rest in stage.steps:
            if instruction == "COPY" and rest.startswith("--from="):
                add(stages[rest.removeprefix("--from=").split()[0]])
        root = work / stage.name / "root"
        first = stage.name not in done
        done.add(stage.name)
        if first:
            script.append(f"mkdir -p {work}/{stage.name}/upper {work}/{stage.name}/tmp {root}")
            if stage.parent in stages:  # a layer below another one may not lie inside it, so what is below is copied
                script.append(f"cp -a --reflink=auto {work}/{stage.parent}/upper/. {work}/{stage.name}/upper")
            script.append(
                f"mount -t overlay overlay -o lowerdir=/,upperdir={work}/{stage.name}/upper,"
                f"workdir={work}/{stage.name}/tmp {root}"
            )
            if stage.parent not in stages:  # people of this machine are not in the image, nor is their number 1000
                script.append(
                    f"sed -i -E '/:[0-9]+:1[0-9]{{3}}:/d; /:x:1[0-9]{{3}}:/d' {root}/etc/passwd {root}/etc/group"
                )
                # This machine's Python and packages may lie in folders that only their owner may enter; in the layer,
                # all may.
                places = [Path(sys.base_prefix), *(Path(value) for value in arguments.values() if value[:1] == "/")]
                entered = sorted({f"{root}{parent}" for place in places for parent in place.parents})
                script.append(f"chmod o+x {' '.join(entered)}")
            script.append(f"for each in dev proc; do mount --rbind /$each {root}/$each; done")
        for instruction, rest in stage.steps:
            if instruction == "ENV":
                for word in shlex.split(rest):
                    name, _, value = word.partition("=")
                    variables[name] = value.replace("$PATH", variables["PATH"])
            elif instruction == "WORKDIR":
                folder = rest
                script.append(f"mkdir -p {root}{folder}")
            elif instruction == "USER":
                user = rest
            elif instruction == "RUN" and first:
                given = " ".join(f"{k}={shlex.quote(v)}" for k, v in {**variables, **arguments}.items())
                inside = f"cd {folder} && {rest}"
                script.append(
                    f"env -i HOME=/root {given} /usr/sbin/chroot {root} bash -euo pipefail -c {shlex.quote(inside)} >&2"
                )
            elif instruction == "COPY" and first:
                *sources, place = [word for word in rest.split() if not word.startswith("--from=")]
                source_root = context
                if rest.startswith("--from="):
                    source_root = work / rest.removeprefix("--from=").split()[0] / "root"
                place = place if place.startswith("/") else f"{folder}/{place}"
                for source in sources:
                    taken = source_root / source.lstrip("./")
                    whole = not place.endswith("/") and len(sources) == 1
                    script.append(f"mkdir -p {root}{place if not whole else Path(place).parent}")
                    script.append(f"cp -rT {taken} {root}{place}" if whole else f"cp -r {taken} {root}{place}")
        return dict(variables), folder, user

    variables, folder, user = add(stages[target])
    given = " ".join(f"{k}={shlex.quote(v)}" for k, v in {**variables, **arguments}.items())
    root = work / target / "root"
    inside = f"cd {folder} && {command}"
    script.append(
        f"env -i HOME=/home/vmoco {given} /usr/sbin/chroot --userspec={user}:{user} {root} "
        f"bash -c {shlex.quote(inside)}"
    )
    ran = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", "\n".join(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:] + ran.stdout[-1000:]
    return ran.stdout
