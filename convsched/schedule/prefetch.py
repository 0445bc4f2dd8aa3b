"""The step that fetches data into the caches before they are used."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convsched.ir import Body, Loop, Program, map_loops
from convsched.ir.ahead import part_of
from convsched.schedule.checks import fail, require_loop
from convsched.schedule.step import _Checked


@dataclass(frozen=True)
class Prefetch(_Checked):
    """Fetch what ``tensor`` gives ``ahead`` iterations later; see ``prefetching.prefetch``."""

    tensor: str
    at: str
    ahead: int

    def __str__(self) -> str:
        return f"prefetch {self.tensor} at {self.at} ahead={self.ahead}"


def prefetch(program: Program, tensor: str, at: str, ahead: int) -> Program:
    """Ask the caches, in each iteration of a loop, for what a tensor gives so many iterations later.

    >>> from convsched.ir.examples import nests, product
    >>> print(nests(prefetch(product(4, 64), "w", "c", 16)))
    conv:
      for m < 4: for c < 64 (w 16 ahead):
        y[m] += x[c] * w[m, c]

    A hint that changes no result. Iterations must read parts of the tensor that follow each other in memory, as
    those of packed weights do; the last iterations fetch what lies behind, which an outer loop often reads next. It
    is a last step: loops that later steps make of the loop have no hint.
    """
    step = f"prefetch {tensor} at {at} ahead={ahead}"
    require_loop(program, step, at)
    found = program.by_name.get(tensor)
    if found is None or found.role in ("register", "constant"):
        names = ", ".join(t.name for t in program.tensors if t.role not in ("register", "constant"))
        raise fail(program, step, f"there is no tensor {tensor} in memory", f"use one of {names}")
    if ahead < 1:
        raise fail(program, step, f"it is {ahead} iterations ahead", "use a positive integer", at)

    def change(loop: Loop) -> Body:
        if loop.kind in ("unroll", "vector"):
            raise fail(program, step, f"{at} is a loop of kind {loop.kind}", "choose a loop around it", at)
        if part_of(program, loop, tensor) is None:
            return (loop,)
        others = tuple(pair for pair in loop.ahead if pair[0] != tensor)
        return (replace(loop, ahead=(*others, (tensor, ahead))),)

    after = program.with_body(lambda body: map_loops(body, at, change))
    if after == program:
        raise fail(program, step, f"iterations of {at} do not read parts of {tensor} one after another",
                   "store it in the order of use first, or choose another loop", at)
    return after
