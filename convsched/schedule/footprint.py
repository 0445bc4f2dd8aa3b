"""What one iteration of a loop uses of a tensor: the questions that all steps which place data ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from convsched.errors import ScheduleError
from convsched.ir import (
    Affine,
    Block,
    Body,
    Index,
    Leaf,
    Let,
    Load,
    Loop,
    Path,
    Program,
    Tensor,
    holding,
    map_value,
    rebuilt,
)
from convsched.ir.walk import indices, map_touching, touching
from convsched.lazy import cached_property
from convsched.schedule.checks import ALLOWANCE, PADDING, fail
from convsched.schedule.step import Step

Scope = tuple[Path, Body]  # the loops around a body, the body


@dataclass(frozen=True)
class Request:
    """What a step is asked for: the part of a tensor that one iteration of loop ``at`` uses, in a place of its own."""

    program: Program
    step: Step
    tensor: Tensor
    at: str
    order: tuple[str, ...]
    align: dict[str, int]

    @property
    def target(self) -> str:
        """The buffer's name."""
        return f"{self.tensor.name}_{'packed' if self.at == 'root' else f'at_{self.at}'}"

    def fail(self, why: str, fix: str) -> ScheduleError:
        """The error of the step."""
        return fail(self.program, self.step, why, fix, None if self.at == "root" else self.at)

    @cached_property
    def scopes(self) -> tuple[Scope, ...]:
        """The bodies of the loops ``at`` that use the tensor, with the loops around (``at`` included)."""
        users = [stage.body for stage in self.program.stages if self.tensor.name in stage.facts.tensors]
        if self.at == "root":
            return tuple([((), body) for body in users])
        return tuple([scope for body in users for scope in _loops_named(body, self.at, self.tensor.name)])

    def around(self) -> dict[str, int]:
        """The extents of the loops around those bodies, the greatest where a loop has several."""
        extents: dict[str, int] = {}
        for path, _ in self.scopes:
            extents.update({loop.var: max(loop.extent, extents.get(loop.var, 0)) for loop in path})
        return extents


@dataclass(frozen=True)
class Box:
    """What one iteration of ``at`` reads: from ``base``, ``sizes`` elements along each axis."""

    base: Index
    sizes: tuple[int, ...]
    inner: Mapping[str, int]

    def relative(self, index: Index) -> Index:
        """An index within the box."""
        return tuple(a - b for a, b in zip(index, self.base, strict=True))


def _loops_named(body: Body, var: str, tensor: str, path: Path = ()) -> Iterator[Scope]:
    """The loops of a name in which a tensor is used."""
    for statement in body:
        if isinstance(statement, Block) and var in statement.facts.names and tensor in statement.facts.tensors:
            if statement.var == var:
                yield (*path, statement), statement.body
            yield from _loops_named(statement.body, var, tensor, (*path, statement))


def box_of(request: Request) -> Box:
    """The union of what all accesses inside ``at`` touch; they must share the part outside."""
    found: list[tuple[Index, dict[str, int]]] = []
    outside: set[str] = set()
    for path, body in request.scopes:
        outside |= {loop.var for loop in path}
        for loops, leaf in touching(body, {request.tensor.name}):
            extents = {loop.var: loop.extent for loop in loops}
            found += [(index, extents) for n, index in indices(leaf) if n == request.tensor.name]
    if not found:
        raise request.fail(f"nothing inside {request.at} uses {request.tensor.name}", "choose another loop")
    inner: dict[str, int] = {}
    for _, extents in found:
        inner.update({var: max(extent, inner.get(var, 0)) for var, extent in extents.items()})
    if outside & inner.keys():
        both = ", ".join(sorted(outside & inner.keys()))
        raise request.fail(f"{both} is inside one loop {request.at} and around another", "stage before peel")
    once = dict.fromkeys(outside, 1)
    within_one = [(index, {**once, **extents}) for index, extents in found]
    base, sizes = [], []
    for axis in range(len(request.tensor.shape)):
        outer = {index[axis].without(inner).terms for index, _ in found}
        if len(outer) != 1:
            raise request.fail(f"accesses to {request.tensor.name} differ outside {request.at}", "choose an outer loop")
        bounds = [index[axis].bounds(extents) for index, extents in within_one]
        low = min([least for least, _ in bounds])
        base.append(Affine(outer.pop(), low))
        sizes.append(max([most for _, most in bounds]) - low + 1)
    return Box(tuple(base), tuple(sizes), inner)


def within(request: Request, change: Callable[[Body], Body]) -> Program:
    """The program with the bodies of the loops ``at`` that use the tensor changed."""
    def walk(body: Body) -> Body:
        return rebuilt(body, [within_block(s) if isinstance(s, Block) else s for s in body])

    def within_block(found: Loop | Let) -> Loop | Let:
        if request.at not in found.facts.names or request.tensor.name not in found.facts.tensors:
            return found
        return holding(found, change(found.body) if found.var == request.at else walk(found.body))

    return request.program.with_body(change if request.at == "root" else walk)


def redirected(body: Body, name: str, target: str, index_of: Callable[[Index], Index]) -> Body:
    """The body with the accesses to one tensor made accesses to another."""
    def load(access: Load) -> Load:
        return Load(target, index_of(access.index)) if access.tensor == name else access

    def change(leaf: Leaf) -> Leaf:
        value = map_value(leaf.value, load)
        if leaf.tensor != name:
            return type(leaf)(leaf.tensor, leaf.index, value, leaf.where)
        return type(leaf)(target, index_of(leaf.index), value, leaf.where)

    return map_touching(body, name, change)


def require_axes(request: Request, order: Sequence[str]) -> None:
    """Raise unless an order has each axis once: as ``c``, or as ``c/16`` before or after ``c%16``."""
    letters = request.tensor.letters
    parts = {letter: sorted(entry[len(letter):] for entry in order
                            if entry.replace("%", "/").partition("/")[0] == letter) for letter in letters}
    whole = sum(map(len, parts.values())) == len(order)
    for part in parts.values():
        block = part[0][1:] if part else ""
        blocked = block.isascii() and block.isdigit() and len(block) < 10 and int(block) > 0
        whole = whole and (part == [""] or (blocked and part == [f"%{block}", f"/{block}"]))
    if not whole:
        raise request.fail(f"the order {' '.join(order)} does not name the axes {' '.join(letters)}",
                           "name each axis once, as c or as c/16 and c%16")


def require_strides(request: Request, order: Sequence[str]) -> None:
    """Raise unless ``align`` names entries of the order, and positive multiples."""
    for entry, multiple in request.align.items():
        if entry not in order or multiple < 1:
            raise request.fail(f"align={entry}:{multiple} does not name a stride of {' '.join(order)}",
                               "use an entry of the order and a positive multiple")


def require_room(request: Request, buffer: Tensor, used: int) -> None:
    """Raise where a buffer is far larger than the ``used`` elements that are copied to it or made in it."""
    most = max(ALLOWANCE, used * PADDING)
    if buffer.elements > most:
        raise request.fail(f"the buffer would have {buffer.elements} elements for {used} that are used",
                           f"use smaller multiples, blocks or factors: at most {most} elements")
