"""``unroll``: write out the iterations of loops."""

from __future__ import annotations

from dataclasses import dataclass

from convsched.ir import Program
from convsched.schedule.kinds import with_kind
from convsched.schedule.step import Step


@dataclass(frozen=True)
class Unroll(Step):
    """Write out the iterations of loops.

    >>> from convsched.ir.examples import nests, product
    >>> print(nests(Unroll(("c",)).apply(product(16, 4))))
    conv:
      for m < 16:
        unroll c < 4:
          y[m] += x[c] * w[m, c]
    """

    GRAMMAR = "unroll LOOP ..."
    loops: tuple[str, ...]

    def apply(self, program: Program) -> Program:
        return with_kind(program, self, self.loops, "unroll")
