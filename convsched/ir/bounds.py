"""Bounds on affine expressions where guards hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convsched.ir.affine import Affine


def bounds_where(a: Affine, conditions: Sequence[Affine], extents: Mapping[str, int]) -> tuple[int, int]:
    """A bound on the least and on the greatest value of ``a`` where all conditions are negative.

    >>> e = Affine.of("e0") * 14 + "e1"
    >>> bounds_where(e * 2 + "r", [e - 27], {"e0": 2, "e1": 14, "r": 3})
    (0, 54)
    """
    linked = _linked(a, conditions)
    if not linked:
        return a.bounds(extents)
    return -_upper_bound(a * -1, linked, extents), _upper_bound(a, linked, extents)


def _upper_bound(a: Affine, conditions: Sequence[Affine], extents: Mapping[str, int]) -> int:
    orders = [(*conditions[i:], *conditions[:i]) for i in range(len(conditions))]
    return min(_chained_bound(a, order, extents) for order in orders)


def _linked(a: Affine, conditions: Sequence[Affine]) -> Sequence[Affine]:
    """The conditions that share a variable with ``a``, or with one that does: no other can say anything of it."""
    if not conditions:
        return ()
    known = {name for name, _ in a.terms}
    linked: list[Affine] = []
    rest = list(conditions)
    while found := [c for c in rest if any(name in known for name, _ in c.terms)]:
        linked += found
        rest = [c for c in rest if c not in found]
        known.update(name for c in found for name, _ in c.terms)
    return conditions if not rest else [c for c in conditions if c in linked]


def _chained_bound(a: Affine, conditions: Sequence[Affine], extents: Mapping[str, int]) -> int:
    """The bound that taking conditions off one after another gives, while each makes it smaller."""
    best = a.bounds(extents)[1]
    gained = 0  # a <= max(rest) - gained
    rest, improved = a, True
    while improved:
        improved = False
        for condition in conditions:
            for k in _factors(rest, condition):
                smaller = rest - condition * k
                bound = smaller.bounds(extents)[1] - gained - k
                if bound < best:
                    best, rest, gained, improved = bound, smaller, gained + k, True
    return best


def _factors(a: Affine, condition: Affine) -> list[int]:
    """Multiples of the condition that cancel a variable of ``a``."""
    own = dict(a.terms)
    return sorted({k for n, c in condition.terms if n in own and (k := own[n] // c) > 0})
