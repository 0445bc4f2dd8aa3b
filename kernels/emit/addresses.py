"""Where an access of a scheduled nest lies, as LLVM IR: addresses, and the conditions and masks that keep it inside.

An address that depends on a run-time loop is computed at the start of its body, and so is a condition that is the same
for all lanes. What the loops around decide is known while the nest is walked, and emits nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from convsched.ir import Affine, Index, Let, Loop, Tensor
from convsched.ir.address import Offset, offset
from convsched.kernels.emit.vectors import Mask, both, splat, vector_type
from convsched.kernels.emit.writer import Writer


def base(tensor: str) -> str:
    """The SSA name of a tensor's address; one with a prime, such as B', needs quotes.

    >>> print(base("x"), base("B'"))
    %x %"B'"
    """
    return f"%{tensor}" if "'" not in tensor else f'%"{tensor}"'


@dataclass(frozen=True)
class Lanes:
    """The vector loop around a statement: its variable and extent; extent 1 outside vector loops."""

    var: str = ""
    count: int = 1


@dataclass(frozen=True)
class Place:
    """Where an access lies: ``pointer + constant + stride * lane``, or one offset a lane in ``scattered``."""

    pointer: str
    constant: int
    stride: int
    scattered: str | None = None


@dataclass
class Point:
    """Where the walk stands: values of loop variables, known or run-time, and extents of all loops."""

    known: dict[str, int] = field(default_factory=dict)
    dynamic: dict[str, str] = field(default_factory=dict)
    extents: dict[str, int] = field(default_factory=dict)
    unrolled: dict[str, int] = field(default_factory=dict)

    def split(self, a: Affine, lanes: Lanes) -> tuple[int, list[tuple[str, str, int]], int]:
        """The known part, the run-time terms (var, SSA value, coefficient) and the lanes' stride."""
        total, terms, stride = a.constant, [], 0
        for var, coefficient in a.terms:
            if var in self.known:
                total += coefficient * self.known[var]
            elif var == lanes.var:
                stride = coefficient
            else:
                terms.append((var, self.dynamic[var], coefficient))
        return total, terms, stride

    def bounds(self, a: Affine) -> tuple[int, int]:
        """The range of an expression at this point."""
        low = high = a.constant
        for var, coefficient in a.terms:
            if var in self.known:
                low += coefficient * self.known[var]
                high += coefficient * self.known[var]
            else:
                reach = coefficient * (self.extents[var] - 1)
                low += min(0, reach)
                high += max(0, reach)
        return low, high


@dataclass(frozen=True)
class Access:
    """An index of a tensor, its offset, and whether it is inside the tensor at all points of the loops around."""

    index: Index
    offset: Offset
    inside: bool


