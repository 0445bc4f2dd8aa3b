"""The schedule steps that change loops: pure functions from a program to a program.

Each applies to every loop of the name it is given, in all stages and in all copies that ``peel`` made. It
checks first and raises ``ScheduleError`` with the nest printed; the result is then legal by construction.
Steps that place data are in ``placement.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from convsched.errors import ScheduleError
from convsched.ir import (
    Affine,
    Body,
    Index,
    Kind,
    Leaf,
    Load,
    Loop,
    Program,
    Reduce,
    Stage,
    Statement,
    Store,
    Tensor,
    find_loops,
    leaves,
    loads,
    loop_names,
    map_indices,
    map_leaves,
    map_loops,
    map_value,
    storage_of,
    substitute,
)
from convsched.legality import carried, extents_of
from convsched.text import print_nest

Tail = Literal["none", "mask", "peel", "overlap"]


def fail(program: Program, step: str, why: str, fix: str, mark: str | None = None) -> ScheduleError:
    """The error of a step, with the nest printed and a loop marked."""
    return ScheduleError(step, why, fix, print_nest(program, mark))


def require_loop(program: Program, step: str, name: str) -> None:
    """Raise unless some stage has a loop of that name."""
    names = [n for stage in program.stages for n in loop_names(stage.body)]
    if name not in names:
        known = ", ".join(dict.fromkeys(names))
        raise fail(program, step, f"there is no loop {name}", f"use one of {known}")


def require_new(program: Program, step: str, names: Sequence[str]) -> None:
    """Raise if one of the names is already a loop's, or they are not distinct identifiers."""
    for position, name in enumerate(names):
        if not name.replace(".", "_").isidentifier():
            raise fail(program, step, f"{name!r} is no name", "use letters, digits, _ and .")
        if name in names[:position] or any(find_loops(s.body, name) for s in program.stages):
            raise fail(program, step, f"a loop {name} exists already", "choose another name", name)


def split(program: Program, loop: str, factor: int, outer: str, inner: str, tail: Tail = "none") -> Program:
    """Cut a loop in two: ``loop = factor * outer + inner``.

    ::

        for c < 64: ...   ->   for c0 < 16: for c1 < 4: ...           (split c 4 -> c0 c1)

    Where ``factor`` does not divide the extent, ``tail`` says what happens to the remainder: "mask" guards
    the statements, "peel" gives the last iteration its own copy of the nest with exact extents, "overlap"
    moves the last iteration back so that it is full (it computes some elements twice).
    """
    step = f"split {loop} {factor} -> {outer} {inner}" + (f" tail={tail}" if tail != "none" else "")
    require_loop(program, step, loop)
    require_new(program, step, (outer, inner))
    if factor < 1:
        raise fail(program, step, f"the factor is {factor}", "use a positive integer", loop)
    extents = {found.extent for stage in program.stages for found in find_loops(stage.body, loop)}
    ragged = sorted(e for e in extents if e % factor)
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
        return (Loop(outer, count, (Loop(inner, factor, body, found.kind),), found.kind),)

    done = program.with_body(lambda body: map_loops(body, loop, change))
    if not ragged or tail in ("none", "mask"):
        return done
    return peel(done, outer, "last" if tail == "peel" else "overlap")


def reorder(program: Program, order: Sequence[str]) -> Program:
    """Permute loops: every chain of perfectly nested loops puts its loops of ``order`` in that order.

    ::

        for m < 8: for c < 4: y[m] += x[c] * w[m, c]
        ->  for c < 4: for m < 8: y[m] += x[c] * w[m, c]              (reorder c m)
    """
    step = f"reorder {' '.join(order)}"
    for name in order:
        require_loop(program, step, name)
    rank = {name: position for position, name in enumerate(order)}
    if len(rank) != len(order):
        raise fail(program, step, "a loop is named twice", "name each loop once")

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

    return program.with_body(lambda body: permute(body, {}))


