"""The loop-nest IR: the whole grammar on one screen.

    Program  = tensors, stages                        Stage = name, when, body
    Body     = statements in order
             | Loop(var, extent, body, kind, ahead)   kind: serial | unroll | vector | parallel
             | Let(var, extent, body, of, step)       once, with var = of // step % extent
             | Store(tensor, index, value, where)     t[i, j] = v
             | Reduce(tensor, index, value, where)    t[i, j] += v
    Value    = Load(tensor, index) | Const(number) | Op(name, values)
    index    = Affine in loop variables; loops are half-open with constant extents
    where    = conjunction of ``Affine < 0``: the statement runs only where all hold
    Tensor   = name, shape, role, storage, border, values

Each element of a local or register tensor is stored before it is read (``verify`` proves it). A read of a tensor
inside its ``border`` (a virtual frame around the shape, used for padding) gives zero. A ``constant`` tensor has its
values in the program: after unrolling, its zeros vanish and its ones become plain additions. A loop's ``ahead`` are
(tensor, iterations): a hint to fetch what the tensor gives so many iterations later. A ``Let`` gives a digit of a
variable a name: of a pixel p = 7 e + f of rows of 7, ``e`` is ``p // 7 % E`` and ``f`` is ``p % 7``. Stages run in
order; those with ``when="bind"`` depend on weights only and run once, when weights are bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from convsched.ir.affine import Affine, Index
from convsched.ir.facts import Facts, together
from convsched.lazy import cached_property

Kind = Literal["serial", "unroll", "vector", "parallel"]
Role = Literal["input", "weight", "output", "local", "register", "constant"]
When = Literal["bind", "run"]

OPS = {  # name -> number of operands
    "add": 2, "sub": 2, "mul": 2, "div": 2, "max": 2, "min": 2, "exp": 1, "neg": 1, "select_positive": 3,
}  # select_positive(a, b, c) is b where a > 0, else c


@dataclass(frozen=True, slots=True)
class StorageAxis:
    """One stored dimension: ``(index[axis] // step) % size``, ``stride`` elements apart."""

    axis: int
    step: int
    size: int
    stride: int


@dataclass(frozen=True)
class Tensor:
    """A named array. ``letters`` name its axes; ``border`` is the (before, after) frame of zeros of each;
    ``values`` are those of a constant, rows last."""

    name: str
    letters: tuple[str, ...]
    shape: tuple[int, ...]
    role: Role
    storage: tuple[StorageAxis, ...]
    border: tuple[tuple[int, int], ...] = ()
    values: tuple[float, ...] = ()

    @cached_property
    def elements(self) -> int:
        """Elements of storage, gaps between padded strides included."""
        return 1 + sum((a.size - 1) * a.stride for a in self.storage)

    def frame(self, axis: int) -> tuple[int, int]:
        """The border of one axis, (0, 0) where there is none."""
        return self.border[axis] if self.border else (0, 0)

    @property
    def order(self) -> tuple[str, ...]:
        """The storage order, as ``stage`` and ``layout`` take it: ``("n", "c/16", "h", "w", "c%16")``."""
        names = []
        for stored in self.storage:
            letter = self.letters[stored.axis]
            split = sum(other.axis == stored.axis for other in self.storage) > 1
            names.append(letter if not split else
                         f"{letter}/{stored.step}" if stored.step > 1 else f"{letter}%{stored.size}")
        return tuple(names)


def storage_of(letters: tuple[str, ...], shape: tuple[int, ...], order: tuple[str, ...] | None = None,
               align: Mapping[str, int] | None = None) -> tuple[StorageAxis, ...]:
    """Dense storage in ``order`` (default: as the axes stand), rows last.

    ``align`` gives, for an entry of ``order``, the multiple its stride is rounded up to.
    """
    parsed: list[tuple[str, int, int, int]] = []
    for entry in order or letters:
        letter = entry.replace("%", "/").partition("/")[0]
        rest = entry[len(letter):]
        axis = letters.index(letter)
        block = int(rest[1:]) if rest else 0
        if rest.startswith("%"):
            parsed.append((entry, axis, 1, block))
        elif rest.startswith("/"):
            parsed.append((entry, axis, block, -(-shape[axis] // block)))
        else:
            parsed.append((entry, axis, 1, shape[axis]))
    stored: list[StorageAxis] = []
    stride = 1
    for entry, axis, step, size in reversed(parsed):
        multiple = (align or {}).get(entry, 1)
        stride = -(-stride // multiple) * multiple
        stored.append(StorageAxis(axis, step, size, stride))
        stride *= size
    return tuple(reversed(stored))


@dataclass(frozen=True, slots=True)
class Load:
    """An element of a tensor."""

    tensor: str
    index: Index


@dataclass(frozen=True, slots=True)
class Const:
    """A float32 number."""

    number: float


@dataclass(frozen=True, slots=True)
class Op:
    """An operation of ``OPS`` on values."""

    name: str
    values: tuple[Value, ...]


Value = Load | Const | Op


@dataclass(frozen=True)
class _Assignment:
    """What ``Store`` and ``Reduce`` have in common."""

    tensor: str
    index: Index
    value: Value
    where: tuple[Affine, ...] = ()

    @cached_property
    def loads(self) -> tuple[Load, ...]:
        """The loads in the value, left to right."""
        return tuple(loads(self.value))

    @cached_property
    def accesses(self) -> tuple[tuple[str, Index], ...]:
        """Every tensor that it touches, with the index: the target first, then the loads."""
        return ((self.tensor, self.index), *[(load.tensor, load.index) for load in self.loads])

    @cached_property
    def facts(self) -> Facts:
        """What it touches."""
        guards = frozenset([name for a in self.where for name, _ in a.terms])
        return Facts(frozenset([name for name, _ in self.accesses]), guards=guards, is_plain=not self.where)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables in its indices and conditions."""
        return self.facts.guards.union([name for _, index in self.accesses for a in index for name, _ in a.terms])


def loads(value: Value) -> Iterator[Load]:
    """The loads in a value, left to right."""
    if isinstance(value, Load):
        yield value
    elif isinstance(value, Op):
        for operand in value.values:
            yield from loads(operand)


@dataclass(frozen=True)
class Store(_Assignment):
    """``tensor[index] = value`` where all of ``where`` are negative."""


@dataclass(frozen=True)
class Reduce(_Assignment):
    """``tensor[index] += value`` where all of ``where`` are negative."""


@dataclass(frozen=True)
class Block:
    """What ``Loop`` and ``Let`` have in common: a variable with values from 0 to ``extent - 1``, and statements."""

    var: str
    extent: int
    body: Body

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The statements inside, in program order."""
        return leaves_of(self.body)


@dataclass(frozen=True)
class Loop(Block):
    """``for var < extent: body``."""

    kind: Kind = "serial"
    ahead: tuple[tuple[str, int], ...] = ()

    @property
    def iterations(self) -> int:
        """How often the body runs."""
        return self.extent

    @cached_property
    def facts(self) -> Facts:
        """What is touched inside, and the loops that it and those inside are."""
        return together([s.facts for s in self.body]).under(self.var, self.kind)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables in indices, conditions and values inside, those of its own loops too."""
        return frozenset[str]().union(*[s.variables for s in self.body])

    def holding(self, body: Body) -> Loop:
        """The loop with another body. All fields, in their order: ``replace`` takes three times as long."""
        return Loop(self.var, self.extent, body, self.kind, self.ahead)


@dataclass(frozen=True)
class Let(Block):
    """``var = of // step % extent`` for the statements of ``body``; ``of`` is never negative."""

    of: Affine
    step: int
    kind: ClassVar[Literal["let"]] = "let"
    iterations: ClassVar[int] = 1

    @cached_property
    def facts(self) -> Facts:
        """What is touched inside, and the loops inside."""
        return together([s.facts for s in self.body]).under(self.var, self.kind)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables in its value, and in indices, conditions and values inside."""
        return self.of.variables.union(*[s.variables for s in self.body])

    def holding(self, body: Body) -> Let:
        """The same value for another body."""
        return Let(self.var, self.extent, body, self.of, self.step)


Leaf = Store | Reduce
Statement = Loop | Let | Store | Reduce
Path = tuple[Loop | Let, ...]  # the loops and values around a statement, outermost first
Body = tuple[Statement, ...]


def leaves_of(body: Body) -> tuple[Leaf, ...]:
    """The statements of a body that are not loops, in program order."""
    found: list[Leaf] = []
    for statement in body:
        if isinstance(statement, Block):
            found += statement.leaves
        else:
            found.append(statement)
    return tuple(found)


def leaves(body: Body, loops: Path = ()) -> list[tuple[Path, Leaf]]:
    """Every statement with the loops around it, outermost first, in program order."""
    found: list[tuple[Path, Leaf]] = []
    _collect(body, loops, found)
    return found


def _collect(body: Body, loops: Path, found: list[tuple[Path, Leaf]]) -> None:
    for statement in body:
        if isinstance(statement, Block):
            _collect(statement.body, (*loops, statement), found)
        else:
            found.append((loops, statement))


def extents_of(body: Body) -> dict[str, int]:
    """The extent of every loop; the greatest, where a name has several."""
    extents: dict[str, int] = {}
    _collect_extents(body, extents)
    return extents


def _collect_extents(body: Body, extents: dict[str, int]) -> None:
    for statement in body:
        if isinstance(statement, Block):
            extents[statement.var] = max(statement.extent, extents.get(statement.var, 0))
            _collect_extents(statement.body, extents)


@dataclass(frozen=True)
class Stage:
    """A named piece of a program; ``when="bind"`` runs once for given weights."""

    name: str
    body: Body
    when: When = "run"

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Its statements, in program order."""
        return leaves_of(self.body)

    @cached_property
    def paths(self) -> Sequence[tuple[Path, Leaf]]:
        """Every statement with the loops around it, outermost first, in program order."""
        return leaves(self.body)

    @cached_property
    def extents(self) -> Mapping[str, int]:
        """The extent of every loop; the greatest, where a name has several."""
        return extents_of(self.body)

    @cached_property
    def facts(self) -> Facts:
        """What its statements touch, and their loops."""
        return together([statement.facts for statement in self.body])


@dataclass(frozen=True)
class Program:
    """Tensors and the stages that compute them."""

    name: str
    tensors: tuple[Tensor, ...]
    stages: tuple[Stage, ...]
    by_name: Mapping[str, Tensor] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {t.name: t for t in self.tensors})

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self.by_name[name]

    def with_body(self, change: Callable[[Body], Body]) -> Program:
        """The program with every stage's body changed; stages whose body stays the same object are kept."""
        bodies = [change(s.body) for s in self.stages]
        return Program(self.name, self.tensors, tuple([
            s if body is s.body else Stage(s.name, body, s.when)
            for s, body in zip(self.stages, bodies, strict=True)]))

    def with_tensor(self, tensor: Tensor) -> Program:
        """The program with a tensor added, or replaced by name."""
        kept = [t for t in self.tensors if t.name != tensor.name]
        place = next((i for i, t in enumerate(self.tensors) if t.name == tensor.name), len(kept))
        return Program(self.name, (*kept[:place], tensor, *kept[place:]), self.stages)
