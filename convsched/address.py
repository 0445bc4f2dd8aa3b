"""Where an element lies in storage: an access's index as one affine offset.

A stored axis contributes ``((index // step) % size) * stride``. With ``index = step * q + r`` and
``0 <= r < step`` over the whole iteration space, the quotient is ``q``; a remainder by ``size`` drops
the terms that ``size`` divides if the others stay in ``[0, size)``. Blocked layouts are affine this way
wherever a schedule's splits agree with the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from convsched.ir import Affine, Index, Tensor


@dataclass(frozen=True)
class Offset:
    """Elements from the start of storage: ``affine`` plus ``((a // step) % size) * stride`` a ``rest``."""

    affine: Affine
    rest: tuple[tuple[Affine, int, int, int], ...] = ()


def offset(tensor: Tensor, index: Index, extents: Mapping[str, int]) -> Offset:
    """The storage offset of ``tensor[index]`` with loop variables in ``[0, extent)``."""
    total, rest = Affine(), []
    for stored in tensor.storage:
        a = index[stored.axis]
        outermost = stored.step * stored.size >= tensor.shape[stored.axis]
        quotient = _quotient(a, stored.step, extents)
        part = quotient if quotient is None or outermost else _remainder(quotient, stored.size, extents)
        if part is None:
            rest.append((a, stored.step, stored.size, stored.stride))
        else:
            total = total + part * stored.stride
    return Offset(total, tuple(rest))


def _divide(a: Affine, by: int) -> tuple[Affine, Affine]:
    """The terms that ``by`` divides, divided, and the other terms."""
    whole = Affine(tuple((n, c // by) for n, c in a.terms if c % by == 0), a.constant // by)
    return whole, Affine(tuple((n, c) for n, c in a.terms if c % by), a.constant % by)


def _quotient(a: Affine, by: int, extents: Mapping[str, int]) -> Affine | None:
    if by == 1:
        return a
    whole, rest = _divide(a, by)
    low, high = rest.bounds(extents)
    return whole if low >= 0 and high < by else None


def _remainder(a: Affine, by: int, extents: Mapping[str, int]) -> Affine | None:
    _, rest = _divide(a, by)
    low, high = rest.bounds(extents)
    return rest if low >= 0 and high < by else None
