"""``unroll``, ``vectorize`` and ``parallel``: say how a loop runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from convsched.ir import Body, Kind, Loop, Program, find_loops, leaves, map_loops
from convsched.ir.walk import extents_of, indices
from convsched.schedule.checks import checked, fail, require_loop
from convsched.schedule.legality import carried, fills_first, without
from convsched.schedule.step import _Checked


@dataclass(frozen=True)
class Unroll(_Checked):
    """Write out the iterations of loops; see ``steps.set_kind``."""

    loops: tuple[str, ...]

    def __str__(self) -> str:
        return f"unroll {' '.join(self.loops)}"


@dataclass(frozen=True)
class Vectorize(_Checked):
    """Run loops as vector instructions; see ``steps.set_kind``."""

    loops: tuple[str, ...]

    def __str__(self) -> str:
        return f"vectorize {' '.join(self.loops)}"


@dataclass(frozen=True)
class Parallel(_Checked):
    """Divide a loop among the threads; see ``steps.set_kind``."""

    loop: str

    def __str__(self) -> str:
        return f"parallel {self.loop}"


def _each(program: Program, loops: tuple[str, ...], kind: Literal["unroll", "vector"]) -> Program:
    for loop in loops:
        program = set_kind(program, loop, kind)
    return program


def set_kind(program: Program, loop: str, kind: Kind) -> Program:
    """``unroll``, ``vectorize`` or ``parallel``: say how a loop runs.

    >>> from convsched.ir.examples import nests, product
    >>> from convsched.schedule.reorder import reorder
    >>> swapped = reorder(product(16, 4), ("c", "m"))
    >>> print(nests(set_kind(set_kind(swapped, "m", "vector"), "c", "unroll")))
    conv:
      unroll c < 4: vector m < 16:
        y[m] += x[c] * w[m, c]
    >>> print(nests(set_kind(product(16, 4), "m", "parallel")))
    conv:
      parallel m < 16: for c < 4:
        y[m] += x[c] * w[m, c]

    A vector loop holds statements only. Iterations of vector and parallel loops must not depend on each
    other.
    """
    verb = {"unroll": "unroll", "vector": "vectorize", "parallel": "parallel", "serial": "serial"}[kind]
    step = f"{verb} {loop}"
    require_loop(program, step, loop)
    for stage in program.stages:
        extents = extents_of(stage.body)
        for found in find_loops(stage.body, loop):
            if kind == "vector" and any(isinstance(s, Loop) for s in found.body):
                raise fail(program, step, f"{loop} is not innermost", "reorder it to the end first", loop)
            if kind in ("vector", "parallel"):
                _require_independent(program, step, found, extents, kind)
    return checked(program, step, program.with_body(
        lambda body: map_loops(body, loop, lambda found: (replace(found, kind=kind),))))


def _require_independent(program: Program, step: str, loop: Loop, extents: Mapping[str, int],
                         kind: Kind) -> None:
    """Iterations may share nothing; those of a parallel loop may each fill a tensor that is private to it."""
    if loop.extent == 1:
        return
    inside = {leaf.tensor for _, leaf in leaves(loop.body)}
    private = {name for name in inside if kind == "parallel" and _is_private(program, name, loop)}
    tensor = carried(loop.var, without(loop.body, private), extents)
    if tensor is not None:
        raise fail(program, step, f"iterations of {loop.var} depend on each other through {tensor}",
                   "choose a loop of the output", loop.var)


def _is_private(program: Program, name: str, loop: Loop) -> bool:
    """A local or register tensor that only this loop touches, and that each iteration fills first."""
    if program.tensor(name).role not in ("local", "register"):
        return False

    def count(body: Body) -> int:
        return sum(used == name for _, leaf in leaves(body) for used, _ in indices(leaf))

    total = sum(count(stage.body) for stage in program.stages)
    return fills_first(loop.body, name) and total == sum(
        count(f.body) for s in program.stages for f in find_loops(s.body, loop.var))
