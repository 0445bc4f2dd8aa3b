"""Instructions that a scheduled nest issues, and their time.

Unrolled and vector loops around statements make straight-line code. In it, an element that several
iterations read is loaded once, and the time is at least

    max(arithmetic, loads, latency of sums)

and stores, shuffles and tests of borders come on top: they use the same pipes between the sums. A guard that
all statements of a run-time loop share is a bound of that loop: of its iterations, only those run. How an
access is loaded or stored is its class (``ir.access``), which the emitter reads too. Counts are of instructions, for
which ``constants`` has times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

from convsched.ir import (
    Affine,
    Body,
    Index,
    Leaf,
    Let,
    Load,
    Loop,
    Op,
    Program,
    Reduce,
    Tensor,
    Value,
    leaves,
    loads,
    matrix_of,
)
from convsched.ir.access import Access, Vector, classify_load, classify_store
from convsched.ir.address import offset
from convsched.model.constants import CORE

PICKS = {8: 2}  # shuffles that pick lanes of two registers, by their lanes: AVX2's stay inside halves of a register

@dataclass
class Code:
    """Instructions of straight-line code, by what they do; those of lanes that move one by one are counted by lane."""

    arithmetic: float = 0.0  # of registers: a product added into a sum is one
    exponentials: float = 0.0
    vectors: float = 0.0  # vectors loaded
    split: float = 0.0  # of them, those across two cache lines
    broadcasts: float = 0.0  # elements loaded for all lanes
    stores: float = 0.0
    masked_stores: float = 0.0  # of them, those of part of a vector
    shuffles: float = 0.0  # of what was loaded
    gathered: float = 0.0  # lanes
    scattered: float = 0.0  # lanes
    guards: float = 0.0  # tests of one element or row
    masks: float = 0.0  # run-time masks of a vector
    squares: float = 0.0  # the time of rows transposed and stored, and their shuffles and stores
    square_shuffles: float = 0.0
    square_stores: float = 0.0
    latency: float = 0.0  # FMAs in the time that the longest sum takes

    @property
    def loads(self) -> float:
        """Instructions that load."""
        return self.vectors + self.broadcasts

    def time(self, load: float) -> float:
        """FMAs in its time, where a vector load takes ``load`` of them."""
        arithmetic = self.arithmetic + self.exponentials * CORE.exponential
        loads = self.vectors + self.broadcasts * CORE.broadcast + self.split * CORE.split
        alone = (self.shuffles * CORE.shuffle + self.gathered * CORE.gather + self.scattered * CORE.scatter
                 + self.guards * CORE.guard + self.masks * CORE.mask + self.masked_stores * CORE.masked_store)
        return max(arithmetic, loads * load, self.latency) + self.stores * CORE.store * load + alone + self.squares

    def add(self, other: Code) -> None:
        """Count the instructions of other code too."""
        for one in fields(Code):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


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
        total, code = 0.0, Code()
        for part, inside in self._straight(body, around):
            if isinstance(part, Loop):
                times, guards, here = self._enter(part, inside, around)
                iterations = part.extent * _share(guards, here.extents)
                total += times * (CORE.entry + iterations * (CORE.step + self.time(part.body, here)))
            else:
                self._count(part, inside, code)
        return total + code.time(self.load)

    def written(self, body: Body, around: Around | None = None) -> Code:
        """The instructions that are written for a body, those of run-time loops once."""
        around, total = around or Around({}), Code()
        for part, inside in self._straight(body, around):
            if isinstance(part, Loop):
                times, _, here = self._enter(part, inside, around)
                code = self.written(part.body, here)
                for _ in range(times):
                    total.add(code)
            else:
                self._count(part, inside, total)
        return total

    def _enter(self, loop: Loop, inside: Around, around: Around) -> tuple[int, frozenset[Affine], Around]:
        """How often unrolling writes a run-time loop, the guards that bound it, and what is around its body."""
        times = math.prod(inside.unrolled.values()) // math.prod(around.unrolled.values())
        extents = {**inside.extents, loop.var: loop.extent}
        guards = _bounds(loop, extents)
        return times, guards, Around(extents, granted=inside.granted | guards)

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

    def _count(self, leaf: Leaf, around: Around, code: Code) -> None:
        times = math.prod(around.unrolled.values())
        share = times * self._density(leaf, around)
        code.arithmetic += share * _operations(leaf)
        code.exponentials += share * _exponentials(leaf.value)
        for load in loads(leaf.value):
            if not self._in_registers(load.tensor) and not self._is_literal(load, around):
                self._load(self.program.tensor(load.tensor), load.index, around, code)
        if not self._in_registers(leaf.tensor):
            self._store(leaf, around, code)
        elif isinstance(leaf, Reduce):
            used = {v for a in leaf.index for v in a.variables}
            code.latency += CORE.latency * math.prod(e for v, e in around.unrolled.items() if v not in used)

    def _density(self, leaf: Leaf, around: Around) -> float:
        """The share of the products that are instructions: not those with zeros of a matrix, nor the first of a sum in
        registers, where that is with 1 or -1."""
        matrix = matrix_of(self.program, leaf)
        if matrix is None or not {v for a in matrix.index for v in a.variables} <= around.unrolled.keys():
            return 1.0
        tensor, own = self.program.tensor(matrix.tensor), {v for a in leaf.index for v in a.variables}
        nonzero = sum(map(bool, tensor.values))
        if self._in_registers(leaf.tensor) and len(tensor.shape) == 2:
            by_rows = bool(matrix.index[0].variables & own)
            nonzero -= _free(tensor.values, tensor.shape[1], by_rows)
        return nonzero / len(tensor.values)

    def _in_registers(self, name: str) -> bool:
        return self.program.tensor(name).role == "register"

    def _is_literal(self, load: Load, around: Around) -> bool:
        """Whether it is an element of a constant that is known as code is written."""
        return self.program.tensor(load.tensor).role == "constant" and not any(
            around.lane in a.variables or _is_dynamic(a, around) for a in load.index)

    def _vector(self, around: Around) -> Vector:
        return Vector(around.lane, around.lanes, self.lanes)

    def _load(self, tensor: Tensor, index: Index, around: Around, code: Code) -> None:
        access = classify_load(offset(tensor, index, around.extents), self._vector(around), around.unrolled)
        count, guarded, moving = _guarded(tensor, index, around)
        by_lane = guarded if moving else 0  # accesses of which some lanes may be outside
        if access.kind in ("scalar", "broadcast"):
            code.broadcasts += count
            code.guards += guarded
        elif access.kind == "contiguous":
            code.vectors += count
            code.split += count * (1 - _aligned(access, around, self.lanes))
            code.masks += by_lane
            code.guards += guarded - by_lane
        elif access.kind == "strided":
            axis = next(i for i, a in enumerate(index) if a.coefficient(around.lane))
            places = _places(index[axis], around)
            pieces = (count - by_lane) / len(places) * _pieces(places, access.stride, around.lanes)
            code.vectors += pieces
            code.split += pieces
            code.shuffles += (count - by_lane) * (access.stride - 1) * PICKS.get(self.lanes, 1)
            code.gathered += by_lane * around.lanes
            code.guards += guarded - by_lane
        elif access.kind == "transposed" and not moving:
            rows = around.unrolled[access.run]
            squares = -(-rows // around.lanes) * count / rows
            code.vectors += squares * around.lanes
            code.shuffles += squares * around.lanes * math.log2(around.lanes)
        else:
            code.gathered += count * around.lanes

    def _store(self, leaf: Leaf, around: Around, code: Code) -> None:
        tensor, index = self.program.tensor(leaf.tensor), leaf.index
        access = classify_store(offset(tensor, index, around.extents), self._vector(around), around.unrolled)
        count = math.prod(around.unrolled.values())
        guards = [w for w in leaf.where if w not in around.granted and w.bounds(around.extents)[1] >= 0]
        if isinstance(leaf, Reduce):
            code.vectors += count
        if access.kind in ("scalar", "contiguous"):
            code.stores += count
            code.masked_stores += count * bool(guards)
        elif access.kind == "transposed" and access.run:
            rows = around.unrolled[access.run]
            code.squares += count / rows * CORE.squares(rows, around.lanes)
            code.square_shuffles += count * math.log2(around.lanes)
            code.square_stores += count / rows * -(-rows // around.lanes) * around.lanes
        else:
            code.scattered += count * around.lanes
        if any(_is_dynamic(w, around) for w in guards):
            code.masks += count


@lru_cache(maxsize=256)
def _free(values: tuple[float, ...], columns: int, by_rows: bool) -> int:
    """The rows, or columns, of a matrix whose first number is 1 or -1, zeros apart."""
    lines = [values[i:i + columns] for i in range(0, len(values), columns)] if by_rows else [
        values[i::columns] for i in range(columns)]
    return sum(next((abs(number) for number in line if number), 0) == 1 for line in lines)


def _guarded(tensor: Tensor, index: Index, around: Around) -> tuple[int, int, bool]:
    """Distinct accesses of unrolled code; those that a run-time test keeps inside the tensor; whether a test
    differs between lanes."""
    count = safe = 1
    moving = False
    for a, end in zip(index, tensor.shape, strict=True):
        places = _places(a, around)
        if not _is_dynamic(a, around):  # known now: a constant mask, and no load where all lanes are outside
            low, high = a.part([around.lane]).bounds(around.extents)
            inside = sum(place + high >= 0 and place + low < end for place in places)
            count, safe = count * inside, safe * inside
            continue
        count *= len(places)
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


def _aligned(access: Access, around: Around, lanes: int) -> float:
    """The share of vector loads that lie within one cache line."""
    at = access.offset.affine
    if any(v != around.lane and v not in around.unrolled and around.extents[v] > 1 and c % lanes for v, c in at.terms):
        return 0.0
    places = _places(at, around)
    return sum(place % lanes == 0 for place in places) / len(places)


def _pieces(places: Iterable[int], stride: int, lanes: int) -> int:
    """Vectors that cover every ``stride``-th element from each place, shared between places."""
    found = set()
    for place in places:
        skip = place % stride
        found |= {place - skip + lanes * part for part in range((skip + (lanes - 1) * stride) // lanes + 1)}
    return len(found)


def _operations(leaf: Leaf) -> int:
    """Instructions beside loads, stores and exponentials; a product added into a sum is one."""
    def count(value: Value) -> int:
        return (value.name != "exp") + sum(map(count, value.values)) if isinstance(value, Op) else 0

    fused = isinstance(leaf.value, Op) and leaf.value.name == "mul"
    return count(leaf.value) + (1 if isinstance(leaf, Reduce) and not fused else 0)


def _exponentials(value: Value) -> int:
    return (value.name == "exp") + sum(map(_exponentials, value.values)) if isinstance(value, Op) else 0
