"""``split``: cut a loop in two."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convsched.ir import Affine, Body, Kind, Loop, Program, find_loops, map_leaves, map_loops, substitute
from convsched.schedule.checks import checked, fail, require_loop, require_new
from convsched.schedule.peel import peel
from convsched.schedule.step import Tail, _Checked


@dataclass(frozen=True)
class Split(_Checked):
    """``loop = factor * outer + inner``; see ``steps.split``."""

    loop: str
    factor: int
    outer: str
    inner: str
    tail: Tail = "none"

    def __str__(self) -> str:
        tail = "" if self.tail == "none" else f" tail={self.tail}"
        return f"split {self.loop} {self.factor} -> {self.outer} {self.inner}{tail}"


def split(program: Program, loop: str, factor: int, outer: str, inner: str, tail: Tail = "none") -> Program:
    """Cut a loop in two: ``loop = factor * outer + inner``.

    >>> from convsched.ir.examples import filtered, nests, product
    >>> print(nests(split(product(8, 4), "m", 4, "m0", "m1")))
    conv:
      for m0 < 2: for m1 < 4: for c < 4:
        y[4 m0 + m1] += x[c] * w[4 m0 + m1, c]

    Where ``factor`` does not divide the extent, ``tail`` says what happens to the remainder: "mask" guards
    the statements, "peel" gives the last iteration its own copy of the nest with exact extents, "overlap"
    moves the last iteration back so that it is full (it computes some elements twice).

    >>> print(nests(split(product(7, 2), "m", 4, "m0", "m1", "mask")))
    conv:
      for m0 < 2: for m1 < 4: for c < 2:
        if 4 m0 + m1 < 7: y[4 m0 + m1] += x[c] * w[4 m0 + m1, c]
    >>> from convsched.schedule.attach import attach
    >>> relu = attach(attach(filtered(7, 3), "init", "f"), "epilogue", "f")
    >>> print(nests(split(relu, "f", 4, "f0", "f1", "overlap")))
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
    step = f"split {loop} {factor} -> {outer} {inner}" + (f" tail={tail}" if tail != "none" else "")
    require_loop(program, step, loop)
    require_new(program, step, (outer, inner), loop)
    if factor < 1:
        raise fail(program, step, f"the factor is {factor}", "use a positive integer", loop)
    found = [loop_ for stage in program.stages for loop_ in find_loops(stage.body, loop)]
    if any(f.kind == "vector" for f in found):
        raise fail(program, step, f"{loop} is a vector loop", "split first, then vectorize", loop)
    most = max(4096, *(2 * f.extent for f in found))  # beyond the extent a factor pads: a vector, or a block of tiles
    if factor > most:
        raise fail(program, step, f"the factor is {factor}", f"use one of at most {most}", loop)
    ragged = sorted(f.extent for f in found if f.extent % factor)
    if ragged and tail == "none":
        divisors = ", ".join(str(d) for d in range(1, ragged[0] + 1) if ragged[0] % d == 0)
        raise fail(program, step, f"{ragged[0]} is not a multiple of {factor}",
                   f"use tail=mask, tail=peel or tail=overlap, or one of {divisors}", loop)

    def change(found: Loop) -> Body:
        value = Affine.of(outer) * factor + inner
        body = substitute(found.body, {loop: value})
        if found.extent % factor:
            guard = value - found.extent
            body = map_leaves(body, lambda leaf: replace(leaf, where=(*leaf.where, guard)))
        count = -(-found.extent // factor)
        kind: Kind = "serial" if found.kind == "parallel" else found.kind
        return (Loop(outer, count, (Loop(inner, factor, body, kind),), found.kind),)

    done = checked(program, step, program.with_body(lambda body: map_loops(body, loop, change)))
    if not ragged or tail in ("none", "mask"):
        return done
    return peel(done, outer, "last" if tail == "peel" else "overlap")
