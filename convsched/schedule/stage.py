"""``stage``: keep part of a tensor in a place of its own, in registers or in a local buffer.

A buffer's copy loops are named after the tensor: ``x.h``, ``x.c``, so that later steps can split and vectorise them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from convsched.ir import (
    Affine,
    Body,
    Index,
    Load,
    Path,
    Program,
    Stage,
    Store,
    Tensor,
    leaves,
    leaves_of,
    nested,
    storage_of,
)
from convsched.ir.simplify import prune
from convsched.ir.walk import indices, touching
from convsched.schedule.checks import ALLOWANCE, PADDING, checked, fail, require_loop
from convsched.schedule.footprint import Box, Request, box_of, redirected, require_axes, within
from convsched.schedule.legality import fills_first, separated
from convsched.schedule.step import Step
from convsched.schedule.write_back import written

Where = Literal["registers", "buffer", "window", "packed"]


@dataclass(frozen=True)
class StageAt(Step):
    """Keep the part of a tensor that one iteration of loop ``at`` uses in a buffer of its own.

    "registers": a tensor that nothing outside ``at`` touches, kept in registers.

    >>> from convsched.ir.examples import filtered, nests
    >>> from convsched.schedule.attach import Attach
    >>> from convsched.schedule.split import Split
    >>> relu = Attach("epilogue", "f").apply(Attach("init", "f").apply(filtered(8, 3, pad=1)))
    >>> print(nests(StageAt("t", "f", "registers").apply(relu)))
    conv:
      for f < 8:
        t[0] = 0
        for s < 3:
          t[0] += x[f + s - 1] * w[s]
        y[f] = max(0, t[0])

    "buffer": the same in memory, stored in the ``order`` of its axes.

    "window": a copy of the box that is read, borders filled with zeros, stored in the ``order`` of its axes.

    >>> tiled = Split("f", 4, "f0", "f1").apply(filtered(8, 3, pad=1))
    >>> windowed = StageAt("x", "f0", "window").apply(tiled)
    >>> print(nests(windowed).partition("conv:")[2].partition("epilogue")[0])
    <BLANKLINE>
      for f0 < 2:
        for x.w < 6:
          x_at_f0[x.w] = x[4 f0 + x.w - 1]
        for f1 < 4: for s < 3:
          t[4 f0 + f1] += x_at_f0[f1 + s] * w[s]
    <BLANKLINE>

    "packed": a copy in the order of use, one axis for each loop named in ``order``.

    >>> packed = StageAt("x", "f0", "packed", ("s", "f1")).apply(tiled)
    >>> print(nests(packed).partition("conv:")[2].partition("epilogue")[0])
    <BLANKLINE>
      for f0 < 2:
        for x.s < 3: for x.f1 < 4:
          x_at_f0[x.s, x.f1] = x[4 f0 + x.f1 + x.s - 1]
        for f1 < 4: for s < 3:
          t[4 f0 + f1] += x_at_f0[s, f1] * w[s]
    <BLANKLINE>

    An output is made in a "window", and copied out where the iteration ends (see ``write_back``).

    >>> print(nests(StageAt("y", "f0", "window").apply(Split("f", 4, "f0", "f1").apply(relu))))
    conv:
      for f0 < 2:
        for f1 < 4:
          t[4 f0 + f1] = 0
          for s < 3:
            t[4 f0 + f1] += x[4 f0 + f1 + s - 1] * w[s]
          y_at_f0[f1] = max(0, t[4 f0 + f1])
        for y.w < 4:
          y[4 f0 + y.w] = y_at_f0[y.w]

    ``at="root"`` copies once, before the first use (once for all calls, if the tensor is a weight).
    ``align`` rounds the stride of an entry of ``order`` up to a multiple (elements).
    """

    GRAMMAR = "stage TENSOR at LOOP registers|buffer|window|packed [ENTRY ...] [align=ENTRY:MULTIPLE,...]"
    tensor: str
    at: str
    where: Where
    order: tuple[str, ...] = ()
    align: tuple[tuple[str, int], ...] = ()

    def apply(self, program: Program) -> Program:
        tensor = program.by_name.get(self.tensor)
        if tensor is None:
            names = ", ".join(t.name for t in program.tensors)
            raise fail(program, self, f"there is no tensor {self.tensor}", f"use one of {names}",
                       None if self.at == "root" else self.at)
        if self.at != "root":
            require_loop(program, self, self.at)
        request = Request(program, self, tensor, self.at, self.order, dict(self.align))
        if self.where == "window" and tensor.role == "output":
            return checked(program, self, written(request))
        if self.where in ("window", "packed"):
            return copied(request, packed=self.where == "packed")
        return checked(program, self, _shrunk(request, "register" if self.where == "registers" else "local"))


@dataclass(frozen=True)
class _Copy:
    """A buffer, the nest that fills it, and where an index of the source is in it."""

    buffer: Tensor
    body: Body
    index_of: Callable[[Index], Index]


def _shrunk(request: Request, role: Literal["register", "local"]) -> Program:
    """A local tensor with room only for what one iteration uses."""
    program, name = request.program, request.tensor.name
    if request.tensor.role != "local":
        raise request.fail(f"{name} is a tensor of role {request.tensor.role}",
                           "only local tensors live in registers and buffers")
    if request.at == "root":
        raise request.fail(f"a {role} tensor holds the tile of one loop", "name the loop")
    if role == "register" and (request.order or request.align):
        raise request.fail("registers have no order in memory", "leave the order and align out")
    scopes = request.scopes
    everywhere = sum(name in leaf.facts.tensors for s in program.stages if name in s.facts.tensors for leaf in s.leaves)
    inside = sum(name in leaf.facts.tensors for _, body in scopes for leaf in leaves_of(body))
    users = [s.name for s in program.stages if name in s.facts.tensors]
    if everywhere != inside or len(users) > 1:
        raise request.fail(f"{name} is also used outside one loop {request.at}, in {', '.join(users)}",
                           "attach the other stages there first")
    homes = sum(name in top.facts.tensors for s in program.stages for top in s.body)
    if role == "register" and homes > 1:
        raise request.fail(f"{name} would live in the registers of two loop nests", "stage before peel")
    for path, body in scopes:
        _require_fresh(request, path, body)
    box = box_of(request)
    kept = [axis for axis, size in enumerate(box.sizes) if size > 1] or [len(box.sizes) - 1]
    if role == "local":
        kept = list(range(len(box.sizes)))
    letters = tuple(request.tensor.letters[axis] for axis in kept)
    shape = tuple(box.sizes[axis] for axis in kept)
    if request.order:
        require_axes(request, request.order)
    tile = Tensor(name, letters, shape, role, storage_of(letters, shape, request.order or None, request.align))

    def access(index: Index) -> Index:
        within = box.relative(index)
        return tuple(within[axis] for axis in kept)

    return within(request, lambda body: redirected(body, name, name, access)).with_tensor(tile)


def _require_fresh(request: Request, path: Path, body: Body) -> None:
    """Raise unless each iteration sets the tensor before it reads it, and hands nothing on to the next."""
    name = request.tensor.name
    if path[-1].kind == "vector":
        raise request.fail(f"{request.at} is a vector loop", "choose a loop around it")
    if not fills_first(body, name):
        raise request.fail(f"{name} is not set inside {request.at} before it is used",
                           "attach the stage that sets it first")
    own = touching(body, {name})
    extents = {loop.var: loop.extent for loop in path}
    for var, extent in [(loop.var, loop.extent) for around, _ in own for loop in around]:
        extents[var] = max(extent, extents.get(var, 0))
    touched = [(index, leaf.where) for _, leaf in own for n, index in indices(leaf) if n == name]
    repeated = [loop.var for loop in path if loop.iterations > 1]
    apart = separated(frozenset(repeated), touched, extents)
    for var in repeated:
        if var not in apart:
            raise request.fail(f"iterations of {var} depend on each other through {name}",
                               "stage inside the loops of the output only")


def copied(request: Request, packed: bool) -> Program:
    """An input or weight read from a copy: a window of it, or packed in the order of use; or an output made in one."""
    program, name = request.program, request.tensor.name
    is_output = request.tensor.role == "output" and not packed
    if request.tensor.role not in ("input", "weight") and not is_output:
        raise request.fail(f"{name} is written by the program", "stage it in registers")
    loops = [loop for item in program.stages for loop in item.facts.names]
    if request.target in program.by_name or any(loop.startswith(f"{name}.") for loop in loops):
        raise request.fail(f"{name} is staged already", "stage it once")
    return checked(program, request.step, written(request) if is_output else _filled(request, packed))


def _filled(request: Request, packed: bool) -> Program:
    """The program with the copy, and with what reads it."""
    box = box_of(request)
    order, target = request.order or request.tensor.order, request.target
    for entry, multiple in request.align.items():
        if entry not in order or multiple < 1:
            raise request.fail(f"align={entry}:{multiple} does not name a stride of {' '.join(order)}",
                               "use an entry of the order and a positive multiple")
    copy = _packed_copy(request, box) if packed else _window_copy(request, box)
    copied = prod(loop.extent for around, _ in leaves(prune(copy.body, request.around())) for loop in around)
    most = max(ALLOWANCE, copied * PADDING)
    if copy.buffer.elements > most:
        raise request.fail(f"the buffer would have {copy.buffer.elements} elements for {copied} that are copied",
                           f"use smaller multiples, blocks or factors: at most {most} elements")

    def fill(body: Body) -> Body:
        used = redirected(body, request.tensor.name, target, copy.index_of)
        return used if request.at == "root" else copy.body + used

    program = within(request, fill).with_tensor(copy.buffer)
    if request.at != "root":
        return program
    first = next(i for i, s in enumerate(program.stages)
                 if target in s.facts.tensors)
    when: Literal["bind", "run"] = "bind" if request.tensor.role == "weight" else "run"
    pack = Stage(f"pack {request.tensor.name}", copy.body, when)
    return replace(program, stages=(*program.stages[:first], pack, *program.stages[first:]))


def _window_copy(request: Request, box: Box) -> _Copy:
    source = request.tensor
    order = request.order or source.order
    require_axes(request, order)
    names = [f"{source.name}.{letter}" for letter in source.letters]
    read = tuple(b + n for b, n in zip(box.base, names, strict=True))
    copy = Store(request.target, tuple(Affine.of(n) for n in names), Load(source.name, read),
                 _in_reach(request, read, dict(zip(names, box.sizes, strict=True))))
    walk = dict.fromkeys(entry[0] for entry in order)
    loops = {f"{source.name}.{letter}": box.sizes[source.letters.index(letter)] for letter in walk}
    storage = storage_of(source.letters, box.sizes, order, request.align)
    buffer = Tensor(request.target, source.letters, box.sizes, "local", storage)
    return _Copy(buffer, nested(loops, copy), box.relative)


def _packed_copy(request: Request, box: Box) -> _Copy:
    source = request.tensor
    index = _source_index(request)
    used = {var for i in index for var in i.variables if var in box.inner}
    if sorted(request.order) != sorted(used):
        raise request.fail(f"{source.name} is used by the loops {' '.join(sorted(used))}",
                           "name exactly these, in the order they should be stored")
    if not used:
        raise request.fail(f"{request.at} uses one element of {source.name}", "choose an outer loop")
    names = {var: f"{source.name}.{var}" for var in request.order}
    shape = tuple(box.inner[var] for var in request.order)
    storage = storage_of(request.order, shape, None, request.align)
    buffer = Tensor(request.target, request.order, shape, "local", storage)
    renamed = {var: Affine.of(name) for var, name in names.items()}
    read = tuple(i.substitute(renamed) for i in index)
    extents = {names[var]: box.inner[var] for var in request.order}
    copy = Store(request.target, tuple(Affine.of(names[var]) for var in request.order), Load(source.name, read),
                 _in_reach(request, read, extents))
    place = tuple(Affine.of(var) for var in request.order)
    return _Copy(buffer, nested(extents, copy), lambda _: place)


def _source_index(request: Request) -> Index:
    """The one index by which the tensor is read (packing has one order of use)."""
    found = {index for _, body in request.scopes for _, leaf in touching(body, {request.tensor.name})
             for n, index in indices(leaf) if n == request.tensor.name}
    if len(found) != 1:
        raise request.fail(f"{request.tensor.name} is read by {len(found)} different indices",
                           "pack before peel, or use window")
    return next(iter(found))


def _in_reach(request: Request, read: Index, inner: Mapping[str, int]) -> tuple[Affine, ...]:
    """Guards that keep a copy inside the tensor where a ragged split makes the box reach past its end."""
    extents = {**inner, **request.around()}
    guards = []
    for axis, position in enumerate(read):
        end = request.tensor.shape[axis] + request.tensor.frame(axis)[1]
        if position.bounds(extents)[1] >= end:
            guards.append(position - end)
    return tuple(guards)
