"""What is known of indices, guards and accesses where they stand in a nest, derived once.

Unrolling writes a statement for each value of the loops around it. Which variables those are, how far run-time loops
and lanes can move an index, and how an access is classed are the same for all of them: only the known part of an
affine expression is evaluated again.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from convsched.ir import Affine, Index, Tensor
from convsched.ir.access import Access, AccessKind, Vector, classify_load, classify_store
from convsched.ir.address import offset

Terms = list[tuple[str, str, int]]  # run-time terms of a sum: variable, SSA value, coefficient


@dataclass(frozen=True, slots=True)
class Lanes:
    """The vector loop around a statement: its variable and extent; extent 1 outside vector loops."""

    var: str = ""
    count: int = 1


ONE = Lanes()


@dataclass(slots=True)
class Point:
    """Where the walk stands: the values of loop variables, known numbers or run-time SSA values."""

    known: dict[str, int]
    dynamic: dict[str, str]


@dataclass(slots=True)
class Form:
    """An affine expression where it stands: ``constant`` plus terms of known and of run-time variables, and the lanes'
    ``stride``. What is not known adds ``low`` to ``high``, both inclusive."""

    affine: Affine
    constant: int
    known: list[tuple[str, int]]
    dynamic: list[tuple[str, int]]
    stride: int
    low: int
    high: int

    def at(self, known: Mapping[str, int]) -> int:
        """The known part at a point."""
        total = self.constant
        for var, coefficient in self.known:
            total += coefficient * known[var]
        return total

    def terms(self, point: Point) -> Terms:
        """The run-time terms at a point."""
        return [(var, point.dynamic[var], coefficient) for var, coefficient in self.dynamic]


def form(a: Affine, known: Container[str], lane: str, extents: Mapping[str, int]) -> Form:
    """An affine expression where the given variables are known."""
    fixed, dynamic = [], []
    stride = low = high = 0
    for term in a.terms:
        var, coefficient = term
        if var in known:
            fixed.append(term)
            continue
        reach = coefficient * (extents[var] - 1)
        if reach < 0:
            low += reach
        else:
            high += reach
        if var == lane:
            stride = coefficient
        else:
            dynamic.append(term)
    return Form(a, a.constant, fixed, dynamic, stride, low, high)


@dataclass(slots=True)
class End:
    """An end of a tensor's axis that an access may reach: inside, ``form`` is negative. ``one`` is the same outside
    vector loops."""

    form: Form
    one: Form


@dataclass(slots=True)
class Axis:
    """An index along an axis that it may leave: past its ``size``, its start or both."""

    index: Form
    size: int
    below: End | None
    above: End | None


@dataclass(slots=True)
class Digit:
    """A part of an address: ``value // step % size * stride``, which differs between lanes where ``by_lane``."""

    value: Form
    step: int
    size: int
    stride: int
    by_lane: bool


@dataclass(slots=True)
class Reference:
    """An access of a tensor where it stands: class, address, the axes it may leave."""

    tensor: Tensor
    index: Index
    site: Site
    kind: AccessKind
    stride: int
    run: str
    address: Form
    digits: list[Digit]
    axes: list[Axis]
    lanes: Lanes
    pointer: tuple[object, ...]  # what its pointer depends on; () where that changes within a scope
    scalar: Reference | None = None

    @property
    def one(self) -> Reference:
        """The same access for a single lane."""
        if self.scalar is None:
            self.scalar = replace(self.site, lanes=ONE).load(self.tensor, self.index)
        return self.scalar


@dataclass(frozen=True, slots=True)
class Site:
    """Where a statement stands: the loops around it, with extents; which variables are known as the walk comes there;
    which of those are unrolled, and which are digits of others; its lanes, and those of a register."""

    extents: Mapping[str, int]
    known: frozenset[str]
    unrolled: Mapping[str, int]
    digits: frozenset[str]
    lanes: Lanes
    width: int

    def form(self, a: Affine) -> Form:
        """An affine expression here."""
        return form(a, self.known, self.lanes.var, self.extents)

    def flat(self, index: Index, sizes: Sequence[int]) -> Form:
        """The number of an element among those of an array of the given sizes, rows last."""
        constant = 0
        known: dict[str, int] = {}
        stride = 0
        for a, size in zip(index, sizes, strict=True):
            constant, stride = constant * size + a.constant, stride * size
            known = {var: c * size for var, c in known.items()}
            for var, c in a.terms:
                if var == self.lanes.var:
                    stride += c
                else:
                    known[var] = known.get(var, 0) + c
        return Form(Affine(), constant, [*known.items()], [], stride, 0, 0)

    def load(self, tensor: Tensor, index: Index) -> Reference:
        """A load here."""
        at = offset(tensor, index, self.extents)
        return self._reference(tensor, index, classify_load(at, self._vector, self.unrolled))

    def store(self, tensor: Tensor, index: Index) -> Reference:
        """A store here."""
        at = offset(tensor, index, self.extents)
        return self._reference(tensor, index, classify_store(at, self._vector, self.unrolled))

    @property
    def _vector(self) -> Vector:
        return Vector(self.lanes.var, self.lanes.count, self.width)

    def _reference(self, tensor: Tensor, index: Index, access: Access) -> Reference:
        address, lane = self.form(access.offset.affine), self.lanes.var
        digits = [Digit(self.form(d.value), d.step, d.size, d.stride, lane in d.value.variables)
                  for d in access.offset.rest]
        moves = any(var in self.digits for var, _ in address.dynamic)
        pointer = () if digits or moves else (tensor.name, *address.dynamic)
        return Reference(tensor, index, self, access.kind, access.stride, access.run, address, digits,
                         self._axes(tensor, index), self.lanes, pointer)

    def _axes(self, tensor: Tensor, index: Index) -> list[Axis]:
        """The axes of an access that may leave the tensor."""
        found = []
        for a, size in zip(index, tensor.shape, strict=True):
            low, high = a.bounds(self.extents)
            if low < 0 or high >= size:
                found.append(Axis(self.form(a), size, self._end(a * -1 - 1) if low < 0 else None,
                                  self._end(a - size) if high >= size else None))
        return found

    def _end(self, a: Affine) -> End:
        own = self.form(a)
        return End(own, own if self.lanes.count == 1 else form(a, self.known, "", self.extents))
