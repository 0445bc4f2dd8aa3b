"""What every step checks before and after: the names it is given, and the kinds of the loops it leaves.

All of them raise ``ScheduleError`` with the nest printed and the loop marked.
"""

from __future__ import annotations

from collections.abc import Sequence

from convsched.errors import ScheduleError
from convsched.ir import Body, Loop, Program, find_loops, loop_names
from convsched.legality import race
from convsched.text import print_nest


def fail(program: Program, step: str, why: str, fix: str, mark: str | None = None) -> ScheduleError:
    """The error of a step, with the nest printed and a loop marked."""
    return ScheduleError(step, why, fix, print_nest(program, mark))


def require_loop(program: Program, step: str, name: str) -> None:
    """Raise unless some stage has a loop of that name."""
    names = [n for stage in program.stages for n in loop_names(stage.body)]
    if name not in names:
        known = ", ".join(dict.fromkeys(names))
        raise fail(program, step, f"there is no loop {name}", f"use one of {known}")


def require_new(program: Program, step: str, names: Sequence[str]) -> None:
    """Raise if one of the names is already a loop's, or they are not distinct identifiers."""
    for position, name in enumerate(names):
        if not name.replace(".", "_").isidentifier():
            raise fail(program, step, f"{name!r} is no name", "use letters, digits, _ and .")
        if name == "root":
            raise fail(program, step, "root is where stage copies once, before all loops", "use another name")
        if name in names[:position]:
            raise fail(program, step, f"{name} is named twice", "use two names")
        if any(find_loops(s.body, name) for s in program.stages):
            raise fail(program, step, f"a loop {name} exists already", "choose another name", name)


def checked(before: Program, step: str, after: Program) -> Program:
    """The program after a step, if vector and parallel loops still hold what they may."""
    for stage in after.stages:
        found = _misplaced(stage.body)
        if found is not None:
            loop, why, fix = found
            raise fail(before, step, why, fix, loop)
    shared = race(after)
    if shared is not None:
        loop, tensor = shared
        raise fail(before, step, f"threads that share out {loop} would meet in {tensor} without waiting for "
                   "each other", "make parallel a loop that all uses of it are inside", loop)
    return after


def _misplaced(body: Body, parallel: str | None = None) -> tuple[str, str, str] | None:
    """A loop where its kind may not be: its name, the rule, and the fix."""
    for loop in body:
        if not isinstance(loop, Loop):
            continue
        inside = next((s.var for s in loop.body if isinstance(s, Loop)), None)
        if loop.kind == "vector" and inside is not None:
            return (loop.var, f"{inside} would be inside the vector loop {loop.var}, which may hold "
                    "statements only", "vectorize last, and the innermost loop")
        if loop.kind == "parallel" and parallel is not None:
            return (loop.var, f"{loop.var} would be parallel inside the parallel loop {parallel}",
                    "make one of them parallel")
        found = _misplaced(loop.body, loop.var if loop.kind == "parallel" else parallel)
        if found is not None:
            return found
    return None
