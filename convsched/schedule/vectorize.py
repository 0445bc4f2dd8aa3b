"""``vectorize``: run loops as vector instructions."""

from __future__ import annotations

from dataclasses import dataclass

from convsched.ir import Block, Program, find_loops
from convsched.schedule.checks import fail, require_loop
from convsched.schedule.kinds import require_independent, with_kind
from convsched.schedule.step import Step


@dataclass(frozen=True)
class Vectorize(Step):
    """Run loops as vector instructions. Each holds statements only, and its iterations do not depend on each other.

    >>> from convsched.ir.examples import nests, product
    >>> from convsched.schedule.reorder import Reorder
    >>> print(nests(Vectorize(("m",)).apply(Reorder(("c", "m")).apply(product(16, 4)))))
    conv:
      for c < 4:
        vector m < 16:
          y[m] += x[c] * w[m, c]
    """

    GRAMMAR = "vectorize LOOP ..."
    loops: tuple[str, ...]

    def apply(self, program: Program) -> Program:
        for name in self.loops:
            require_loop(program, self, name)
            for stage in program.stages:
                for loop in find_loops(stage.body, name):
                    if any(isinstance(statement, Block) for statement in loop.body):
                        raise fail(program, self, f"{name} is not innermost", "reorder it to the end first", name)
                    require_independent(program, self, stage, loop)
        return with_kind(program, self, self.loops, "vector")