def fuse(program: Program, first: str, second: str, fused: str) -> Program:
    """Make one loop of two perfectly nested ones that walk whole adjacent axes of every tensor they index.

    ::

        for e < 7: for f < 7: y[m, e, f] += ...   ->   for p < 49: y[m, p] += ...     (fuse e f -> p)
    """
    step = f"fuse {first} {second} -> {fused}"
    require_loop(program, step, first)
    require_loop(program, step, second)
    require_new(program, step, (fused,))
    outer, inner = Affine.of(first), Affine.of(second)
    merged: dict[str, int] = {}
    for stage in program.stages:
        for around, leaf in leaves(stage.body):
            extents = {loop.var: loop.extent for loop in around}
            if (first in extents) != (second in extents):
                raise fail(program, step, f"stage {stage.name} has only one of them", "fuse others", first)
            for name, index in indices(leaf):
                axis = _merging_axis(program.tensor(name), index, outer, inner, extents)
                if axis == -2 or merged.setdefault(name, axis) != axis:
                    raise fail(program, step, f"{name} is not indexed by both over whole adjacent axes",
                               "fuse only where the filter is 1x1, stride 1, without padding", first)

    def change(found: Loop) -> Body:
        if len(found.body) != 1 or not isinstance(found.body[0], Loop) or found.body[0].var != second:
            raise fail(program, step, f"{second} is not directly inside {first}", "reorder first", first)
        within = found.body[0]
        return (Loop(fused, found.extent * within.extent, within.body, found.kind),)

    def rename(leaf: Leaf) -> Leaf:
        if any(first in w.variables or second in w.variables for w in leaf.where):
            raise fail(program, step, "a guard depends on one of them", "fuse before splitting", first)
        return _merge_leaf(leaf, merged, fused)

    changed = program.with_body(lambda body: map_leaves(map_loops(body, first, change), rename))
    for name, axis in merged.items():
        if axis >= 0:
            changed = changed.with_tensor(_merge_axes(program, step, program.tensor(name), axis))
    return changed


def indices(leaf: Leaf) -> list[tuple[str, Index]]:
    """Every tensor a statement touches, with the index: the target first, then the loads."""
    return [(leaf.tensor, leaf.index), *((load.tensor, load.index) for load in loads(leaf.value))]


def _merging_axis(tensor: Tensor, index: Index, outer: Affine, inner: Affine,
                  extents: Mapping[str, int]) -> int:
    """The axis that ``outer`` walks with ``inner`` on the next; -1 if neither is used, -2 if not so."""
    names = outer.variables | inner.variables
    used = [axis for axis, a in enumerate(index) if a.variables & names]
    if not used:
        return -1
    if len(used) != 2 or used[1] != used[0] + 1 or index[used[0]] != outer or index[used[1]] != inner:
        return -2
    whole = all(tensor.shape[axis] == extents[next(iter(index[axis].variables))] for axis in used)
    return used[0] if whole and not any(tensor.frame(axis) != (0, 0) for axis in used) else -2


def _merge_axes(program: Program, step: str, tensor: Tensor, axis: int) -> Tensor:
    order = [entry for entry in tensor.order]
    first, second = tensor.letters[axis], tensor.letters[axis + 1]
    if order.count(first) != 1 or order.count(second) != 1 or order.index(second) != order.index(first) + 1:
        raise fail(program, step, f"{tensor.name} is stored as {' '.join(order)}", "fuse adjacent axes")
    order.remove(second)
    letters = tensor.letters[:axis + 1] + tensor.letters[axis + 2:]
    shape = (*tensor.shape[:axis], tensor.shape[axis] * tensor.shape[axis + 1], *tensor.shape[axis + 2:])
    border = tensor.border[:axis + 1] + tensor.border[axis + 2:]
    return replace(tensor, letters=letters, shape=shape, border=border,
                   storage=storage_of(letters, shape, tuple(order)))


def _merge_leaf(leaf: Leaf, merged: Mapping[str, int], fused: str) -> Leaf:
    def index(name: str, old: Index) -> Index:
        axis = merged.get(name, -1)
        return old if axis < 0 else (*old[:axis], Affine.of(fused), *old[axis + 2:])
    return replace(leaf, index=index(leaf.tensor, leaf.index),
                   value=map_value(leaf.value, lambda a: Load(a.tensor, index(a.tensor, a.index))))


