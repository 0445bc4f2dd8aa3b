"""When may iterations of a loop change places? The one dependence test that all steps share.

An index expression ``sum(c_i v_i)`` with terms sorted by ``|c_i|`` gives a different element for every
point if each ``|c_i|`` exceeds the sum of ``|c_j| (extent_j - 1)`` over the smaller terms: a mixed-radix
number. Two iterations of a loop then touch different elements of a tensor if every access to it has, along
some axis, the same such expression with the loop's variable in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from convsched.ir import Affine, Body, Index, Reduce, leaves, loads


def extents_of(body: Body) -> dict[str, int]:
    """The extent of every loop; the greatest, where a name has several."""
    extents: dict[str, int] = {}
    for around, _ in leaves(body):
        for loop in around:
            extents[loop.var] = max(loop.extent, extents.get(loop.var, 0))
    return extents


Guards = tuple[Affine, ...]
Access = tuple[Index, Guards]


def is_injective(index: Affine, extents: Mapping[str, int], guards: Guards = ()) -> bool:
    """Whether the expression is a mixed-radix number in all of its variables, where the guards hold.

    >>> m = Affine.of("g") * 20 + Affine.of("m0") * 16 + "m1"
    >>> extents = {"g": 3, "m0": 2, "m1": 16}
    >>> is_injective(m, extents), is_injective(m, extents, (Affine.of("m0") * 16 + "m1" - 20,))
    (False, True)
    """
    single: dict[str, Affine] = {v: Affine() for v, extent in extents.items() if extent == 1}
    index, guards = index.substitute(single), tuple(w.substitute(single) for w in guards)
    smaller = Affine()
    for name, coefficient in sorted(index.terms, key=lambda t: abs(t[1])):
        if abs(coefficient) <= _reach(smaller, extents, guards):
            return False
        smaller = smaller + Affine(((name, abs(coefficient)),))
    return True


def _reach(a: Affine, extents: Mapping[str, int], guards: Guards) -> int:
    """The greatest value of an expression; a guard ``w < 0`` bounds it by ``max(a - w) - 1``."""
    bounds = [(a - w).bounds(extents)[1] - 1 for w in guards if w.variables <= a.variables]
    return min([a.bounds(extents)[1], *bounds])


def accesses(body: Body) -> tuple[dict[str, list[Access]], dict[str, list[Access]], set[str]]:
    """Reads and writes of each tensor, and the tensors only ever reduced into."""
    reads: dict[str, list[Access]] = {}
    writes: dict[str, list[Access]] = {}
    stored: set[str] = set()
    for _, leaf in leaves(body):
        writes.setdefault(leaf.tensor, []).append((leaf.index, leaf.where))
        if not isinstance(leaf, Reduce):
            stored.add(leaf.tensor)
        for load in loads(leaf.value):
            reads.setdefault(load.tensor, []).append((load.index, leaf.where))
    return reads, writes, {t for t in writes if t not in stored and t not in reads}


def carried(var: str, body: Body, extents: Mapping[str, int], commutative: bool = False) -> str | None:
    """A tensor through which iterations of ``var`` depend on each other, or None.

    With ``commutative``, a tensor that is only reduced into does not count: sums may be reordered.
    """
    reads, writes, reduced = accesses(body)
    for tensor, written in writes.items():
        if commutative and tensor in reduced:
            continue
        touched = written + reads.get(tensor, [])
        guards = tuple(w for w in touched[0][1] if all(w in where for _, where in touched))
        if not any(_separates(var, [index[axis] for index, _ in touched], extents, guards)
                   for axis in range(len(written[0][0]))):
            return tensor
    return None


def _separates(var: str, expressions: list[Affine], extents: Mapping[str, int], guards: Guards) -> bool:
    first = expressions[0]
    return (all(e == first for e in expressions) and first.coefficient(var) != 0
            and is_injective(first, extents, guards))
