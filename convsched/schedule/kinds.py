"""What ``unroll``, ``vectorize`` and ``parallel`` share: they say how a loop runs."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from convsched.ir import Kind, Loop, Program, Stage, map_loops
from convsched.ir.walk import extents_of
from convsched.schedule.checks import checked, fail, require_loop
from convsched.schedule.legality import carried, without
from convsched.schedule.step import Step


def with_kind(program: Program, step: Step, loop: str, kind: Kind) -> Program:
    """The program with all loops of a name run so."""
    require_loop(program, step, loop)
    return checked(program, step, program.with_body(
        lambda body: map_loops(body, loop, lambda found: (replace(found, kind=kind),))))


def require_independent(program: Program, step: Step, stage: Stage, loop: Loop,
                        private: Set[str] = frozenset()) -> None:
    """Raise if iterations of a loop depend on each other, but for what is in tensors private to each."""
    if loop.extent == 1:
        return
    tensor = carried(loop.var, without(loop.body, private), extents_of(stage.body))
    if tensor is not None:
        raise fail(program, step, f"iterations of {loop.var} depend on each other through {tensor}",
                   "choose a loop of the output", loop.var)
