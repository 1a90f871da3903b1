"""What the documentation names exists: files, links, functions, jobs and their flags; and the README stays short."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.benchmarks import ablation_report

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "vmoco/METHOD.md", "cluster/README.md"]
# Named as history, written by the reader, or on their way into this repository.
ELSEWHERE = {"cluster/kubernetes/door.yaml", "docker/.env"}
NAMED = re.compile(r"(?<![\w/.:<-])(?:vmoco|jobs|tests|cluster|docker)/[\w.*/-]*[\w*/]")


def text(page: str) -> str:
    return (ROOT / page).read_text()


def test_the_readme_is_a_front_page() -> None:
    """It has fewer than 150 lines, and its pictures together less than 400 KB."""
    assert len(text("README.md").splitlines()) < 150
    pictures = [ROOT / path for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text("README.md"))]
    assert pictures
    assert all(picture.stat().st_size < 100_000 for picture in pictures)
    assert sum(picture.stat().st_size for picture in pictures) < 400_000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Each relative link names a file, and each anchor a title of that file."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    """Each path below one of the top folders exists; a pattern matches at least one file."""
    for path in set(NAMED.findall(text(page))) - ELSEWHERE:
        assert any(ROOT.glob(path.rstrip("/"))), f"{page} names {path}"


def test_the_method_names_functions_that_exist() -> None:
    """In METHOD.md's table of formulas, each function, method and class is defined in the file beside it."""
    rows = re.findall(r"^\|.*\]\(([\w/]+\.py)\): ((?:`[\w.]+`(?:, )?)+) \|$", text("vmoco/METHOD.md"), re.MULTILINE)
    assert len(rows) > 15
    for path, names in rows:
        defined = set()
        for node in ast.parse((ROOT / "vmoco" / path).read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            if isinstance(node, ast.ClassDef):
                defined |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        missing = set(re.findall(r"`([\w.]+)`", names)) - defined
        assert not missing, f"vmoco/{path} does not define {missing}"


def commands() -> list[tuple[str, tuple[str, ...], frozenset[str]]]:
    """Every command line of a job in the pages: its file, its subcommands and its flags."""
    found = set()
    for page in PAGES:
        lines = [line for line in text(page).splitlines() if line.startswith("    ")]
        for line in [*lines, *re.findall(r"`([^`]+)`", text(page))]:
            for job, rest in re.findall(r"(jobs/\w+\.py)([^|;&]*)", line):
                words = shlex.split(rest, comments=True)
                plain = tuple(word for word in words if re.fullmatch("[a-z]+", word))
                takes = {"jobs/pretrain.py": 1, "jobs/sweep.py": 1, "jobs/registry.py": 1, "jobs/check.py": 2}.get(
                    job, 0
                )
                found.add((job, plain[:takes], frozenset(word for word in words if word.startswith("--"))))
    return sorted(found, key=str)


@cache
def help_of(job: str, subcommands: tuple[str, ...]) -> str:
    command = [sys.executable, job, *subcommands, "--help"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True).stdout


def test_the_jobs_know_the_flags_in_the_commands() -> None:
    """Each flag and subcommand of a printed command is in the job's own --help; the quick start is among them."""
    found = commands()
    assert ("jobs/ingest.py", (), frozenset({"--videos", "--output", "--held-out-percent"})) in found
    assert len(found) > 12
    for job, subcommands, flags in found:
        if flags or subcommands:
            shown = help_of(job, subcommands)
            unknown = {flag for flag in flags if not re.search(rf"{re.escape(flag)}(?![\w.-])", shown)}
            assert not unknown, f"{job} {' '.join(subcommands)} does not know {unknown}"


def test_the_flags_in_the_text_exist() -> None:
    """Each dotted flag that a page mentions in a sentence is a setting of a pretraining."""
    shown = help_of("jobs/pretrain.py", ("demo",))
    for page in PAGES:
        for flag in set(re.findall(r"(--[a-z]+\.[a-z-]+)", text(page))):
            assert re.search(rf"{re.escape(flag)}(?![\w.-])", shown), f"{page} names {flag}"


def test_make_has_the_targets_that_are_named() -> None:
    """Each `make TARGET` of the pages is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", text(page), re.MULTILINE))
        assert named <= targets, f"{page} names {named - targets}"


def test_the_ablation_finds_its_place() -> None:
    """METHOD.md has both markers between which the benchmark writes its tables, once and in order."""
    before, rest = text("vmoco/METHOD.md").split(ablation_report._BEGIN)
    tables, _ = rest.split(ablation_report._END)
    assert "\n| MoCo | " in tables
    assert ablation_report.METHOD == ROOT / "vmoco/METHOD.md"
    assert before
