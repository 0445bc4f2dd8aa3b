"""What a loop's prefetch hints fetch."""

from __future__ import annotations

from collections.abc import Mapping

from convsched.ir.address import offset
from convsched.ir.grammar import Loop, Program, extents_of, leaves


def part_of(program: Program, loop: Loop, tensor: str) -> int | None:
    """How many elements further each iteration of a loop reads a tensor, if its accesses all lie within as many;
    else None."""
    inside = extents_of(loop.body)
    extents = {**extents_of(tuple(s for stage in program.stages for s in stage.body)), **extents_of((loop,))}
    found = {offset(program.tensor(tensor), load.index, extents)
             for _, leaf in leaves(loop.body) for load in leaf.loads if load.tensor == tensor}
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
