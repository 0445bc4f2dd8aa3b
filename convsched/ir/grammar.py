"""The loop-nest IR: the whole grammar on one screen.

    Program  = tensors, stages                        Stage = name, when, body
    Body     = statements in order
             | Loop(var, extent, body, kind, ahead)   kind: serial | unroll | vector | parallel
             | Loop(var, extent, body, "digit", of=, step=)   once, with var = of // step % extent
             | Store(tensor, index, value, where)     t[i, j] = v
             | Reduce(tensor, index, value, where)    t[i, j] += v
    Value    = Load(tensor, index) | Const(number) | Op(name, values)
    index    = Affine in loop variables; loops are half-open with constant extents
    where    = conjunction of ``Affine < 0``: the statement runs only where all hold
    Tensor   = name, shape, role, storage, border, values

Each element of a local or register tensor is stored before it is read (``verify`` proves it). A read of a tensor
inside its ``border`` (a virtual frame around the shape, used for padding) gives zero. A ``constant`` tensor has its
values in the program: after unrolling, its zeros vanish and its ones become plain additions. A loop's ``ahead`` are
(tensor, iterations): a hint to fetch what the tensor gives so many iterations later. A digit is a value in the form of
a loop: of a pixel p = 7 e + f of rows of 7, ``e`` is ``p // 7`` and ``f`` is ``p % 7``. Stages run in order; those with
``when="bind"`` depend on weights only and run once, when weights are bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from convsched.ir.affine import Affine, Index
from convsched.lazy import cached_property

Kind = Literal["serial", "unroll", "vector", "parallel", "digit"]
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
        letter = entry[0] if entry not in letters else entry
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


@dataclass(frozen=True, slots=True)
class Store:
    """``tensor[index] = value`` where all of ``where`` are negative."""

    tensor: str
    index: Index
    value: Value
    where: tuple[Affine, ...] = ()


@dataclass(frozen=True, slots=True)
class Reduce:
    """``tensor[index] += value`` where all of ``where`` are negative."""

    tensor: str
    index: Index
    value: Value
    where: tuple[Affine, ...] = ()


@dataclass(frozen=True, slots=True)
class Loop:
    """``for var < extent: body``; of kind "digit", the body once, with ``var = of // step % extent``: ``extent`` is the
    number of values, and ``of`` is never negative."""

    var: str
    extent: int
    body: Body
    kind: Kind = "serial"
    ahead: tuple[tuple[str, int], ...] = ()
    of: Affine = Affine()  # noqa: RUF009  (frozen)
    step: int = 1

    @property
    def iterations(self) -> int:
        """How often the body runs."""
        return 1 if self.kind == "digit" else self.extent


Leaf = Store | Reduce
Statement = Loop | Store | Reduce
Body = tuple[Statement, ...]


@dataclass(frozen=True)
class Stage:
    """A named piece of a program; ``when="bind"`` runs once for given weights."""

    name: str
    body: Body
    when: When = "run"


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
        return replace(self, stages=tuple(s if body is s.body else replace(s, body=body)
                                          for s, body in zip(self.stages, bodies, strict=True)))

    def with_tensor(self, tensor: Tensor) -> Program:
        """The program with a tensor added, or replaced by name."""
        kept = [t for t in self.tensors if t.name != tensor.name]
        place = next((i for i, t in enumerate(self.tensors) if t.name == tensor.name), len(kept))
        return replace(self, tensors=(*kept[:place], tensor, *kept[place:]))
