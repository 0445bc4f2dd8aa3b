"""``peel``: give some iterations their own copy of the nest, and drop what never runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from convsched.ir import (
    Affine,
    Block,
    Body,
    Let,
    Load,
    Loop,
    Program,
    Reduce,
    Statement,
    Store,
    find_loops,
    holding,
    leaves,
    map_indices,
    map_leaves,
    map_value,
    rebuilt,
    substitute,
)
from convsched.ir.simplify import simplify
from convsched.ir.walk import indices, map_touching
from convsched.schedule.checks import checked, fail, require_loop
from convsched.schedule.step import Step

Which = Literal["first", "last", "guarded", "overlap"]


@dataclass(frozen=True)
class Peel(Step):
    """Give iterations of a loop their own copies of the body, with guards resolved in each.

    The first or the last iteration; "guarded", at both ends, each in which some guard may fail.

    >>> from convsched.ir.examples import nests, product
    >>> from convsched.schedule.split import Split
    >>> ragged = Split("m", 4, "m0", "m1", tail="mask").apply(product(7, 2))
    >>> print(nests(ragged))
    conv:
      for m0 < 2: for m1 < 4: for c < 2:
        if 4 m0 + m1 < 7: y[4 m0 + m1] += x[c] * w[4 m0 + m1, c]
    >>> print(nests(Peel("m0").apply(ragged)))
    conv:
      for m0 < 1: for m1 < 4: for c < 2:
        y[4 m0 + m1] += x[c] * w[4 m0 + m1, c]
      for m1 < 3: for c < 2:
        y[m1 + 4] += x[c] * w[m1 + 4, c]

    "overlap" moves the last iteration back so that it is as full as the others (see ``Split``). A parallel
    loop's own copy stays in a parallel loop, of one iteration, so that one thread runs it; and the copy of an
    outermost loop that holds registers stays in a loop, with registers of its own.
    """

    GRAMMAR = "peel LOOP [first|last|guarded|overlap]"
    loop: str
    which: Which = "last"

    def apply(self, program: Program) -> Program:
        require_loop(program, self, self.loop)
        if self.which == "overlap":
            _require_guard(program, self)

        def alone(found: Loop, copy: Body) -> Body:
            holds = found.kind == "parallel" or (len(copy) > 1 and _is_home(program, found))
            return (replace(found, extent=1, body=copy),) if holds else copy

        def change(found: Loop, around: Mapping[str, int]) -> Body:
            if self.which == "overlap":
                if not _guards(found):
                    return (found,)
                copy = _overlapped(program, self, found)
                return (replace(found, extent=found.extent - 1), *alone(found, copy))
            first, last = {"first": (1, 0), "last": (0, 1)}.get(self.which) or _guarded(found, around)
            count = found.extent - first - last
            if count < 1:
                return (found,)
            at = {value: alone(found, substitute(found.body, {self.loop: Affine.of(value)}))
                  for value in (*range(first), *range(found.extent - last, found.extent))}
            body = substitute(found.body, {self.loop: Affine.of(self.loop) + first})
            copies = [statement for copy in at.values() for statement in copy]
            before = sum(len(at[value]) for value in range(first))
            return (*copies[:before], replace(found, extent=count, body=body), *copies[before:])

        peeled = program.with_body(lambda body: _map_loops_within(body, self.loop, {}, change))
        return checked(program, self, simplify(_own_registers(peeled)))


def _map_loops_within(body: Body, var: str, around: Mapping[str, int],
                      change: Callable[[Loop, Mapping[str, int]], Body]) -> Body:
    """``map_loops``, with the extents of the loops around."""
    out: list[Statement] = []
    for statement in body:
        if not isinstance(statement, Block) or var not in statement.facts.names:
            out.append(statement)
        elif isinstance(statement, Loop) and statement.var == var:
            out += change(statement, around)
        else:
            extents = {**around, statement.var: statement.extent}
            out.append(holding(statement, _map_loops_within(statement.body, var, extents, change)))
    return rebuilt(body, out)


def _guarded(loop: Loop, around: Mapping[str, int]) -> tuple[int, int]:
    """How many iterations at the start and at the end have a guard that may fail; none if all have."""
    greatest: set[tuple[int, int]] = set()  # of a guard: its coefficient of the loop, and the most of the rest
    for inside, leaf in leaves(loop.body):
        for guard in leaf.where:
            if factor := guard.coefficient(loop.var):
                extents = {**around, **{found.var: found.extent for found in inside}}
                greatest.add((factor, guard.without((loop.var,)).bounds(extents)[1]))
    fails = [any(factor * value + most >= 0 for factor, most in greatest) for value in range(loop.extent)]
    if all(fails):
        return 0, 0
    return fails.index(False), fails[::-1].index(False)


def _is_home(program: Program, loop: Loop) -> bool:
    """Whether a loop is an outermost one with register tensors, which belong to one outermost statement."""
    return (any(loop is statement for stage in program.stages for statement in stage.body)
            and bool(_registers(program, loop)))


def _registers(program: Program, statement: Statement) -> set[str]:
    """The register tensors that a statement touches."""
    return {name for name in statement.facts.tensors if program.tensor(name).role == "register"}


def _guards(loop: Loop) -> set[Affine]:
    return {w for leaf in loop.leaves for w in leaf.where if loop.var in w.variables}


def _require_guard(program: Program, step: Peel) -> None:
    loop = step.loop
    if not any(_guards(found) for stage in program.stages for found in find_loops(stage.body, loop)):
        raise fail(program, step, f"no iteration of {loop} is cut short", "split it with tail=mask first",
                   loop)


def _overlapped(program: Program, step: Peel, loop: Loop) -> Body:
    """The last iteration moved back by what its guard cuts off.

    The guard is ``factor loop + inner < extent`` where ``inner`` counts from 0 to ``factor - 1``. Every index
    is a multiple of ``factor loop + inner`` plus the rest, so moving the sum by a number is moving to
    other, earlier points of it; and what is computed for these again must come out the same.
    """
    guards = _guards(loop)
    if len(guards) != 1:
        raise fail(program, step, f"{len(guards)} guards depend on {loop.var}", "use peel", loop.var)
    digit = next((d for around, _ in leaves(loop.body) for d in around
                  if isinstance(d, Let) and loop.var in d.of.variables), None)
    if digit is not None:
        raise fail(program, step, f"{digit.var} is a digit of {loop.var}", "use peel", loop.var)
    guard = next(iter(guards))
    factor = guard.coefficient(loop.var)
    position = Affine(guard.terms)
    within = position - Affine.of(loop.var) * factor
    excess = factor * loop.extent + guard.constant
    if not _counts(within, factor, loop) or not 0 < excess < factor:
        raise fail(program, step, f"the guard on {position} is not cut by {loop.var} alone", "use peel",
                   loop.var)
    if loop.extent == 1:
        raise fail(program, step, f"{loop.var} has no full iteration to move into", "use mask or a smaller "
                   "factor", loop.var)
    tensor = _summed_outside(loop)
    if tensor is not None:
        raise fail(program, step, f"{tensor} would be summed twice", "use peel", loop.var)
    tensor = _read_in_place(program, loop)
    if tensor is not None:
        raise fail(program, step, f"{tensor} may share memory with the output and would be read after it is "
                   "written", "use peel", loop.var)
    for _, leaf in leaves(loop.body):
        for name, index in indices(leaf):
            if not all(_follows(a, position, loop.var, factor, excess) for a in index):
                raise fail(program, step, f"an index of {name} cannot move by {excess} of {factor}",
                           "use peel", loop.var)

    def move(a: Affine) -> Affine:
        moved = a.substitute({loop.var: Affine.of(loop.extent - 1)})
        return moved - a.coefficient(loop.var) * excess // factor

    return map_leaves(loop.body, lambda leaf: map_indices(leaf, move))


def _counts(within: Affine, factor: int, loop: Loop) -> bool:
    """Whether an expression of loops inside goes from 0 to ``factor - 1``."""
    for around, leaf in leaves(loop.body):
        if any(loop.var in w.variables for w in leaf.where):
            extents = {found.var: found.extent for found in around}
            if not within.variables <= extents.keys() or within.bounds(extents) != (0, factor - 1):
                return False
    return True


def _follows(a: Affine, position: Affine, var: str, factor: int, excess: int) -> bool:
    """Whether an index depends on the loop through the guarded position only, if at all."""
    coefficient = a.coefficient(var)
    if coefficient == 0:
        return True
    return coefficient * excess % factor == 0 and all(
        a.coefficient(name) * factor == c * coefficient for name, c in position.terms)


def _summed_outside(loop: Loop) -> str | None:
    """A tensor that the loop reduces into and does not set anew inside."""
    stored = {leaf.tensor for _, leaf in leaves(loop.body) if isinstance(leaf, Store)}
    summed = {leaf.tensor for _, leaf in leaves(loop.body) if isinstance(leaf, Reduce)}
    return min(summed - stored, default=None)


def _read_in_place(program: Program, loop: Loop) -> str | None:
    """An input that is read just where an output is stored, so that a caller may pass one array for both."""
    for _, leaf in leaves(loop.body):
        if program.tensor(leaf.tensor).role == "output":
            for load in leaf.loads:
                if program.tensor(load.tensor).role == "input" and load.index == leaf.index:
                    return load.tensor
    return None


def _own_registers(program: Program) -> Program:
    """The program with a register tensor of its own for each outermost nest of a stage that uses one."""
    for number, stage in enumerate(program.stages):
        body = list(stage.body)
        seen: set[str] = set()
        for position, statement in enumerate(body):
            used = _registers(program, statement)
            for name in sorted(used & seen):
                copy = next(f"{name}_{i}" for i in range(1, 1 + len(program.tensors) + 1)
                            if f"{name}_{i}" not in program.by_name)
                program = program.with_tensor(replace(program.tensor(name), name=copy))
                body[position], = _renamed((body[position],), name, copy)
            seen |= used
        changed = rebuilt(stage.body, body)
        if changed is not stage.body:
            stages = (*program.stages[:number], replace(stage, body=changed), *program.stages[number + 1:])
            program = replace(program, stages=stages)
    return program


def _renamed(body: Body, old: str, new: str) -> Body:
    def name(tensor: str) -> str:
        return new if tensor == old else tensor
    return map_touching(body, old, lambda leaf: replace(
        leaf, tensor=name(leaf.tensor),
        value=map_value(leaf.value, lambda load: Load(name(load.tensor), load.index))))
