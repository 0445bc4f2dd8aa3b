"""Instructions that a scheduled nest issues, in the time of one vector FMA.

Unrolled and vector loops around statements make straight-line code. In it, an element that several
iterations read is loaded once, and the time is at least

    max(arithmetic, loads, latency of sums)

and stores, shuffles and tests of borders come on top: they use the same pipes between the sums. A guard that
all statements of a run-time loop share is a bound of that loop: of its iterations, only those run. How an
access is loaded or stored follows the emitter: neighbours as a vector, one element for all lanes as a
broadcast, a constant distance as rows transposed in registers, anything else lane by lane.

The figures below are round numbers that order schedules as measured on Zen 4 with AVX-512 (one vector FMA
and one vector load a cycle); `bench/rank_correlation.py` says how well they do so on another machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from convsched.ir import Affine, Body, Index, Leaf, Let, Loop, Op, Program, Reduce, Tensor, leaves, loads, matrix_of

LATENCY = 4  # of an FMA: sums in flight that keep one pipe busy
BROADCAST = 0.5  # a load of one element for all lanes, in vector loads: half the width
STORE = 2  # vector loads in the time of a store: one port for two
SPLIT = 1  # a vector load across two cache lines, beside one within a line
SHUFFLE = 1  # a permutation of one or two vectors
GATHER, SCATTER = 4, 4  # a lane of a load or store lane by lane
GUARD = 1.4  # a test of one element or row against the border
MASK = 3  # a run-time mask of a vector: compares of 64-bit indices, two registers a vector
MASKED_STORE = 8  # a store of part of a vector, beside a whole one
SQUARE = 14  # a lane of a square transposed and stored
PART_SQUARE, PART_ROW = 6, 0.7  # the same of a square that is cut short, and of each of its rows
STEP = 0.25  # an iteration of a loop
ENTRY = 6  # a loop: its end is not foreseen
EXP = 20  # an exponential


@dataclass
class Straight:
    """What a piece of straight-line code does, in FMAs; ``loads`` in vector loads."""

    arithmetic: float = 0.0
    loads: float = 0.0
    latency: float = 0.0
    extra: float = 0.0
    stores: float = 0.0

    def time(self, load: float) -> float:
        """FMAs in its time, where a vector load takes ``load`` of them."""
        return max(self.arithmetic, self.loads * load, self.latency) + self.stores * STORE * load + self.extra


@dataclass(frozen=True)
class Around:
    """The loops around a statement in its straight-line code, and of all of them the extents."""

    extents: Mapping[str, int]
    unrolled: Mapping[str, int] = field(default_factory=dict)
    lane: str = ""
    granted: frozenset[Affine] = frozenset()  # guards that the bounds of loops ensure
    digits: Mapping[str, frozenset[str]] = field(default_factory=dict)  # the loops that each depends on

    @property
    def lanes(self) -> int:
        return self.extents[self.lane] if self.lane else 1


class Issue:
    """Counts the instructions of one program; ``lanes`` of a register, ``load`` FMAs in a vector load."""

    def __init__(self, program: Program, lanes: int, load: float) -> None:
        self.program, self.lanes, self.load = program, lanes, load

    def time(self, body: Body, around: Around | None = None) -> float:
        """FMAs in the time that a body takes, all its iterations together."""
        around = around or Around({})
        total, straight = 0.0, Straight()
        for leaf, inside in self._straight(body, around):
            if isinstance(leaf, Loop):
                times = math.prod(inside.unrolled.values()) / math.prod(around.unrolled.values())
                extents = {**inside.extents, leaf.var: leaf.extent}
                guards = _bounds(leaf, extents)
                here = Around(extents, granted=inside.granted | guards)
                iterations = leaf.extent * _share(guards, extents)
                total += times * (ENTRY + iterations * (STEP + self.time(leaf.body, here)))
            else:
                self._count(leaf, inside, straight)
        return total + straight.time(self.load)

    def _straight(self, body: Body, around: Around) -> Iterator[tuple[Leaf | Loop, Around]]:
        """Statements that unrolling leaves in a row, and the run-time loops between them."""
        for statement in body:
            if isinstance(statement, Let):
                extents = {**around.extents, statement.var: statement.extent}
                digits = {**around.digits, statement.var: statement.of.variables}
                yield from self._straight(statement.body, replace(around, extents=extents, digits=digits))
            elif not isinstance(statement, Loop):
                yield statement, around
            elif statement.kind in ("unroll", "vector") or statement.extent == 1:
                extents = {**around.extents, statement.var: statement.extent}
                lane = statement.var if statement.kind == "vector" and statement.extent > 1 else around.lane
                unrolled = around.unrolled if lane == statement.var else {
                    **around.unrolled, statement.var: statement.extent}
                yield from self._straight(statement.body, Around(extents, unrolled, lane, around.granted,
                                                                  around.digits))
            else:
                yield statement, around

    def _count(self, leaf: Leaf, around: Around, straight: Straight) -> None:
        times = math.prod(around.unrolled.values())
        straight.arithmetic += times * arithmetic(leaf) * self._density(leaf, around)
        for load in loads(leaf.value):
            if not self._in_registers(load.tensor):
                self._load(self.program.tensor(load.tensor), load.index, around, straight)
        if not self._in_registers(leaf.tensor):
            self._store(leaf, around, straight)
        elif isinstance(leaf, Reduce):
            used = {v for a in leaf.index for v in a.variables}
            straight.latency += LATENCY * math.prod(e for v, e in around.unrolled.items() if v not in used)

    def _density(self, leaf: Leaf, around: Around) -> float:
        """The share of the products that are not with the zeros of a matrix."""
        matrix = matrix_of(self.program, leaf)
        if matrix is None or not {v for a in matrix.index for v in a.variables} <= around.unrolled.keys():
            return 1.0
        values = self.program.tensor(matrix.tensor).values
        return sum(map(bool, values)) / len(values)

    def _in_registers(self, name: str) -> bool:
        return self.program.tensor(name).role == "register"

    def _load(self, tensor: Tensor, index: Index, around: Around, straight: Straight) -> None:
        count, guarded, moving = _guarded(tensor, index, around)
        stride = _stride(tensor, index, around.lane)
        rows = _run(tensor, index, around)
        if stride == 0:
            straight.loads += count * BROADCAST
            straight.extra += guarded * GUARD
        elif stride == 1:
            straight.loads += count * (1 + SPLIT * (1 - _aligned(tensor, index, around, self.lanes)))
            straight.extra += guarded * (MASK if moving else GUARD)
        elif 2 <= stride <= 4:
            axis = next(i for i, a in enumerate(index) if a.coefficient(around.lane))
            places = _places(index[axis], around)
            share = (count - guarded) / len(places)
            straight.loads += share * _pieces(places, stride, around.lanes) * (1 + SPLIT)
            straight.extra += (count - guarded) * (stride - 1) * SHUFFLE + guarded * around.lanes * GATHER
        elif rows and not guarded:
            squares = -(-rows // around.lanes) * count / rows
            straight.loads += squares * around.lanes
            straight.extra += squares * around.lanes * math.log2(around.lanes) * SHUFFLE
        else:
            straight.extra += count * around.lanes * GATHER

    def _store(self, leaf: Leaf, around: Around, straight: Straight) -> None:
        tensor, index = self.program.tensor(leaf.tensor), leaf.index
        count = math.prod(around.unrolled.values())
        stride = _stride(tensor, index, around.lane)
        guards = [w for w in leaf.where if w not in around.granted and w.bounds(around.extents)[1] >= 0]
        if isinstance(leaf, Reduce):
            straight.loads += count
        if stride <= 1:
            straight.stores += count
            straight.extra += count * MASKED_STORE * bool(guards)
        elif (rows := _run(tensor, index, around)) > 1:
            full, part = divmod(rows, around.lanes)
            straight.extra += count / rows * around.lanes * (
                full * SQUARE + (PART_SQUARE + part * PART_ROW if part else 0))
        else:
            straight.extra += count * around.lanes * SCATTER
        if any(_is_dynamic(w, around) for w in guards):
            straight.extra += count * MASK


def _guarded(tensor: Tensor, index: Index, around: Around) -> tuple[int, int, bool]:
    """Distinct accesses of unrolled code; those that a run-time test keeps inside the tensor; whether a test
    differs between lanes."""
    count = safe = 1
    moving = False
    for a, end in zip(index, tensor.shape, strict=True):
        places = _places(a, around)
        count *= len(places)
        if not _is_dynamic(a, around):
            safe *= len(places)  # known now: a constant mask
            continue
        low, high = a.part(v for v in a.variables if v not in around.unrolled).bounds(around.extents)
        above, below = a * -1 - 1 in around.granted, a - end in around.granted
        inside = sum((above or place + low >= 0) and (below or place + high < end) for place in places)
        safe *= inside
        moving |= inside < len(places) and around.lane in a.variables
    spread = _by_digits(index, around)
    return count * spread, (count - safe) * spread, moving


def _by_digits(index: Index, around: Around) -> int:
    """The iterations of unrolled loops that an index depends on by their digits."""
    used = {v for a in index for v in a.variables}
    through = {v for digit in used & around.digits.keys() for v in around.digits[digit]} - used
    return math.prod(around.unrolled.get(v, 1) for v in through)


def _bounds(loop: Loop, extents: Mapping[str, int]) -> frozenset[Affine]:
    """The guards that all statements of a loop share and that bound its variable, as the emitter finds them."""
    every = [set(leaf.where) for _, leaf in leaves(loop.body)]
    return frozenset(w for w in set.intersection(*every) if loop.var in w.variables
                     and w.variables <= extents.keys() and w.bounds(extents)[1] >= 0)


def _share(guards: frozenset[Affine], extents: Mapping[str, int]) -> float:
    """The share of the points of the loops at which all guards hold."""
    names = sorted({v for w in guards for v in w.variables})
    return _holding(guards, tuple((name, extents[name]) for name in names)) if guards else 1.0


@lru_cache(maxsize=4096)
def _holding(guards: frozenset[Affine], extents: tuple[tuple[str, int], ...]) -> float:
    names, counts = [name for name, _ in extents], [count for _, count in extents]
    holds = 0
    for values in itertools.product(*map(range, counts)):
        point = dict(zip(names, values, strict=True))
        holds += all(w.evaluate(point) < 0 for w in guards)
    return holds / math.prod(counts)


def _is_dynamic(a: Affine, around: Around) -> bool:
    return any(v not in around.unrolled and v != around.lane and around.extents[v] > 1 for v in a.variables)


def _places(a: Affine, around: Around) -> tuple[int, ...]:
    """The distinct values of an index's known part: its constant and its unrolled loops."""
    return _sums(a.constant, tuple((c, around.unrolled[v]) for v, c in a.terms if v in around.unrolled))


