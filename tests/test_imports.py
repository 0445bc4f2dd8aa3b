"""The order of imports, and who may read the clock, the environment and the CPU.

Read from the source, so that an import inside a function counts too; one under ``TYPE_CHECKING`` does not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (  # left may not see right
    "errors lazy names parameters problem problem_text machine conditions layers networks classic_networks "
    "mobile_networks bilinear sums accuracy",
    "ir",
    "text verify interp reference address baseline examples",
    "schedule steps placement legality checks peeling skipping prefetching fusing inlining footprint",
    "recipes tiles toeplitz strassen_recipe analytic algorithms lower",
    "kernels",
    "autotune",
    "graph explain",
    "api __init__ cli cache_cli tune_cli verify_cli",
    "bench",
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}
FOLDERS = {"convsched": "convsched", "kernels": "convsched.kernels", "autotune": "convsched.autotune",
           "bench": "bench"}
CLOCKS = {f"{name}{ending}" for name in ("perf_counter", "time", "monotonic", "process_time", "thread_time")
          for ending in ("", "_ns")} | {"clock_gettime", "clock_gettime_ns", "now", "utcnow", "today"}
ENVIRONMENT = {"environ", "environb", "getenv", "cpu_count", "process_cpu_count", "sched_getaffinity"}


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name, packages as ``name.__init__``."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts])] = path
    return found


MODULES = modules()
IDS = [name for name in MODULES if not name.startswith("bench.conftest")]


def top(module: str) -> str:
    """The word of ``ORDER`` for a module."""
    parts = module.split(".")
    return parts[0] if parts[0] == "bench" else [*parts, "__init__"][1]


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that is not under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for statement in child.orelse:
                yield statement
                yield from nodes(statement)
            continue
        yield child
        yield from nodes(child)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of what a file imports; ``from a import b`` gives ``a.b`` if that is a module."""
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                known = inner in MODULES or f"{inner}.__init__" in MODULES
                yield node.lineno, inner if known else node.module


def test_every_module_has_a_place_in_the_order() -> None:
    assert {top(name) for name in MODULES} == set(RANK)


@pytest.mark.parametrize("module", IDS)
def test_left_does_not_see_right(module: str) -> None:
    own, path = RANK[top(module)], MODULES[module]
    wrong = [f"{path.relative_to(ROOT)}:{line} imports {name}" for line, name in imports(path)
             if name.split(".")[0] in ("convsched", "bench") and RANK[top(name)] > own]
    assert not wrong, f"{top(module)} may not see it: {wrong}"


@pytest.mark.parametrize("module", IDS)
def test_only_kernels_use_numba_and_llvmlite(module: str) -> None:
    if top(module) == "kernels" or module.startswith("bench."):
        return
    wrong = [(line, name) for line, name in imports(MODULES[module])
             if name.split(".")[0] in ("numba", "llvmlite")]
    assert not wrong


def uses(path: Path, owners: set[str], names: set[str]) -> list[str]:
    """Where a file uses ``owner.name``, or imports the name from the owner."""
    found = []
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in names:
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else (
                node.value.id if isinstance(node.value, ast.Name) else "")
            if owner in owners:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {owner}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module in owners:
            found += [f"{path.relative_to(ROOT)}:{node.lineno} {node.module}.{alias.name}"
                      for alias in node.names if alias.name in names]
    return found


@pytest.mark.parametrize("module", IDS)
def test_only_measure_and_bench_read_clocks(module: str) -> None:
    if module == "convsched.autotune.measure" or module.startswith("bench."):
        return
    assert uses(MODULES[module], {"time", "datetime", "date"}, CLOCKS) == []


@pytest.mark.parametrize("module", IDS)
def test_only_machine_reads_the_environment(module: str) -> None:
    if module == "convsched.machine":
        return
    assert uses(MODULES[module], {"os", "multiprocessing"}, ENVIRONMENT) == []


def test_the_checks_see_what_they_look_for() -> None:
    assert uses(MODULES["convsched.machine"], {"os", "multiprocessing"}, ENVIRONMENT)
    assert uses(MODULES["convsched.autotune.measure"], {"time", "datetime", "date"}, CLOCKS)
    assert any(name == "convsched.ir" for _, name in imports(MODULES["convsched.steps"]))
    assert any(name == "convsched.peeling" for _, name in imports(MODULES["convsched.schedule"]))


def test_tests_refuse_to_run_against_another_checkout(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    done = subprocess.run([sys.executable, "-m", "pytest", "tests"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"convsched.kernels is imported from {ROOT}" in done.stderr
    assert "pip install -e" in done.stderr
