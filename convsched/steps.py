"""The schedule steps that change loops: pure functions from a program to a program.

Each applies to every loop of the name it is given, in all stages and in all copies that ``peel`` made. It
checks first and raises ``ScheduleError`` with the nest printed; the result is then legal by construction.
``fuse`` is in ``fusing.py``, ``inline`` in ``inlining.py``, ``peel`` in ``peeling.py``; steps that place data are in
``placement.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from convsched.checks import checked, fail, require_loop, require_new
from convsched.ir import (
    Affine,
    Body,
    Kind,
    Loop,
    Program,
    Stage,
    Statement,
    find_loops,
    leaves,
    map_leaves,
    map_loops,
    substitute,
)
from convsched.legality import accesses, carried, extents_of, fills_first, indices, is_separated, touching, without
from convsched.peeling import peel

Tail = Literal["none", "mask", "peel", "overlap"]


def split(program: Program, loop: str, factor: int, outer: str, inner: str, tail: Tail = "none") -> Program:
    """Cut a loop in two: ``loop = factor * outer + inner``.

    >>> from convsched.examples import filtered, nests, product
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
    most = max(4096, *(f.extent for f in found))  # beyond the extent a factor only pads, as a vector loop may need
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


def reorder(program: Program, order: Sequence[str]) -> Program:
    """Permute loops: every chain of perfectly nested loops puts its loops of ``order`` in that order.

    >>> from convsched.examples import nests, product
    >>> print(nests(reorder(product(8, 4), ("c", "m"))))
    conv:
      for c < 4: for m < 8:
        y[m] += x[c] * w[m, c]
    """
    step = f"reorder {' '.join(order)}"
    for name in order:
        require_loop(program, step, name)
    rank = {name: position for position, name in enumerate(order)}
    if len(rank) != len(order):
        twice = next(name for name in order if list(order).count(name) > 1)
        raise fail(program, step, f"{twice} is named twice", "name each loop once", twice)

    def permute(body: Body, outside: Mapping[str, int]) -> Body:
        return tuple(chain(s, outside) if isinstance(s, Loop) else s for s in body)

    def chain(top: Loop, outside: Mapping[str, int]) -> Statement:
        loops = [top]
        while len(loops[-1].body) == 1 and isinstance(loops[-1].body[0], Loop):
            loops.append(loops[-1].body[0])
        core = loops[-1].body
        slots = [i for i, loop in enumerate(loops) if loop.var in rank]
        chosen = sorted((loops[i] for i in slots), key=lambda loop: rank[loop.var])
        if [loops[i].var for i in slots] != [loop.var for loop in chosen]:
            extents = {**outside, **extents_of((top,))}
            commutes = len(core) == 1 and not isinstance(core[0], Loop)
            for loop in chosen:
                tensor = carried(loop.var, core, extents, commutative=commutes)
                if tensor is not None:
                    raise fail(program, step, f"iterations of {loop.var} depend on each other through "
                               f"{tensor}", "leave that loop where it is", loop.var)
        for slot, loop in zip(slots, chosen, strict=True):
            loops[slot] = loop
        body = permute(core, {**outside, **{loop.var: loop.extent for loop in loops}})
        for loop in reversed(loops):
            body = (replace(loop, body=body),)
        return body[0]

    done = program.with_body(lambda body: permute(body, {}))
    for stage in done.stages:
        for around, _ in leaves(stage.body):
            named = [loop.var for loop in around if loop.var in rank]
            for left, right in pairwise(named):
                if rank[left] > rank[right]:
                    raise fail(program, step, f"{left} and {right} are not perfectly nested",
                               "reorder before other statements come between them", left)
    return checked(program, step, done)


def set_kind(program: Program, loop: str, kind: Kind) -> Program:
    """``unroll``, ``vectorize`` or ``parallel``: say how a loop runs.

    >>> from convsched.examples import nests, product
    >>> swapped = reorder(product(16, 4), ("c", "m"))
    >>> print(nests(set_kind(set_kind(swapped, "m", "vector"), "c", "unroll")))
    conv:
      unroll c < 4: vector m < 16:
        y[m] += x[c] * w[m, c]
    >>> print(nests(set_kind(product(16, 4), "m", "parallel")))
    conv:
      parallel m < 16: for c < 4:
        y[m] += x[c] * w[m, c]

    A vector loop holds statements only. Iterations of vector and parallel loops must not depend on each
    other.
    """
    verb = {"unroll": "unroll", "vector": "vectorize", "parallel": "parallel", "serial": "serial"}[kind]
    step = f"{verb} {loop}"
    require_loop(program, step, loop)
    for stage in program.stages:
        extents = extents_of(stage.body)
        for found in find_loops(stage.body, loop):
            if kind == "vector" and any(isinstance(s, Loop) for s in found.body):
                raise fail(program, step, f"{loop} is not innermost", "reorder it to the end first", loop)
            if kind in ("vector", "parallel"):
                _require_independent(program, step, found, extents, kind)
    return checked(program, step, program.with_body(
        lambda body: map_loops(body, loop, lambda found: (replace(found, kind=kind),))))