@lru_cache(maxsize=4096)
def _sums(constant: int, terms: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    found = {constant}
    for coefficient, extent in terms:
        found = {value + coefficient * i for value in found for i in range(extent)}
    return tuple(sorted(found))


def _unit(tensor: Tensor, axis: int) -> int:
    """The distance in memory of neighbours along an axis."""
    return min(stored.stride for stored in tensor.storage if stored.axis == axis)


def _stride(tensor: Tensor, index: Index, var: str) -> int:
    """The distance in memory between a variable's neighbours; 0 where it does not move the access."""
    return sum(abs(a.coefficient(var)) * _unit(tensor, axis) for axis, a in enumerate(index)) if var else 0


def _run(tensor: Tensor, index: Index, around: Around) -> int:
    """How many unrolled iterations are neighbours in memory: the rows of a transposition, 0 if none."""
    return next((extent for var, extent in around.unrolled.items()
                 if extent > 1 and _stride(tensor, index, var) == 1), 0)


def _aligned(tensor: Tensor, index: Index, around: Around, lanes: int) -> float:
    """The share of vector loads that lie within one cache line."""
    share = 1.0
    for axis, a in enumerate(index):
        unit = _unit(tensor, axis)
        if any(v != around.lane and v not in around.unrolled and around.extents[v] > 1 and c * unit % lanes
               for v, c in a.terms):
            return 0.0
        places = _places(a, around)
        share *= sum(place * unit % lanes == 0 for place in places) / len(places)
    return share


def _pieces(places: Iterable[int], stride: int, lanes: int) -> int:
    """Vectors that cover every ``stride``-th element from each place, shared between places."""
    found = set()
    for place in places:
        skip = place % stride
        found |= {place - skip + lanes * part for part in range((skip + (lanes - 1) * stride) // lanes + 1)}
    return len(found)


def arithmetic(leaf: Leaf) -> float:
    """Instructions beside loads and stores; a product added into a sum is one."""
    def count(value: object) -> float:
        if not isinstance(value, Op):
            return 0
        return (EXP if value.name == "exp" else 1) + sum(map(count, value.values))
    fused = isinstance(leaf.value, Op) and leaf.value.name == "mul"
    return count(leaf.value) + (1 if isinstance(leaf, Reduce) and not fused else 0)
