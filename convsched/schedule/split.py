"""``split``: cut a loop in two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from convsched.ir import Affine, Body, Kind, Loop, Program, find_loops, map_leaves, map_loops, substitute
from convsched.schedule.checks import checked, fail, require_loop, require_new
from convsched.schedule.peel import Peel
from convsched.schedule.step import Step

Tail = Literal["none", "mask", "peel", "overlap"]


@dataclass(frozen=True)
class Split(Step):
    """Cut a loop in two: ``loop = factor * outer + inner``.

    >>> from convsched.ir.examples import filtered, nests, product
    >>> print(nests(Split("m", 4, "m0", "m1").apply(product(8, 4))))
    conv:
      for m0 < 2: for m1 < 4: for c < 4:
        y[4 m0 + m1] += x[c] * w[4 m0 + m1, c]

    Where ``factor`` does not divide the extent, ``tail`` says what happens to the remainder: "mask" guards
    the statements, "peel" gives the last iteration its own copy of the nest with exact extents, "overlap"
    moves the last iteration back so that it is full (it computes some elements twice).

    >>> print(nests(Split("m", 4, "m0", "m1", "mask").apply(product(7, 2))))
    conv:
      for m0 < 2: for m1 < 4: for c < 2:
        if 4 m0 + m1 < 7: y[4 m0 + m1] += x[c] * w[4 m0 + m1, c]
    >>> from convsched.schedule.attach import Attach
    >>> relu = Attach("epilogue", "f").apply(Attach("init", "f").apply(filtered(7, 3)))
    >>> print(nests(Split("f", 4, "f0", "f1", "overlap").apply(relu)))
    conv:
      for f0 < 1: for f1 < 4:
        t[4 f0 + f1] = 0
        for s < 3:
          t[4 f0 + f1] += x[4 f0 + f1 + s] * w[s]
        y[4 f0 + f1] = max(0, t[4 f0 + f1])
      for f1 < 4:
        t[f1 + 3] = 0
        for s < 3:
          t[f1 + 3] += x[f1 + s + 3] * w[s]
        y[f1 + 3] = max(0, t[f1 + 3])
    """

    GRAMMAR = "split LOOP FACTOR -> OUTER INNER [tail=mask|peel|overlap]"
    loop: str
    factor: int
    outer: str
    inner: str
    tail: Tail = "none"

    def apply(self, program: Program) -> Program:
        ragged = self._ragged(program)

        def change(found: Loop) -> Body:
            value = Affine.of(self.outer) * self.factor + self.inner
            body = substitute(found.body, {self.loop: value})
            if found.extent % self.factor:
                guard = value - found.extent
                body = map_leaves(body, lambda leaf: replace(leaf, where=(*leaf.where, guard)))
            count = -(-found.extent // self.factor)
            kind: Kind = "serial" if found.kind == "parallel" else found.kind
            return (Loop(self.outer, count, (Loop(self.inner, self.factor, body, kind),), found.kind),)

        done = checked(program, self, program.with_body(lambda body: map_loops(body, self.loop, change)))
        if not ragged or self.tail in ("none", "mask"):
            return done
        return Peel(self.outer, "last" if self.tail == "peel" else "overlap").apply(done)

    def _ragged(self, program: Program) -> bool:
        """Whether the factor divides not all extents; raises where the step does not fit."""
        loop, factor = self.loop, self.factor
        require_loop(program, self, loop)
        require_new(program, self, (self.outer, self.inner), loop)
        if factor < 1:
            raise fail(program, self, f"the factor is {factor}", "use a positive integer", loop)
        found = [named for stage in program.stages for named in find_loops(stage.body, loop)]
        if any(named.kind == "vector" for named in found):
            raise fail(program, self, f"{loop} is a vector loop", "split first, then vectorize", loop)
        extents = [named.extent for named in found]
        most = max(4096, *[2 * extent for extent in extents])  # beyond the extent it pads: a vector, a block of tiles
        if factor > most:
            raise fail(program, self, f"the factor is {factor}", f"use one of at most {most}", loop)
        ragged = [extent for extent in extents if extent % factor]
        if ragged and self.tail == "none":
            least = min(ragged)
            divisors = ", ".join(str(d) for d in range(1, least + 1) if least % d == 0)
            raise fail(program, self, f"{least} is not a multiple of {factor}",
                       f"use tail=mask, tail=peel or tail=overlap, or one of {divisors}", loop)
        return bool(ragged)
