"""What one iteration of a loop uses of a tensor: the questions that all steps which place data ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from convsched.errors import ScheduleError
from convsched.ir import Body, Index, Leaf, Load, Loop, Program, Tensor, leaves, map_leaves, map_value
from convsched.ir.walk import indices
from convsched.schedule.checks import fail

Scope = tuple[tuple[Loop, ...], Body]  # the loops around a body, the body


@dataclass(frozen=True)
class Request:
    """What a step is asked for: the part of a tensor that one iteration of loop ``at`` uses, in a place of its own."""

    program: Program
    step: str
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

    def scopes(self) -> Iterator[Scope]:
        """The bodies of the loops ``at`` that use the tensor, with the loops around (``at`` included)."""
        for item in self.program.stages:
            for path, body in _loops_named(item.body, self.at) if self.at != "root" else [((), item.body)]:
                if any(uses(leaf, self.tensor.name) for _, leaf in leaves(body)):
                    yield path, body

    def around(self) -> dict[str, int]:
        """The extents of the loops around those bodies, the greatest where a loop has several."""
        extents: dict[str, int] = {}
        for path, _ in self.scopes():
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


def uses(leaf: Leaf, name: str) -> bool:
    """Whether a statement touches a tensor."""
    return any(n == name for n, _ in indices(leaf))


def _loops_named(body: Body, var: str, path: tuple[Loop, ...] = ()) -> Iterator[Scope]:
    for statement in body:
        if isinstance(statement, Loop):
            if statement.var == var:
                yield (*path, statement), statement.body
            yield from _loops_named(statement.body, var, (*path, statement))


def box_of(request: Request) -> Box:
    """The union of what all accesses inside ``at`` touch; they must share the part outside."""
    found: list[tuple[Index, dict[str, int]]] = []
    outside: set[str] = set()
    for path, body in request.scopes():
        outside |= {loop.var for loop in path}
        for around, leaf in leaves(body):
            extents = {loop.var: loop.extent for loop in around}
            found += [(index, extents) for n, index in indices(leaf) if n == request.tensor.name]
    if not found:
        raise request.fail(f"nothing inside {request.at} uses {request.tensor.name}", "choose another loop")
    inner: dict[str, int] = {}
    for _, extents in found:
        inner.update({var: max(extent, inner.get(var, 0)) for var, extent in extents.items()})
    if outside & inner.keys():
        both = ", ".join(sorted(outside & inner.keys()))
        raise request.fail(f"{both} is inside one loop {request.at} and around another", "stage before peel")
    base, sizes = [], []
    for axis in range(len(request.tensor.shape)):
        outer = {index[axis] - index[axis].part(inner) - index[axis].constant for index, _ in found}
        if len(outer) != 1:
            raise request.fail(f"accesses to {request.tensor.name} differ outside {request.at}", "choose an outer loop")
        bounds = [(index[axis].part(extents) + index[axis].constant).bounds(extents) for index, extents in found]
        low = min(b[0] for b in bounds)
        base.append(next(iter(outer)) + low)
        sizes.append(max(b[1] for b in bounds) - low + 1)
    return Box(tuple(base), tuple(sizes), inner)


def within(request: Request, change: Callable[[Body], Body]) -> Program:
    """The program with the bodies of the loops ``at`` that use the tensor changed."""
    def walk(body: Body) -> Body:
        return tuple(loop(s) if isinstance(s, Loop) else s for s in body)

    def loop(found: Loop) -> Loop:
        if found.var != request.at:
            return replace(found, body=walk(found.body))
        used = any(uses(leaf, request.tensor.name) for _, leaf in leaves(found.body))
        return replace(found, body=change(found.body)) if used else found

    return request.program.with_body(change if request.at == "root" else walk)


def redirected(body: Body, name: str, target: str, index_of: Callable[[Index], Index]) -> Body:
    """The body with the accesses to one tensor made accesses to another."""
    def load(access: Load) -> Load:
        return Load(target, index_of(access.index)) if access.tensor == name else access

    def change(leaf: Leaf) -> Leaf:
        value = map_value(leaf.value, load)
        if leaf.tensor != name:
            return replace(leaf, value=value)
        return replace(leaf, tensor=target, index=index_of(leaf.index), value=value)

    return map_leaves(body, change)


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
