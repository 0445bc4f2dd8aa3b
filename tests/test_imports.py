"""The house: which package may see which, no circles, and who may read the clock, the environment and the CPU.

Read from the source, so that an import inside a function counts too; one under ``TYPE_CHECKING`` does not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (  # a package or top file sees those on lower floors, and of its own floor those that do not see it
    "errors lazy options",
    "problem ir algebra",
    "machine schedule lower networks",
    "recipes model",
    "plan",
    "kernels",
    "autotune",
    "api benchmark explain graph",
    "__init__ cli",
    "bench",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
ROOMS = 21  # packages and top files, at most
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


def room(module: str) -> str:
    """The package or top file of a module, as ``FLOORS`` names it."""
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


def known(name: str) -> str | None:
    """The project's module of a dotted name, or None."""
    return next((found for found in (name, f"{name}.__init__") if found in MODULES), None)


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file that is not under ``if TYPE_CHECKING``."""
    return tuple(nodes(ast.parse(path.read_text())))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of what a file imports; ``from a import b`` gives ``a.b`` if that is a module."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, known(alias.name) or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                yield node.lineno, known(f"{node.module}.{alias.name}") or known(node.module) or node.module


@cache
def graph() -> dict[str, set[str]]:
    """The modules of the project that each module imports."""
    return {name: {found for _, found in imports(path) if found in MODULES and found != name}
            for name, path in MODULES.items()}


def between(rooms: Mapping[str, str]) -> dict[str, set[str]]:
    """The arrows between rooms, given the room of each module."""
    arrows: dict[str, set[str]] = {name: set() for name in rooms.values()}
    for name, found in graph().items():
        if name in rooms:
            arrows[rooms[name]] |= {rooms[other] for other in found if other in rooms} - {rooms[name]}
    return arrows


def circle(arrows: Mapping[str, Iterable[str]]) -> list[str]:
    """Some names that lead back to the first, or none.

    >>> circle({"a": "b", "b": "c", "c": "b"}), circle({"a": "bc", "b": "c"})
    (['b', 'c', 'b'], [])
    """
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name):], name]
        if name in done:
            return []
        found = next((inner for other in sorted(arrows.get(name, ())) if (inner := walk(other, [*path, name]))), [])
        done.add(name)
        return found

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def test_every_module_has_a_floor_and_the_house_is_small() -> None:
    assert {room(name) for name in MODULES} == set(FLOOR)
    assert len(set(FLOOR) - {"__init__", "bench"}) <= ROOMS
    assert len(FLOORS) <= 10


@pytest.mark.parametrize("module", IDS)
def test_imports_point_down(module: str) -> None:
    own, path = FLOOR[room(module)], MODULES[module]
    wrong = [f"{path.relative_to(ROOT)}:{line} imports {name}" for line, name in imports(path)
             if name in MODULES and FLOOR[room(name)] > own]
    assert not wrong, f"{room(module)} may not see it: {wrong}"


def test_rooms_make_no_circle() -> None:
    assert circle(between({name: room(name) for name in MODULES})) == []


def test_modules_make_no_circle() -> None:
    faces = {name for name in MODULES if name.endswith(".__init__")}
    assert circle({name: found - faces for name, found in graph().items() if name not in faces}) == []


@pytest.mark.parametrize("face", ["ir", "problem", "schedule", "machine"])
def test_inside_a_package_its_face_is_not_used(face: str) -> None:
    """The face imports all of the package: who is inside and asks the face makes a circle."""
    inside = [name for name in MODULES if name.startswith(f"convsched.{face}.") and not name.endswith("__init__")]
    assert [name for name in inside if f"convsched.{face}.__init__" in graph()[name]] == []
    assert len(MODULES[f"convsched.{face}.__init__"].read_text().splitlines()) < 40


def test_every_package_is_installed() -> None:
    packages = {name.removesuffix(".__init__") for name in MODULES if name.endswith("__init__")}
    text = (ROOT / "pyproject.toml").read_text()
    assert {name for name in packages if f'"{name}"' not in text} == set()


@pytest.mark.parametrize("module", IDS)
def test_only_kernels_use_numba_and_llvmlite(module: str) -> None:
    if room(module) == "kernels" or module.startswith("bench."):
        return
    wrong = [(line, name) for line, name in imports(MODULES[module])
             if name.split(".")[0] in ("numba", "llvmlite")]
    assert not wrong


def uses(path: Path, owners: set[str], names: set[str]) -> list[str]:
    """Where a file uses ``owner.name``, or imports the name from the owner."""
    found = []
    for node in nodes_of(path):
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
    if module == "convsched.autotune.measure.measure" or module.startswith("bench."):
        return
    assert uses(MODULES[module], {"time", "datetime", "date"}, CLOCKS) == []


@pytest.mark.parametrize("module", IDS)
def test_only_machine_reads_the_environment(module: str) -> None:
    if room(module) == "machine":
        return
    assert uses(MODULES[module], {"os", "multiprocessing"}, ENVIRONMENT) == []


def test_the_checks_see_what_they_look_for() -> None:
    assert uses(MODULES["convsched.machine.host"], {"os", "multiprocessing"}, ENVIRONMENT)
    assert uses(MODULES["convsched.autotune.measure.measure"], {"time", "datetime", "date"}, CLOCKS)
    assert "convsched.ir.__init__" in graph()["convsched.schedule.split"]
    assert "convsched.schedule.peel" in graph()["convsched.schedule.schedule"]


def test_tests_refuse_to_run_against_another_checkout(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    done = subprocess.run([sys.executable, "-m", "pytest", "tests"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"convsched.kernels is imported from {ROOT}" in done.stderr
    assert "pip install -e" in done.stderr
