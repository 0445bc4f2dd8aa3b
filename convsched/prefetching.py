"""The step that fetches data into the caches before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from convsched.address import offset
from convsched.checks import fail, require_loop
from convsched.ir import Body, Loop, Program, leaves, loads, map_loops
from convsched.legality import extents_of


def prefetch(program: Program, tensor: str, at: str, ahead: int) -> Program:
    """Ask the caches, in each iteration of a loop, for what a tensor gives so many iterations later.

    >>> from convsched.examples import nests, product
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


def part_of(program: Program, loop: Loop, tensor: str) -> int | None:
    """How many elements further each iteration of a loop reads a tensor, if its accesses all lie within as many;
    else None."""
    inside = extents_of(loop.body)
    extents = {**extents_of(tuple(s for stage in program.stages for s in stage.body)), **extents_of((loop,))}
    found = {offset(program.tensor(tensor), load.index, extents)
             for _, leaf in leaves(loop.body) for load in loads(leaf.value) if load.tensor == tensor}
    if len(found) != 1:
        return None
    (place,) = found
    step = place.affine.coefficient(loop.var)
    low, high = place.affine.part(inside).bounds(inside)
    return step if not place.rest and low == 0 and high < step else None


def fetches(program: Program, loop: Loop) -> Mapping[str, int]:
    """How far, in elements, what a loop fetches of each tensor lies from what it reads."""
    parts = ((tensor, ahead, part_of(program, loop, tensor)) for tensor, ahead in loop.ahead)
    return {tensor: ahead * part for tensor, ahead, part in parts if part is not None}
