"""What ``unroll``, ``vectorize`` and ``parallel`` share: they say how a loop runs."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from convsched.ir import Block, Body, Kind, Loop, Program, Stage, Statement
from convsched.ir.walk import holding, rebuilt
from convsched.schedule.checks import checked, fail, require_loop
from convsched.schedule.legality import carried
from convsched.schedule.step import Step


def with_kind(program: Program, step: Step, loops: Sequence[str], kind: Kind) -> Program:
    """The program with all loops of some names run so."""
    for loop in loops:
        require_loop(program, step, loop)
    named = frozenset(loops)

    def change(statement: Statement) -> Statement:
        if not isinstance(statement, Block) or named.isdisjoint(statement.facts.names):
            return statement
        inside = holding(statement, within(statement.body))
        if isinstance(inside, Loop) and inside.var in named and inside.kind != kind:
            return replace(inside, kind=kind)
        return inside

    def within(body: Body) -> Body:
        return rebuilt(body, [change(statement) for statement in body])

    return checked(program, step, program.with_body(within))


def require_independent(program: Program, step: Step, stage: Stage, loop: Loop,
                        private: Set[str] = frozenset()) -> None:
    """Raise if iterations of a loop depend on each other, but for what is in tensors private to each."""
    if loop.extent == 1:
        return
    shared = [leaf for leaf in loop.leaves if leaf.tensor not in private]
    found = carried((loop.var,), shared, stage.extents)
    if found is not None:
        raise fail(program, step, f"iterations of {loop.var} depend on each other through {found[1]}",
                   "choose a loop of the output", loop.var)
