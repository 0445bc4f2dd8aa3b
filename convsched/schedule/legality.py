"""When may iterations of a loop change places? The dependence tests that all steps share.

Let two accesses have indices ``c v + p`` and ``c v' + q`` along an axis, with the same coefficient of a
variable ``v``. If ``p`` and ``q``, which depend on other variables, always differ by less than ``|c|``, then
the two touch the same element only where ``v = v'``: the variable is a digit, as of a mixed-radix number. It
then cancels, and the next digit is looked for. Guards ``w < 0`` narrow what ``p`` and ``q`` can be.

Threads run a stage without waiting for each other: iterations ``extent i / n`` to ``extent (i + 1) / n`` of
each parallel loop on thread ``i`` of ``n``, and what is outside of parallel loops on every thread. A tensor
that only one stage uses is each thread's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

from convsched.ir import Affine, Block, Body, Index, Leaf, Loop, Path, Program, Reduce, Stage, Store, leaves, leaves_of
from convsched.ir.bounds import bounds_where
from convsched.ir.walk import indices

Guards = tuple[Affine, ...]
Access = tuple[Index, Guards]


@dataclass(frozen=True, eq=False)
class Domain:
    """The points at which an expression is evaluated: extents of the loops, and guards that hold."""

    extents: Mapping[str, int]
    guards: Guards = ()
    known: dict[Affine, tuple[int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def bounds(self, a: Affine) -> tuple[int, int]:
        """A bound on the least and on the greatest value."""
        if not self.guards:
            return a.bounds(self.extents)
        found = self.known.get(a)
        if found is None:
            guards = [w for w in self.guards if w.variables <= self.extents.keys()]
            found = self.known[a] = bounds_where(a, guards, self.extents)
        return found


def digits(one: Affine, here: Domain, other: Affine, there: Domain) -> tuple[set[str], bool]:
    """Variables that are equal wherever two expressions are, and whether the two never are.

    >>> m = Affine.of("g") * 20 + Affine.of("m0") * 16 + "m1"
    >>> extents = {"g": 3, "m0": 2, "m1": 16}
    >>> whole, masked = Domain(extents), Domain(extents, (Affine.of("m0") * 16 + "m1" - 20,))
    >>> digits(m, whole, m, whole)
    (set(), False)
    >>> found, never = digits(m, masked, m, masked)
    >>> sorted(found), never
    (['g', 'm0', 'm1'], False)
    >>> digits(Affine.of("m1"), whole, Affine.of("m1") + 16, whole)[1]
    True
    """
    found: set[str] = set()
    rest = sorted([t for t in one.terms if t in other.terms], key=lambda t: (-abs(t[1]), t[0]))
    while True:
        for term in rest:
            fewer = one.without(term[:1])
            less = fewer if one is other else other.without(term[:1])
            low, high = _difference(fewer, here, less, there)
            if max(abs(low), abs(high)) < abs(term[1]):
                found.add(term[0])
                rest.remove(term)
                one, other = fewer, less
                break
        else:
            low, high = _difference(one, here, other, there)
            return found, low > 0 or high < 0


def _difference(one: Affine, here: Domain, other: Affine, there: Domain) -> tuple[int, int]:
    """Bounds on ``one - other``, each at a point of its own."""
    a, b = here.bounds(one)
    c, d = (a, b) if one is other and here is there else there.bounds(other)
    return a - d, b - c


def accesses(found: Iterable[Leaf]) -> tuple[dict[str, list[Access]], dict[str, list[Access]], set[str]]:
    """Reads and writes of each tensor, and the tensors only ever reduced into."""
    reads: dict[str, list[Access]] = {}
    writes: dict[str, list[Access]] = {}
    stored: set[str] = set()
    for leaf in found:
        writes.setdefault(leaf.tensor, []).append((leaf.index, leaf.where))
        if not isinstance(leaf, Reduce):
            stored.add(leaf.tensor)
        for load in leaf.loads:
            reads.setdefault(load.tensor, []).append((load.index, leaf.where))
    return reads, writes, {t for t in writes if t not in stored and t not in reads}


def carried(variables: Sequence[str], found: Iterable[Leaf], extents: Mapping[str, int],
            commutative: bool = False) -> tuple[str, str] | None:
    """The first of some loops whose iterations depend on each other by some statements, and a tensor through which they
    do; or None.

    With ``commutative``, a tensor that is only reduced into does not count: sums may be reordered.
    """
    reads, writes, reduced = accesses(found)
    wanted = frozenset(variables)
    apart = {tensor: separated(wanted, written + reads.get(tensor, []), extents)
             for tensor, written in writes.items() if not (commutative and tensor in reduced)}
    return next(((var, tensor) for var in variables for tensor, found in apart.items() if var not in found), None)


def separated(variables: frozenset[str], touched: Sequence[Access], extents: Mapping[str, int]) -> frozenset[str]:
    """Those of some variables that are the same wherever accesses to one tensor touch the same element."""
    domains = {where: Domain(extents, where) for _, where in touched}
    found = [(index, domains[where]) for index, where in touched]
    done: frozenset[str] = frozenset()
    for axis in range(len(touched[0][0])):
        places = {(index[axis], domain) for index, domain in found}
        left = (variables - done).intersection(*[[name for name, _ in a.terms] for a, _ in places])
        for (a, here), (b, there) in combinations_with_replacement(places, 2) if left else ():
            left &= digits(a, here, b, there)[0]
            if not left:
                break
        done |= left
    return done


def fills_first(body: Body, tensor: str) -> bool:
    """Whether the first statement that touches a tensor sets it, without reading it."""
    first = next((leaf for leaf in leaves_of(body) if tensor in leaf.facts.tensors), None)
    return (isinstance(first, Store) and first.tensor == tensor
            and not any(load.tensor == tensor for load in first.loads))


@dataclass(frozen=True)
class _Touch:
    """One access to a tensor: under which parallel loop (``home`` counts them), at which index."""

    leaf: Leaf
    index: Index
    writes: bool
    home: int
    parallel: Loop | None
    domain: Domain


def race(program: Program) -> tuple[str, str] | None:
    """A parallel loop and a tensor through which threads that do not wait would meet, or None."""
    for stage in program.stages:
        if stage.when == "bind" or "parallel" not in stage.facts.kinds:
            continue
        homes = list(_homes(stage.body))
        name = next(loop.var for loop, _, _ in homes if loop is not None)
        written = {leaf.tensor for leaf in stage.leaves}
        touches: dict[str, list[_Touch]] = {}
        for home, (loop, path, body) in enumerate(homes):
            for around, leaf in leaves(body, path):
                domain = Domain({found.var: found.extent for found in around}, leaf.where)
                for position, (tensor, index) in enumerate(indices(leaf)):
                    if tensor not in written:
                        continue
                    touches.setdefault(tensor, []).append(
                        _Touch(leaf, index, position == 0, home, loop, domain))
        for tensor, found in touches.items():
            role = program.tensor(tensor).role
            own = role == "register" or (role == "local" and _is_alone(program, stage, tensor))
            if _meets(tensor, found, own, role == "register", homes):
                return next((t.parallel.var for t in found if t.parallel is not None), name), tensor
    return None


_Home = tuple[Loop | None, Path, Body]  # parallel loop, loops around its body, the body


def _homes(body: Body, path: Path = ()) -> Iterator[_Home]:
    """Each parallel loop with its body, and each statement that is in none."""
    for statement in body:
        if not isinstance(statement, Block):
            yield None, path, (statement,)
        elif isinstance(statement, Loop) and statement.kind == "parallel":
            yield statement, (*path, statement), statement.body
        else:
            yield from _homes(statement.body, (*path, statement))


def _is_alone(program: Program, stage: Stage, tensor: str) -> bool:
    """Whether no other stage touches a tensor."""
    return not any(tensor in other.facts.tensors for other in program.stages if other is not stage)


def _meets(tensor: str, touches: list[_Touch], own: bool, register: bool, homes: list[_Home]) -> bool:
    """Whether two threads may touch one element of a tensor that is written, or registers would have to keep
    values while a parallel loop ends or begins."""
    inside = [t for t in touches if t.parallel is not None]
    if not inside:
        return not own
    if len(inside) < len(touches):
        return register or not own or any(t.writes for t in inside)
    if own and all(fills_first(homes[home][2], tensor) for home in {t.home for t in inside}):
        return False
    if register:
        return True
    return any((a.writes or b.writes) and not _same_thread(a, b) and (a.home == b.home or not _apart(a, b))
               for a, b in combinations_with_replacement(_distinct(inside), 2))


def _distinct(touches: Iterable[_Touch]) -> list[_Touch]:
    return list({(t.index, t.leaf.where, t.writes, t.home): t for t in touches}.values())


def _same_thread(a: _Touch, b: _Touch) -> bool:
    """Whether one thread has both accesses wherever they touch the same element."""
    assert a.parallel is not None
    assert b.parallel is not None
    if (a.parallel.var, a.parallel.extent) != (b.parallel.var, b.parallel.extent):
        return False
    return a.parallel.extent == 1 or any(a.parallel.var in found for found, _ in _along_axes(a, b))


def _apart(a: _Touch, b: _Touch) -> bool:
    """Whether two accesses never touch the same element."""
    return any(never for _, never in _along_axes(a, b))


def _along_axes(a: _Touch, b: _Touch) -> Iterator[tuple[set[str], bool]]:
    for one, other in zip(a.index, b.index, strict=True):
        yield digits(one, a.domain, other, b.domain)
