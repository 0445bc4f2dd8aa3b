"""Where an element of a tensor lies in memory, as an affine expression of the loop variables if possible.

A stored axis adds ``((a // step) % size) * stride``, where ``a`` is the index along its tensor axis. With
``a = step q + p``, where ``q`` and ``p`` are affine and ``p // step`` has one value ``k`` over all points,

    a // step = q + k

and likewise ``v = size q + p`` gives ``v % size = p - size k`` where ``p // size`` is ``k`` at all points.
An index is less than its axis, so ``% size`` goes where ``step * size`` reaches the axis's end, and all of it
where ``step`` does. The rest (a tile moved back over a block's edge) stays a division and is given apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from convsched.ir.affine import Affine, Index
from convsched.ir.grammar import StorageAxis, Tensor


class Digit(NamedTuple):
    """A part ``((value // step) % size) * stride`` of an address that is not affine."""

    value: Affine
    step: int
    size: int
    stride: int

    def evaluate(self, point: Mapping[str, int]) -> int:
        """Its value at a point of the loops."""
        return self.value.evaluate(point) // self.step % self.size * self.stride


@dataclass(frozen=True, slots=True)
class Offset:
    """An address in elements: ``affine`` plus the parts in ``rest``."""

    affine: Affine
    rest: tuple[Digit, ...] = ()

    def evaluate(self, point: Mapping[str, int]) -> int:
        """The address at a point of the loops."""
        return self.affine.evaluate(point) + sum(digit.evaluate(point) for digit in self.rest)


def offset(tensor: Tensor, index: Index, extents: Mapping[str, int]) -> Offset:
    """The address of ``tensor[index]`` for ``0 <= variable < extents[variable]``.

    >>> from convsched.ir.grammar import storage_of
    >>> letters, shape = ("n", "c", "h", "w"), (1, 32, 8, 8)
    >>> x = Tensor("x", letters, shape, "input", storage_of(letters, shape, ("n", "c/16", "h", "w", "c%16")))
    >>> c0, c1, f, zero = Affine.of("c0"), Affine.of("c1"), Affine.of("f"), Affine.of(0)
    >>> extents = {"c0": 2, "c1": 16, "f": 8}
    >>> found = offset(x, (zero, c0 * 16 + c1, zero, f), extents)
    >>> str(found.affine), found.rest
    ('1024 c0 + 16 f + c1', ())

    A tile moved back from a block's edge crosses it, so the division stays:

    >>> found = offset(x, (zero, c1 + 8, zero, f), extents)
    >>> str(found.affine), [(str(d.value), *d[1:]) for d in found.rest]
    ('16 f', [('c1 + 8', 16, 2, 1024), ('c1 + 8', 1, 16, 1)])
    """
    affine = Affine()
    rest: list[Digit] = []
    for stored in tensor.storage:
        part = _place(stored, index[stored.axis], tensor.shape[stored.axis], extents)
        if isinstance(part, Affine):
            affine = affine + part * stored.stride
        else:
            rest.append(part)
    return Offset(affine, tuple(rest))


def storage_index(tensor: Tensor, index: Index, extents: Mapping[str, int]) -> tuple[Affine | Digit, ...]:
    """The place along each stored axis: affine, or the ``Digit`` (with its stride) where it is not.

    >>> from convsched.ir.grammar import storage_of
    >>> w = Tensor("w", ("m",), (32,), "weight", storage_of(("m",), (32,), ("m/16", "m%16")))
    >>> [str(part) for part in storage_index(w, (Affine.of("m0") * 16 + "m1",), {"m0": 2, "m1": 16})]
    ['m0', 'm1']
    """
    return tuple(_place(stored, index[stored.axis], tensor.shape[stored.axis], extents)
                 for stored in tensor.storage)


def _place(stored: StorageAxis, a: Affine, end: int, extents: Mapping[str, int]) -> Affine | Digit:
    """``(a // step) % size`` for ``0 <= a < end``, affine if it can be."""
    if stored.step >= max(end, 2):
        return Affine()
    quotient = a if stored.step == 1 else floor_divide(a, stored.step, extents)
    if quotient is None:
        return Digit(a, stored.step, stored.size, stored.stride)
    if stored.step * stored.size >= end:
        return quotient
    remainder = modulo(quotient, stored.size, extents)
    return Digit(quotient, 1, stored.size, stored.stride) if remainder is None else remainder


def floor_divide(a: Affine, step: int, extents: Mapping[str, int]) -> Affine | None:
    """``a // step`` if it is affine over the given extents, else None.

    >>> str(floor_divide(Affine.of("c0") * 20 + "c1", 16, {"c0": 2, "c1": 12}))
    'c0'
    >>> floor_divide(Affine.of("c0") * 20 + "c1", 16, {"c0": 2, "c1": 13}) is None
    True
    """
    quotient, remainder = _divide_terms(a, step)
    low, high = (bound // step for bound in remainder.bounds(extents))
    return quotient + low if low == high else None


def modulo(a: Affine, size: int, extents: Mapping[str, int]) -> Affine | None:
    """``a % size`` if it is affine over the given extents, else None.

    >>> str(modulo(Affine.of("c0") * 16 + "c1" + 48, 16, {"c0": 2, "c1": 16}))
    'c1'
    """
    _, remainder = _divide_terms(a, size)
    low, high = (bound // size for bound in remainder.bounds(extents))
    return remainder - low * size if low == high else None


def _divide_terms(a: Affine, step: int) -> tuple[Affine, Affine]:
    """``a = step * quotient + remainder``, term by term and towards zero; the constant in the remainder."""
    parts = [(name, (1 if c > 0 else -1) * (abs(c) // step)) for name, c in a.terms]
    quotient = Affine.total(parts, 0)
    return quotient, a - quotient * step