class Addresses:
    """Emits the addresses and conditions of one function's accesses."""

    def __init__(self, writer: Writer, point: Point) -> None:
        self.w = writer
        self.point = point
        self.granted: list[Affine] = []  # guards that hold here: the bounds of loops ensure them
        self.accesses: dict[tuple[str, int], Access] = {}

    def enter(self, loop: Loop | Let) -> None:
        """Take a loop's extent; what is remembered for another one is forgotten."""
        if self.point.extents.get(loop.var, loop.extent) != loop.extent:
            self.accesses.clear()
        self.point.extents[loop.var] = loop.extent

    # Addresses

    def access(self, tensor: Tensor, index: Index) -> Access:
        """What is known of an access, remembered: unrolled iterations ask for it again and again."""
        key = (tensor.name, id(index))  # the entry holds the index, so that its id stays taken
        if key not in self.accesses:
            extents = self.point.extents
            bounds = [a.bounds(extents) for a in index]
            inside = all(low >= 0 and high < size for (low, high), size in zip(bounds, tensor.shape, strict=True))
            self.accesses[key] = Access(index, offset(tensor, index, extents), inside)
        return self.accesses[key]

    def offset(self, tensor: Tensor, index: Index) -> Offset:
        """The storage offset of an access."""
        return self.access(tensor, index).offset

    def place(self, tensor: Tensor, index: Index, lanes: Lanes) -> Place:
        """The address of an access at this point."""
        found = self.offset(tensor, index)
        constant, terms, stride = self.point.split(found.affine, lanes)
        pointer = self.w.pointer(base(tensor.name), terms)
        if not found.rest:
            return Place(pointer, constant, stride)
        across = lanes if any(lanes.var in a.variables for a, *_ in found.rest) else Lanes()
        extra = "0"
        for a, step, size, scale in found.rest:
            value = self._integer("mul", self._quotient(a, step, size, across), scale, across.count)
            extra = value if extra == "0" else self.w.let(
                f"add {vector_type(across.count, 'i64')} {extra}, {value}")
        if across.count == 1:
            return Place(self.w.let(f"getelementptr float, ptr {pointer}, i64 {extra}"), constant, stride)
        return Place(pointer, constant, stride, extra)

    def value(self, a: Affine, lanes: Lanes) -> str:
        """An affine expression as an i64, or one a lane."""
        constant, terms, stride = self.point.split(a, lanes)
        total = str(constant)
        for _, name, coefficient in terms:
            total = self.w.let(f"add i64 {self.w.let(f'mul i64 {name}, {coefficient}')}, {total}")
        if lanes.count == 1:
            return total
        steps = ", ".join(f"i64 {stride * lane}" for lane in range(lanes.count))
        kind = vector_type(lanes.count, "i64")
        return self.w.let(f"add {kind} {splat(self.w, total, lanes.count, 'i64')}, <{steps}>")

    def _quotient(self, a: Affine, step: int, size: int, lanes: Lanes) -> str:
        """``a // step % size`` as an i64, or one a lane."""
        value = self._integer("udiv", self.value(a, lanes), step, lanes.count)
        return self._integer("urem", value, size, lanes.count)

    def _integer(self, operation: str, value: str, by: int, count: int) -> str:
        if by == 1 and operation in ("udiv", "mul"):
            return value
        literal = str(by) if count == 1 else f"splat (i64 {by})"
        return self.w.let(f"{operation} {vector_type(count, 'i64')} {value}, {literal}")

    def digit(self, loop: Let) -> int | str:
        """The value of a named digit: a number, or an i64 at the start of the scope it depends on."""
        constant, terms, _ = self.point.split(loop.of, Lanes())
        if not terms:
            return constant // loop.step % loop.extent
        depth = self.w.depth(terms)
        held = self.w.scopes[depth].digits
        key = (constant, tuple(terms), loop.step, loop.extent)
        if key not in held:
            with self.w.at_start(depth):
                held[key] = self._quotient(loop.of, loop.step, loop.extent, Lanes())
        self.w.depths[loop.var] = depth
        return held[key]

    # Masks

    def negative(self, a: Affine, lanes: Lanes) -> Mask | None:
        """The lanes where ``a < 0``; None where it surely holds in all."""
        if self.point.bounds(a)[1] < 0:
            return None
        constant, terms, stride = self.point.split(a, lanes)
        if not terms:
            return tuple(constant + stride * lane < 0 for lane in range(lanes.count))
        if stride == 0 and lanes.count > 1:
            one = self.w.let(f"icmp slt i64 {self.value(a, Lanes())}, 0")
            return splat(self.w, one, lanes.count, "i1")
        zero = "0" if lanes.count == 1 else "zeroinitializer"
        return self.w.let(f"icmp slt {vector_type(lanes.count, 'i64')} {self.value(a, lanes)}, {zero}")

    def guard(self, where: tuple[Affine, ...], lanes: Lanes) -> Mask | None:
        """The lanes where all guards hold."""
        mask: Mask | None = None
        for a in where:
            if a in self.granted:
                continue
            mask = both(self.w, mask, self.negative(a, lanes), lanes.count)
        return mask

    def open_ends(self, tensor: Tensor, index: Index) -> list[Affine]:
        """What must be negative for the index to lie inside the tensor, and here is not sure to be."""
        if self.access(tensor, index).inside:
            return []
        found = []
        for size, a in zip(tensor.shape, index, strict=True):
            low, high = self.point.bounds(a)
            ends = ([a * -1 - 1] if low < 0 else []) + ([a - size] if high >= size else [])
            found += [end for end in ends if end not in self.granted]
        return found

    def within(self, tensor: Tensor, index: Index, lanes: Lanes) -> tuple[str | None, Mask | None]:
        """The condition for all lanes and the mask of lanes by which an index lies inside the tensor; None for what
        is sure. Outside vector loops there is only the mask, an i1."""
        mask: Mask | None = None
        conditions = []
        for end in self.open_ends(tensor, index):
            _, terms, stride = self.point.split(end, lanes)
            if lanes.count > 1 and terms and not stride:
                conditions.append(end)
            else:
                mask = both(self.w, mask, self.negative(end, lanes), lanes.count)
        return self.condition(conditions), mask

    def condition(self, ends: Sequence[Affine]) -> str | None:
        """Whether all are negative, as an i1 that is computed once in each iteration of the loops it depends on."""
        known: str | None = None
        splits = [(end, *self.point.split(end, Lanes())[:2]) for end in ends]
        for end, constant, terms in sorted(splits, key=lambda split: self.w.depth(split[2])):
            depth = self.w.depth(terms)
            held = self.w.scopes[depth].conditions
            key = (known, constant, tuple(terms))
            if key not in held:
                with self.w.at_start(depth):
                    test = self.w.let(f"icmp slt i64 {self.value(end, Lanes())}, 0")
                    held[key] = test if known is None else self.w.let(f"and i1 {known}, {test}")
            known = held[key]
        return known
