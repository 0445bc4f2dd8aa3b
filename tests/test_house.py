"""How large a file and a function may be, and that each package says what it is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES, FUNCTION_LINES = 400, 50
README_LINES = range(5, 31)
FOLDERS = ("convsched", "kernels", "autotune", "bench")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PACKAGES = [*(path.parent for path in sorted((ROOT / "convsched").glob("*/__init__.py"))), ROOT / "kernels",
            ROOT / "autotune"]


def sizes(source: str) -> Iterator[tuple[str, int]]:
    """The functions of a source with their lines, decorators left out.

    >>> list(sizes("@cache\\ndef f():\\n    return 1\\n"))
    [('f', 2)]
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= FILE_LINES
    assert [(name, lines) for name, lines in sizes(source) if lines > FUNCTION_LINES] == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_each_package_says_what_it_is_for(package: Path) -> None:
    text = (package / "README.md").read_text()
    assert text.startswith(f"# {package.name}: ")
    assert "\nContract: " in text
    assert len(text.splitlines()) in README_LINES
    named = [word for word in text.split("`") if word.endswith((".py", "/")) and " " not in word]
    places = (package, ROOT, ROOT / "convsched")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_documents_name_what_exists() -> None:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    named = [word.strip("`") for word in text.replace("`", " ` ").split() if word.endswith((".py", ".md"))]
    assert [name for name in named if not any((place / name).exists() for place in (
        ROOT, ROOT / "convsched" / "networks"))] == []


def test_what_runs_before_a_commit_runs_in_ci() -> None:
    """Nothing is fetched, and each command is one of CI's, or part of its tests."""
    lines = (ROOT / ".pre-commit-config.yaml").read_text().splitlines()
    assert [line.split(": ")[1] for line in lines if "repo: " in line] == ["local"]
    ci = (ROOT / ".ci" / "run").read_text()
    entries = [line.split(": ")[1] for line in lines if "entry: " in line]
    assert len(entries) == 4
    assert all(entry in ci or entry.startswith("pytest -q ") for entry in entries)
