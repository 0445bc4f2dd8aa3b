"""Where an access of a scheduled nest lies, as LLVM IR: addresses, and the conditions and masks that keep it inside.

An address that depends on a run-time loop is computed at the start of its body, and so is a condition that is the same
for all lanes. What the loops around decide is known while the nest is walked, and emits nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from convsched.ir import Affine
from convsched.kernels.emit.forms import ONE, End, Form, Lanes, Point, Reference, Terms
from convsched.kernels.emit.nest import Digit
from convsched.kernels.emit.vectors import Mask, both, splat, vector_type
from convsched.kernels.emit.writer import Writer

# What the module and its functions call their own values and blocks, and what has more primes.
_OWN = re.compile(r"(tensors|threads?|entry|zeros|stage_\d+|(v|o|p|a|head|done)[1-9]\d*|.*\.(slot|[1-9]\d*))'*")


@lru_cache(1024)
def base(tensor: str) -> str:
    """The SSA name of a tensor's address: a prime more where another value may have its name; primes need quotes.

    >>> print(base("x"), base("B'"), base("threads"))
    %x %"B'" %"threads'"
    """
    name = f"{tensor}'" if _OWN.fullmatch(tensor) else tensor
    return f"%{name}" if "'" not in name else f'%"{name}"'


class Place(NamedTuple):
    """Where an access lies: ``pointer + constant + stride * lane``, or one offset a lane in ``scattered``."""

    pointer: str
    constant: int
    stride: int
    scattered: str | None = None


class Addresses:
    """Emits the addresses and conditions of one function's accesses."""

    def __init__(self, writer: Writer, point: Point) -> None:
        self.w = writer
        self.point = point
        self.granted: list[Affine] = []  # guards that hold here: the bounds of loops ensure them

    # Addresses

    def place(self, at: Reference) -> Place:
        """The address of an access at this point."""
        address = at.address
        constant = address.at(self.point.known)
        pointer = self.w.pointers.get(at.pointer)
        if pointer is None:
            pointer = self.w.pointer(base(at.tensor.name), address.terms(self.point))
            if at.pointer:
                self.w.pointers[at.pointer] = pointer
        return Place(pointer, constant, address.stride) if not at.digits else self._displaced(at, pointer, constant)

    def _displaced(self, at: Reference, pointer: str, constant: int) -> Place:
        """The address of an access with digits, which are added at run time: to the pointer, or lane by lane."""
        stride = at.address.stride
        across = at.lanes if any(digit.by_lane for digit in at.digits) else ONE
        extra = "0"
        for digit in at.digits:
            quotient = self._quotient(digit.value, digit.step, digit.size, across.count)
            value = self._integer("mul", quotient, digit.stride, across.count)
            extra = value if extra == "0" else self.w.let(
                f"add {vector_type(across.count, 'i64')} {extra}, {value}")
        if across.count == 1:
            return Place(self.w.let(f"getelementptr float, ptr {pointer}, i64 {extra}"), constant, stride)
        return Place(pointer, constant, stride, extra)

    def value(self, a: Form, count: int) -> str:
        """An affine expression as an i64, or one a lane."""
        total = str(a.at(self.point.known))
        for _, name, coefficient in a.terms(self.point):
            total = self.w.let(f"add i64 {self.w.let(f'mul i64 {name}, {coefficient}')}, {total}")
        if count == 1:
            return total
        steps = ", ".join(f"i64 {a.stride * lane}" for lane in range(count))
        kind = vector_type(count, "i64")
        return self.w.let(f"add {kind} {splat(self.w, total, count, 'i64')}, <{steps}>")

    def _quotient(self, a: Form, step: int, size: int, count: int) -> str:
        """``a // step % size`` as an i64, or one a lane."""
        value = self._integer("udiv", self.value(a, count), step, count)
        return self._integer("urem", value, size, count)

    def _integer(self, operation: str, value: str, by: int, count: int) -> str:
        if by == 1 and operation in ("udiv", "mul"):
            return value
        literal = str(by) if count == 1 else f"splat (i64 {by})"
        return self.w.let(f"{operation} {vector_type(count, 'i64')} {value}, {literal}")

    def digit(self, digit: Digit) -> int | str:
        """The value of a named digit: a number, or an i64 at the start of the scope it depends on."""
        named = digit.named
        constant, terms = digit.of.at(self.point.known), digit.of.terms(self.point)
        if not terms:
            return constant // named.step % named.extent
        depth = self.w.depth(terms)
        held = self.w.scopes[depth].digits
        key = (constant, tuple(terms), named.step, named.extent)
        if key not in held:
            with self.w.at_start(depth):
                held[key] = self._quotient(digit.of, named.step, named.extent, 1)
        self.w.depths[named.var] = depth
        return held[key]

    # Masks

    def negative(self, a: Form, lanes: Lanes) -> Mask | None:
        """The lanes where ``a < 0``; None where it surely holds in all."""
        constant = a.at(self.point.known)
        if constant + a.high < 0:
            return None
        count = lanes.count
        if not a.dynamic:
            return tuple([constant + a.stride * lane < 0 for lane in range(count)])
        if a.stride == 0 and count > 1:
            one = self.w.let(f"icmp slt i64 {self.value(a, 1)}, 0")
            return splat(self.w, one, count, "i1")
        zero = "0" if count == 1 else "zeroinitializer"
        return self.w.let(f"icmp slt {vector_type(count, 'i64')} {self.value(a, count)}, {zero}")

    def guard(self, where: Sequence[tuple[Affine, Form]], lanes: Lanes) -> Mask | None:
        """The lanes where all guards hold."""
        mask: Mask | None = None
        for a, form in where:
            if a in self.granted:
                continue
            mask = both(self.w, mask, self.negative(form, lanes), lanes.count)
        return mask

    def open_ends(self, at: Reference) -> list[End]:
        """What must be negative for an access to lie inside its tensor, and here is not sure to be."""
        found = []
        for axis in at.axes:
            index = axis.index
            known = index.at(self.point.known)
            for end, is_open in ((axis.below, known + index.low < 0), (axis.above, known + index.high >= axis.size)):
                if end is not None and is_open and end.form.affine not in self.granted:
                    found.append(end)
        return found

    def within(self, at: Reference) -> tuple[str | None, Mask | None]:
        """The condition for all lanes and the mask of lanes by which an access lies inside its tensor; None for what
        is sure. Outside vector loops there is only the mask, an i1."""
        mask: Mask | None = None
        conditions = []
        for end in self.open_ends(at):
            if at.lanes.count > 1 and end.form.dynamic and not end.form.stride:
                conditions.append(end.one)
            else:
                mask = both(self.w, mask, self.negative(end.form, at.lanes), at.lanes.count)
        return self.condition(conditions) if conditions else None, mask

    def condition(self, ends: Sequence[Form]) -> str | None:
        """Whether all are negative, as an i1 that is computed once in each iteration of the loops it depends on."""
        known: str | None = None
        splits: list[tuple[Form, int, Terms]] = [
            (end, end.at(self.point.known), end.terms(self.point)) for end in ends]
        for end, constant, terms in sorted(splits, key=lambda split: self.w.depth(split[2])):
            depth = self.w.depth(terms)
            held = self.w.scopes[depth].conditions
            key = (known, constant, tuple(terms))
            if key not in held:
                with self.w.at_start(depth):
                    test = self.w.let(f"icmp slt i64 {self.value(end, 1)}, 0")
                    held[key] = test if known is None else self.w.let(f"and i1 {known}, {test}")
            known = held[key]
        return known
