"""The schedule steps that place data: in registers, in packed local buffers, in another storage order.

Like the steps of ``steps.py``: pure functions, checks first, ``ScheduleError`` with the nest. A buffer's
copy loops are named after the tensor: ``x.h``, ``x.c``, so that later steps can split and vectorise them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from convsched.ir import (
    Affine,
    Body,
    Index,
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
    map_leaves,
    map_loops,
    map_value,
    storage_of,
)
from convsched.steps import fail, indices, require_loop

Where = Literal["registers", "window", "packed"]


def stage(program: Program, tensor: str, at: str, where: Where, order: Sequence[str] = (),
          align: Mapping[str, int] | None = None) -> Program:
    """Keep the part of a tensor that one iteration of loop ``at`` uses in a buffer of its own.

    ::

        for f0: for c: for f1: t[14 f0 + f1] += ...
        ->  for f0: for c: for f1: t[f1] += ...               (stage t at f0 registers)

        for e: for c, r, s: ... x[c, e + r, f + s] ...
        ->  for e: for x.c, x.h, x.w: x_at_e[x.c, x.h, x.w] = x[x.c, e + x.h, x.w]
                   for c, r, s: ... x_at_e[c, r, f + s] ...   (stage x at e window h c w)

    "registers": a tensor that nothing outside ``at`` touches, kept in registers. "window": a copy of the
    box that is read, borders filled with zeros, stored in the ``order`` of its axes. "packed": a copy in
    the order of use, one axis for each loop named in ``order``. ``at="root"`` copies once, before the first
    use (once for all calls, if the tensor is a weight). ``align`` rounds the stride of an entry of
    ``order`` up to a multiple (elements).
    """
    step = " ".join(["stage", tensor, "at", at, where, *order])
    if tensor not in program.by_name:
        names = ", ".join(t.name for t in program.tensors)
        raise fail(program, step, f"there is no tensor {tensor}", f"use one of {names}")
    if at != "root":
        require_loop(program, step, at)
    request = _Request(program, step, program.tensor(tensor), at, tuple(order), dict(align or {}))
    if where == "registers":
        return _in_registers(request)
    if program.tensor(tensor).role not in ("input", "weight"):
        raise fail(program, step, f"{tensor} is written by the program", "stage it in registers", at)
    return _copied(request, packed=where == "packed")


def layout(program: Program, tensor: str, order: Sequence[str]) -> Program:
    """Store a weight in the order of use, one axis for each loop in ``order``: ``layout w m0 c r s m1``.

    The packing is a stage of its own that runs once, when weights are bound.
    """
    if tensor in program.by_name and program.tensor(tensor).role != "weight":
        raise fail(program, f"layout {tensor} {' '.join(order)}", f"{tensor} is no weight",
                   "use stage for a tensor that changes from call to call")
    return stage(program, tensor, "root", "packed", order)


@dataclass(frozen=True)
class _Request:
    program: Program
    step: str
    tensor: Tensor
    at: str
    order: tuple[str, ...]
    align: dict[str, int]

    def fail(self, why: str, fix: str) -> Exception:
        return fail(self.program, self.step, why, fix, None if self.at == "root" else self.at)


@dataclass(frozen=True)
class _Box:
    """What one iteration of ``at`` reads: from ``base``, ``sizes`` elements along each axis."""

    base: Index
    sizes: tuple[int, ...]
    inner: Mapping[str, int]


def _in_registers(request: _Request) -> Program:
    program, name = request.program, request.tensor.name
    if request.tensor.role != "local":
        raise request.fail(f"{name} is an {request.tensor.role} tensor", "only local tensors live in registers")
    if request.at == "root":
        raise request.fail("registers hold the tile of one loop", "name the loop")
    everywhere = sum(n == name for s in program.stages for _, leaf in leaves(s.body) for n, _ in indices(leaf))
    inside = sum(n == name for s in program.stages for loop in find_loops(s.body, request.at)
                 for _, leaf in leaves(loop.body) for n, _ in indices(leaf))
    if everywhere != inside:
        raise request.fail(f"{name} is also used outside {request.at}", "attach the other stages there first")
    box = _box(request)
    kept = [axis for axis, size in enumerate(box.sizes) if size > 1] or [len(box.sizes) - 1]
    letters = tuple(request.tensor.letters[axis] for axis in kept)
    shape = tuple(box.sizes[axis] for axis in kept)
    tile = Tensor(name, letters, shape, "register", storage_of(letters, shape))

    def access(index: Index) -> Index:
        return tuple(index[axis].part(box.inner) for axis in kept)

    return _replace_accesses(program, request, name, access).with_tensor(tile)


def _copied(request: _Request, packed: bool) -> Program:
    box = _box(request)
    target = f"{request.tensor.name}_at_{request.at}" if request.at != "root" else f"{request.tensor.name}_packed"
    if target in request.program.by_name:
        raise request.fail(f"{request.tensor.name} is already staged there", "stage it once a loop")
    make = _packed_copy if packed else _window_copy
    buffer, copy, index_of = make(request, box, target)
    program = _replace_accesses(request.program, request, target, index_of)
    program = program.with_tensor(buffer)
    if request.at != "root":
        return program.with_body(lambda body: map_loops(
            body, request.at, lambda loop: (replace(loop, body=copy + loop.body),)))
    first = next(i for i, s in enumerate(program.stages)
                 if any(n == target for _, leaf in leaves(s.body) for n, _ in indices(leaf)))
    when: Literal["bind", "run"] = "bind" if request.tensor.role == "weight" else "run"
    return replace(program, stages=(
        *program.stages[:first], Stage(f"pack {request.tensor.name}", copy, when), *program.stages[first:]))


def _box(request: _Request) -> _Box:
    """The union of what all accesses inside ``at`` touch; they must share the part outside."""
    found: list[tuple[Index, dict[str, int]]] = []
    for item in request.program.stages:
        scopes = find_loops(item.body, request.at) if request.at != "root" else [
            Loop("root", 1, item.body)]
        for scope in scopes:
            for around, leaf in leaves(scope.body):
                inner = {loop.var: loop.extent for loop in around}
                found += [(index, inner) for n, index in indices(leaf) if n == request.tensor.name]
    if not found:
        raise request.fail(f"nothing inside {request.at} uses {request.tensor.name}", "choose another loop")
    inner = {var: extent for _, extents in found for var, extent in extents.items()}
    base, sizes = [], []
    for axis in range(len(request.tensor.shape)):
        outer = {index[axis] - index[axis].part(inner) - index[axis].constant for index, _ in found}
        if len(outer) != 1:
            raise request.fail(f"accesses to {request.tensor.name} differ outside {request.at}",
                               "choose an outer loop")
        bounds = [(index[axis].part(extents) + index[axis].constant).bounds(extents)
                  for index, extents in found]
        low = min(b[0] for b in bounds)
        base.append(next(iter(outer)) + low)
        sizes.append(max(b[1] for b in bounds) - low + 1)
    return _Box(tuple(base), tuple(sizes), inner)


def _replace_accesses(program: Program, request: _Request, target: str,
                      index_of: object) -> Program:
    name = request.tensor.name
    assert callable(index_of)

    def load(access: Load) -> Load:
        return Load(target, index_of(access.index)) if access.tensor == name else access

    def change(leaf: Leaf) -> Leaf:
        value = map_value(leaf.value, load)
        if leaf.tensor != name:
            return replace(leaf, value=value)
        return replace(leaf, tensor=target, index=index_of(leaf.index), value=value)

    def inside(loop: Loop) -> Body:
        return (replace(loop, body=map_leaves(loop.body, change)),)

    if request.at == "root":
        return program.with_body(lambda body: map_leaves(body, change))
    return program.with_body(lambda body: map_loops(body, request.at, inside))


def _window_copy(request: _Request, box: _Box, target: str) -> tuple[Tensor, Body, object]:
    source = request.tensor
    order = request.order or source.order
    if sorted({entry[0] for entry in order}) != sorted(source.letters):
        raise request.fail(f"the order {' '.join(order)} does not name the axes {' '.join(source.letters)}",
                           "name each axis once, or as c/16 and c%16")
    names = [f"{source.name}.{letter}" for letter in source.letters]
    buffer = Tensor(target, source.letters, box.sizes, "local",
                    storage_of(source.letters, box.sizes, order, request.align))
    read = tuple(b + n for b, n in zip(box.base, names, strict=True))
    copy = Store(target, tuple(Affine.of(n) for n in names), Load(source.name, read),
                 _in_reach(request, read, dict(zip(names, box.sizes, strict=True))))
    walk = dict.fromkeys(entry[0] for entry in order)
    loops = {f"{source.name}.{letter}": box.sizes[source.letters.index(letter)] for letter in walk}

    def index_of(index: Index) -> Index:
        return tuple(i - b for i, b in zip(index, box.base, strict=True))

    return buffer, _nest(loops, copy), index_of


def _packed_copy(request: _Request, box: _Box, target: str) -> tuple[Tensor, Body, object]:
    source = request.tensor
    used = {var for i in _source_index(request) for var in i.variables if var in box.inner}
    if set(request.order) != used:
        raise request.fail(f"{source.name} is used by the loops {' '.join(sorted(used))}",
                           "name exactly these, in the order they should be stored")
    names = {var: f"{source.name}.{var}" for var in request.order}
    shape = tuple(box.inner[var] for var in request.order)
    buffer = Tensor(target, tuple(request.order), shape, "local",
                    storage_of(tuple(request.order), shape, None, request.align))
    renamed = {var: Affine.of(name) for var, name in names.items()}
    read = tuple(i.substitute(renamed) for i in _source_index(request))
    extents = {names[var]: box.inner[var] for var in request.order}
    copy = Store(target, tuple(Affine.of(names[var]) for var in request.order), Load(source.name, read),
                 _in_reach(request, read, extents))

    def index_of(index: Index) -> Index:
        return tuple(Affine.of(var) for var in request.order)

    return buffer, _nest(extents, copy), index_of


def _source_index(request: _Request) -> Index:
    """The one index by which the tensor is read (packing has one order of use)."""
    found = {load.index for s in request.program.stages for _, leaf in leaves(s.body)
             for load in loads(leaf.value) if load.tensor == request.tensor.name}
    if len(found) != 1:
        raise request.fail(f"{request.tensor.name} is read by {len(found)} different indices",
                           "pack before peel, or use window")
    return next(iter(found))


def _in_reach(request: _Request, read: Index, inner: Mapping[str, int]) -> tuple[Affine, ...]:
    """Guards that keep a copy inside the tensor where a ragged split makes the box reach past its end."""
    extents = dict(inner)
    for item in request.program.stages:
        for around, _ in leaves(item.body):
            extents.update({loop.var: loop.extent for loop in around if loop.var not in extents})
    guards = []
    for axis, position in enumerate(read):
        end = request.tensor.shape[axis] + request.tensor.frame(axis)[1]
        if position.bounds(extents)[1] >= end:
            guards.append(position - end)
    return tuple(guards)


def _nest(loops: Mapping[str, int], leaf: Store | Reduce) -> Body:
    body: tuple[Statement, ...] = (leaf,)
    for var, extent in reversed(list(loops.items())):
        body = (Loop(var, extent, body),)
    return body