def set_kind(program: Program, loop: str, kind: Kind) -> Program:
    """``unroll``, ``vectorize`` or ``parallel``: say how a loop runs.

    ::

        for m2 < 16: acc[m2] += ...   ->   vector m2 < 16: acc[m2] += ...      (vectorize m2)

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
                _require_independent(program, step, found, extents)
    return program.with_body(
        lambda body: map_loops(body, loop, lambda found: (replace(found, kind=kind),)))


def _require_independent(program: Program, step: str, loop: Loop, extents: Mapping[str, int]) -> None:
    """Iterations may share nothing but tensors private to one iteration (stored before they are read)."""
    if loop.extent == 1:
        return
    inside = {leaf.tensor for _, leaf in leaves(loop.body)}
    private = {name for name in inside if _is_private(program, name, loop)}
    body = _without(loop.body, private)
    tensor = carried(loop.var, body, extents)
    if tensor is not None:
        raise fail(program, step, f"iterations of {loop.var} depend on each other through {tensor}",
                   "choose a loop of the output", loop.var)


def _without(body: Body, tensors: set[str]) -> Body:
    kept: list[Statement] = []
    for statement in body:
        if isinstance(statement, Loop):
            kept.append(replace(statement, body=_without(statement.body, tensors)))
        elif statement.tensor not in tensors:
            kept.append(statement)
    return tuple(kept)


def _is_private(program: Program, name: str, loop: Loop) -> bool:
    """A local or register tensor that only this loop touches, and that each iteration fills first."""
    if program.tensor(name).role not in ("local", "register"):
        return False

    def count(body: Body) -> int:
        return sum(used == name for _, leaf in leaves(body) for used, _ in indices(leaf))

    first = next(leaf for _, leaf in leaves(loop.body) if any(n == name for n, _ in indices(leaf)))
    fills = first.tensor == name and not any(load.tensor == name for load in loads(first.value))
    total = sum(count(stage.body) for stage in program.stages)
    return fills and total == sum(count(f.body) for s in program.stages for f in find_loops(s.body, loop.var))


def attach(program: Program, stage: str, at: str) -> Program:
    """Compute a stage inside a loop of the stage beside it, iteration by iteration.

    ::

        for m < 8: for c < 4: t[m] += ...          for m < 8:
        for m < 8: y[m] = max(0, t[m])       ->      for c < 4: t[m] += ...
                                                     y[m] = max(0, t[m])        (attach epilogue at m)

    The stage joins the next one if that has the loop, else the one before; both have the same loops from
    the outermost down to ``at``.
    """
    step = f"attach {stage} at {at}"
    require_loop(program, step, at)
    names = [s.name for s in program.stages]
    if stage not in names:
        raise fail(program, step, f"there is no stage {stage}", f"use one of {', '.join(names)}")
    place = names.index(stage)
    if not find_loops(program.stages[place].body, at):
        raise fail(program, step, f"stage {stage} has no loop {at}", "choose an outer loop that both have", at)
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
        if (x.var, x.extent) != (y.var, y.extent):
            raise fail(program, step, f"{before.name} has {x.var} < {x.extent} where {after.name} has "
                       f"{y.var} < {y.extent}", "give both the same outer loops", at)
        extents = {**above, **extents_of(b), **extents_of(a)}
        tensor = carried(x.var, _shared(x.body, y.body), extents) if x.extent > 1 else None
        if tensor is not None:
            raise fail(program, step, f"iterations of {x.var} depend on each other through {tensor}",
                       "attach outside the loops that sum", at)
        body = x.body + y.body if x.var == at else merge(x.body, y.body, {**above, x.var: x.extent})
        return (replace(x, body=body),)

    host = after.name if before.name == stage else before.name
    joined = Stage(host, merge(before.body, after.body, {}), before.when)
    return replace(program, stages=(*program.stages[:first], joined, *program.stages[second + 1:]))


def _shared(a: Body, b: Body) -> Body:
    """The statements that touch a tensor which one side writes and the other uses."""
    def touched(body: Body) -> tuple[set[str], set[str]]:
        every = {name for _, leaf in leaves(body) for name, _ in indices(leaf)}
        return every, {leaf.tensor for _, leaf in leaves(body)}
    used_a, written_a = touched(a)
    used_b, written_b = touched(b)
    both = (used_a & written_b) | (written_a & used_b)

    def keep(body: Body) -> Body:
        kept: list[Statement] = []
        for statement in body:
            if isinstance(statement, Loop):
                kept.append(replace(statement, body=keep(statement.body)))
            elif any(name in both for name, _ in indices(statement)):
                kept.append(statement)
        return tuple(kept)
    return keep(a) + keep(b)


def peel(program: Program, loop: str, which: Literal["first", "last", "overlap"] = "last") -> Program:
    """Give the first or last iteration of a loop its own copy of the body, with guards resolved in each.

    ::

        for f0 < 2: for f1 < 14: if 14 f0 + f1 < 27: ...
        ->  for f0 < 1: for f1 < 14: ...
            for f1 < 13: ... (f0 = 1)                                 (peel f0)

    "overlap" moves the last iteration back so that it is as full as the others.
    """
    step = f"peel {loop}" + (f" {which}" if which != "last" else "")
    require_loop(program, step, loop)

    def change(found: Loop) -> Body:
        if found.extent == 1:
            return (found,)
        rest = found.extent - 1
        if which == "first":
            shifted = substitute(found.body, {loop: Affine.of(loop) + 1})
            head = _alone(found, substitute(found.body, {loop: Affine.of(0)}))
            return (*head, replace(found, extent=rest, body=shifted))
        if which == "overlap":
            last = _overlapped(program, step, found)
        else:
            last = substitute(found.body, {loop: Affine.of(rest)})
        return (replace(found, extent=rest), *_alone(found, last))

    return simplify(program.with_body(lambda body: map_loops(body, loop, change)))


def _alone(loop: Loop, iteration: Body) -> Body:
    """A peeled iteration; of a parallel loop it stays in one, so that one thread runs it."""
    return (replace(loop, extent=1, body=iteration),) if loop.kind == "parallel" else iteration


def _overlapped(program: Program, step: str, loop: Loop) -> Body:
    """The last iteration moved back by what its guard cuts off."""
    guards = {w for _, leaf in leaves(loop.body) for w in leaf.where if loop.var in w.variables}
    if len(guards) != 1:
        raise fail(program, step, f"{len(guards)} guards depend on {loop.var}", "use peel", loop.var)
    guard = next(iter(guards))
    factor = guard.coefficient(loop.var)
    excess = factor * loop.extent + guard.constant  # guard: factor outer + inner - extent < 0
    reduced = _reduced_outside(loop)
    if reduced:
        raise fail(program, step, f"{reduced} would be summed twice", "use peel", loop.var)
    for _, leaf in leaves(loop.body):
        if any(a.coefficient(loop.var) * excess % factor for _, index in indices(leaf) for a in index):
            raise fail(program, step, f"an index of {leaf.tensor} cannot move by {excess} of {factor}",
                       "use peel", loop.var)

    def move(a: Affine) -> Affine:
        moved = a.substitute({loop.var: Affine.of(loop.extent - 1)})
        return moved - a.coefficient(loop.var) * excess // factor

    return map_leaves(loop.body, lambda leaf: map_indices(leaf, move))


def _reduced_outside(loop: Loop) -> str | None:
    """A tensor that the loop reduces into and does not set anew inside."""
    stored = {leaf.tensor for _, leaf in leaves(loop.body) if isinstance(leaf, Store)}
    summed = {leaf.tensor for _, leaf in leaves(loop.body) if isinstance(leaf, Reduce)}
    return min(summed - stored, default=None)


def simplify(program: Program) -> Program:
    """Drop guards that always hold, statements that never run, and iterations that do nothing."""
    return program.with_body(lambda body: prune(body, {}))


def prune(body: Body, extents: Mapping[str, int]) -> Body:
    """``simplify`` for a body inside loops of the given extents."""
    out: list[Statement] = []
    for statement in body:
        if isinstance(statement, Loop):
            extent = statement.extent
            if statement.kind != "vector":
                while extent > 1 and _is_dead(statement.body, {**extents, statement.var: extent},
                                              statement.var, extent - 1):
                    extent -= 1
            inside = prune(statement.body, {**extents, statement.var: extent})
            if inside:
                out.append(replace(statement, extent=extent, body=inside))
            continue
        bounds = [(w, w.bounds(extents)) for w in statement.where]
        if any(low >= 0 for _, (low, _) in bounds):
            continue
        where = tuple(dict.fromkeys(w for w, (_, high) in bounds if high >= 0))
        out.append(replace(statement, where=where))
    return tuple(out)


def _is_dead(body: Body, extents: Mapping[str, int], var: str, value: int) -> bool:
    """Whether no statement runs when ``var`` has this value."""
    at: Mapping[str, Affine] = {var: Affine.of(value)}
    for around, leaf in leaves(body):
        inside = {**extents, **{loop.var: loop.extent for loop in around}}
        if not any(w.substitute(at).bounds(inside)[0] >= 0 for w in leaf.where):
            return False
    return True
