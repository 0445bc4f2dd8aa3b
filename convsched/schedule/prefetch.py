"""``prefetch``: fetch data into the caches before they are used."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convsched.ir import Body, Loop, Program, map_loops
from convsched.ir.ahead import part_of
from convsched.schedule.checks import fail, require_loop
from convsched.schedule.step import Step


@dataclass(frozen=True)
class Prefetch(Step):
    """Ask the caches, in each iteration of a loop, for what a tensor gives so many iterations later.

    >>> from convsched.ir.examples import nests, product
    >>> print(nests(Prefetch("w", "c", 16).apply(product(4, 64))))
    conv:
      for m < 4: for c < 64 (w 16 ahead):
        y[m] += x[c] * w[m, c]

    A hint that changes no result. Iterations must read parts of the tensor that follow each other in memory, as
    those of packed weights do; the last iterations fetch what lies behind, which an outer loop often reads next. It
    is a last step: loops that later steps make of the loop have no hint.
    """

    GRAMMAR = "prefetch TENSOR at LOOP ahead=ITERATIONS"
    tensor: str
    at: str
    ahead: int

    def apply(self, program: Program) -> Program:
        require_loop(program, self, self.at)
        found = program.by_name.get(self.tensor)
        if found is None or found.role in ("register", "constant"):
            names = ", ".join(t.name for t in program.tensors if t.role not in ("register", "constant"))
            raise fail(program, self, f"there is no tensor {self.tensor} in memory", f"use one of {names}")
        if self.ahead < 1:
            raise fail(program, self, f"the distance is {self.ahead} iterations", "use a positive integer", self.at)

        def change(loop: Loop) -> Body:
            if loop.kind in ("unroll", "vector"):
                raise fail(program, self, f"{self.at} is a loop of kind {loop.kind}", "choose a loop around it",
                           self.at)
            if part_of(program, loop, self.tensor) is None:
                return (loop,)
            others = tuple(pair for pair in loop.ahead if pair[0] != self.tensor)
            return (replace(loop, ahead=(*others, (self.tensor, self.ahead))),)

        after = program.with_body(lambda body: map_loops(body, self.at, change))
        if after == program:
            raise fail(program, self, f"iterations of {self.at} do not read parts of {self.tensor} one after another",
                       "store it in the order of use first, or choose another loop", self.at)
        return after
