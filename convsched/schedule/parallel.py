"""``parallel``: divide a loop among the threads."""

from __future__ import annotations

from dataclasses import dataclass

from convsched.ir import Loop, Program, find_loops
from convsched.schedule.checks import require_loop
from convsched.schedule.kinds import require_independent, with_kind
from convsched.schedule.legality import fills_first
from convsched.schedule.step import Step


@dataclass(frozen=True)
class Parallel(Step):
    """Divide a loop among the threads. Its iterations share nothing, but each may fill a tensor that is private to it.

    >>> from convsched.ir.examples import nests, product
    >>> print(nests(Parallel("m").apply(product(16, 4))))
    conv:
      parallel m < 16: for c < 4:
        y[m] += x[c] * w[m, c]
    """

    GRAMMAR = "parallel LOOP"
    loop: str

    def apply(self, program: Program) -> Program:
        require_loop(program, self, self.loop)
        for stage in program.stages:
            for loop in find_loops(stage.body, self.loop):
                private = {name for name in loop.facts.tensors if _is_private(program, name, loop)}
                require_independent(program, self, stage, loop, private)
        return with_kind(program, self, (self.loop,), "parallel")


def _is_private(program: Program, name: str, loop: Loop) -> bool:
    """A local or register tensor that only this loop touches, and that each iteration fills first."""
    if program.tensor(name).role not in ("local", "register"):
        return False

    users = [stage for stage in program.stages if name in stage.facts.tensors]
    total = sum(name in leaf.facts.tensors for stage in users for leaf in stage.leaves)
    inside = sum(name in leaf.facts.tensors for stage in users for found in find_loops(stage.body, loop.var)
                 for leaf in found.leaves)
    return total == inside and fills_first(loop.body, name)