def _require_independent(program: Program, step: str, loop: Loop, extents: Mapping[str, int],
                         kind: Kind) -> None:
    """Iterations may share nothing; those of a parallel loop may each fill a tensor that is private to it."""
    if loop.extent == 1:
        return
    inside = {leaf.tensor for _, leaf in leaves(loop.body)}
    private = {name for name in inside if kind == "parallel" and _is_private(program, name, loop)}
    tensor = carried(loop.var, without(loop.body, private), extents)
    if tensor is not None:
        raise fail(program, step, f"iterations of {loop.var} depend on each other through {tensor}",
                   "choose a loop of the output", loop.var)


def _is_private(program: Program, name: str, loop: Loop) -> bool:
    """A local or register tensor that only this loop touches, and that each iteration fills first."""
    if program.tensor(name).role not in ("local", "register"):
        return False

    def count(body: Body) -> int:
        return sum(used == name for _, leaf in leaves(body) for used, _ in indices(leaf))

    total = sum(count(stage.body) for stage in program.stages)
    return fills_first(loop.body, name) and total == sum(
        count(f.body) for s in program.stages for f in find_loops(s.body, loop.var))


def attach(program: Program, stage: str, at: str) -> Program:
    """Compute a stage inside a loop of the stage beside it, iteration by iteration.

    >>> from convsched.examples import filtered, nests
    >>> print(nests(filtered(8, 3)))
    init:
      for f < 8:
        t[f] = 0
    conv:
      for f < 8: for s < 3:
        t[f] += x[f + s] * w[s]
    epilogue:
      for f < 8:
        y[f] = max(0, t[f])
    >>> print(nests(attach(attach(filtered(8, 3), "init", "f"), "epilogue", "f")))
    conv:
      for f < 8:
        t[f] = 0
        for s < 3:
          t[f] += x[f + s] * w[s]
        y[f] = max(0, t[f])

    The stage joins the next one if that has the loop, else the one before; both have the same loops from
    the outermost down to ``at``.
    """
    step = f"attach {stage} at {at}"
    require_loop(program, step, at)
    names = [s.name for s in program.stages]
    if stage not in names:
        raise fail(program, step, f"there is no stage {stage}", f"use one of {', '.join(names)}", at)
    place = names.index(stage)
    if not find_loops(program.stages[place].body, at):
        raise fail(program, step, f"stage {stage} has no loop {at}", "choose an outer loop that both have",
                   at)
    for other in (place + 1, place - 1):
        if 0 <= other < len(names) and find_loops(program.stages[other].body, at):
            break
    else:
        raise fail(program, step, f"no stage beside {stage} has the loop {at}", "choose another loop", at)
    first, second = sorted((place, other))
    before, after = program.stages[first], program.stages[second]
    if before.when != after.when:
        raise fail(program, step, f"{before.name} and {after.name} run at different times", "leave it", at)

    def merge(a: Body, b: Body, above: Mapping[str, int]) -> Body:
        if len(a) != 1 or len(b) != 1 or not isinstance(a[0], Loop) or not isinstance(b[0], Loop):
            raise fail(program, step, f"the loops above {at} are not perfectly nested", "attach earlier", at)
        x, y = a[0], b[0]
        if (x.var, x.extent, x.kind, x.of, x.step) != (y.var, y.extent, y.kind, y.of, y.step):
            raise fail(program, step, f"{before.name} has {x.kind} {x.var} < {x.extent} where {after.name} "
                       f"has {y.kind} {y.var} < {y.extent}", "give both the same outer loops", at)
        extents = {**above, **extents_of(b), **extents_of(a)}
        tensor = _meeting(x.var, x.body, y.body, extents) if x.iterations > 1 else None
        if tensor is not None:
            raise fail(program, step, f"iterations of {x.var} depend on each other through {tensor}",
                       "attach outside the loops that sum", at)
        body = x.body + y.body if x.var == at else merge(x.body, y.body, {**above, x.var: x.extent})
        return (replace(x, body=body),)

    host = after.name if before.name == stage else before.name
    joined = Stage(host, merge(before.body, after.body, {}), before.when)
    return checked(program, step, replace(
        program, stages=(*program.stages[:first], joined, *program.stages[second + 1:])))


def _meeting(var: str, a: Body, b: Body, extents: Mapping[str, int]) -> str | None:
    """A tensor that one side writes and the other uses, in different iterations of ``var``."""
    def touched(body: Body) -> tuple[set[str], set[str]]:
        every = {name for _, leaf in leaves(body) for name, _ in indices(leaf)}
        return every, {leaf.tensor for _, leaf in leaves(body)}
    used_a, written_a = touched(a)
    used_b, written_b = touched(b)
    both = (used_a & written_b) | (written_a & used_b)
    reads, writes, _ = accesses(touching(a, both) + touching(b, both))
    return next((tensor for tensor in sorted(both) if not is_separated(
        var, writes.get(tensor, []) + reads.get(tensor, []), extents)), None)
