"""The cost model: a lower bound on a scheduled nest's time, counted from the nest itself.

    seconds >= max(issue, L2 bytes / L2 bandwidth, L3 bytes / ..., DRAM bytes / ...)

``issue`` counts, for each straight-line body, the vector FMAs and the distinct loads that unrolling leaves,
and the latency of sums with few accumulators. Bytes into a cache of size S follow from footprints: a loop
whose data fit in S loads them once; otherwise each iteration loads its own again, except what the iteration
does not move and what fits beside it. The bound orders candidates; measurement decides.

Source: Williams, Waterman, Patterson, "Roofline" (CACM 52, 2009), with the footprints of Wolf and Lam, "A
Data Locality Optimizing Algorithm" (PLDI 1991), taken as boxes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from convsched.ir import Affine, Body, Index, Leaf, Loop, Op, Program, Reduce, leaves, loads
from convsched.legality import indices
from convsched.machine import Machine

LINE = 64  # bytes of a cache line
LATENCY = 8  # vector FMAs in flight that keep the pipes busy
STRIDED = 4  # vector operations that a transposed or gathered access costs beside a plain one
OVERLAP = 0.15  # of the smaller bounds that shows beside the greatest


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second: FLOPs of one core, bytes from each level into the next one up."""

    peak: float
    l2: float
    l3: float
    dram: float


@dataclass(frozen=True)
class Cost:
    """The parts of the bound, seconds; ``seconds`` is the bound that orders candidates."""

    issue: float
    l2: float
    l3: float
    dram: float

    @property
    def seconds(self) -> float:
        parts = (self.issue, self.l2, self.l3, self.dram)
        return max(parts) + OVERLAP * (sum(parts) - max(parts))


def cost(program: Program, machine: Machine, rates: Rates, threads: int = 1) -> Cost:
    """The bound for a scheduled program; work inside parallel loops is divided by ``threads``."""
    counted = _Counter(program)
    vector = 2 * machine.lanes / rates.peak  # seconds of a vector FMA
    issue = 0.0
    moved = {"l1": 0.0, "l2": 0.0, "l3": 0.0}
    for stage in program.stages:
        if stage.when != "run":
            continue
        loops = {loop for around, _ in leaves(stage.body) for loop in around}
        share = threads if any(loop.kind == "parallel" for loop in loops) else 1
        issue += counted.operations(stage.body, {}) * vector / share
        for level, size in (("l1", machine.l1), ("l2", machine.l2), ("l3", machine.l3)):
            total = sum(counted.traffic(stage.body, size).values())
            moved[level] += total / (share if level != "l3" else 1)
    return Cost(issue, moved["l1"] / rates.l2, moved["l2"] / rates.l3, moved["l3"] / rates.dram)


class _Counter:
    """Counts operations and footprints of one program's bodies."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def operations(self, body: Body, unrolled: Mapping[str, int]) -> float:
        """Vector instructions, in units of an FMA, that a body issues in all its iterations."""
        total = 0.0
        straight: list[tuple[Leaf, dict[str, int], str]] = []
        for statement in body:
            if not isinstance(statement, Loop):
                straight.append((statement, dict(unrolled), ""))
            elif statement.kind in ("unroll", "vector") or statement.extent == 1:
                straight += _flatten(statement)
                total += sum(self.operations(inner.body, {}) * math.prod(outer.values()) * inner.extent
                             for inner, outer in _run_time_loops(statement))
            else:
                total += statement.extent * self.operations(statement.body, {})
        return total + self._issue(straight)

    def _issue(self, straight: list[tuple[Leaf, dict[str, int], str]]) -> float:
        """Of one straight-line piece: the greater of arithmetic, distinct loads and the latency of sums."""
        arithmetic = stores = latency = 0.0
        addresses: dict[tuple[str, Index], float] = {}
        for leaf, unrolled, lane in straight:
            times = math.prod(unrolled.values())
            arithmetic += times * _arithmetic(leaf)
            if self._in_registers(leaf.tensor):
                sums = math.prod(e for v, e in unrolled.items() if any(v in a.variables for a in leaf.index))
                latency += times / sums * LATENCY if isinstance(leaf, Reduce) else 0
            else:
                stores += times * self._strided(leaf.tensor, leaf.index, lane)
            for load in loads(leaf.value):
                if not self._in_registers(load.tensor):
                    used = {v for a in load.index for v in a.variables}
                    distinct = math.prod(e for v, e in unrolled.items() if v in used)
                    cost_of_one = self._strided(load.tensor, load.index, lane)
                    addresses[load.tensor, load.index] = distinct * cost_of_one
        return max(arithmetic, sum(addresses.values()), latency) + stores

    def _strided(self, name: str, index: Index, lane: str) -> float:
        """The cost of an access whose lanes are not neighbours, relative to one whose are."""
        tensor = self.program.tensor(name)
        along = [s for s in tensor.storage if lane and index[s.axis].coefficient(lane)]
        return 1.0 if not along or min(s.stride for s in along) == 1 else STRIDED

    def _in_registers(self, name: str) -> bool:
        return self.program.tensor(name).role == "register"

    def footprint(self, body: Body) -> dict[str, float]:
        """Bytes of each tensor in memory that all iterations of a body touch, in whole cache lines."""
        found: dict[str, float] = {}
        for around, leaf in leaves(body):
            extents = {lp.var: lp.extent for lp in around}
            for name, index in indices(leaf):
                if not self._in_registers(name):
                    found[name] = max(found.get(name, 0.0), self._box(name, index, extents))
        return found

    def _box(self, name: str, index: Index, extents: Mapping[str, int]) -> float:
        tensor = self.program.tensor(name)
        sizes = [_width(a, extents) for a in index]
        inner = tensor.storage[-1]
        row = min(sizes[inner.axis], inner.size)
        others = math.prod(sizes) / max(1, sizes[inner.axis]) * math.ceil(sizes[inner.axis] / inner.size)
        return others * math.ceil(4 * row / LINE) * LINE

    def traffic(self, body: Body, size: float) -> dict[str, float]:
        """Bytes of each tensor that come into a cache of ``size`` bytes while a body runs."""
        total: dict[str, float] = {}
        for statement in body:
            part = self._loop_traffic(statement, size) if isinstance(statement, Loop) else self.footprint(
                (statement,))
            for name, moved in part.items():
                total[name] = total.get(name, 0.0) + moved
        return total

    def _loop_traffic(self, loop: Loop, size: float) -> dict[str, float]:
        whole = self.footprint((loop,))
        if sum(whole.values()) <= size:
            return whole
        once = self.traffic(loop.body, size)
        fits = sum(self.footprint(loop.body).values()) <= size
        moves = {name for _, leaf in leaves(loop.body) for name, index in indices(leaf)
                 if any(loop.var in a.variables for a in index)}
        return {name: moved * (1 if fits and name not in moves else loop.extent)
                for name, moved in once.items()}


def _width(a: Affine, extents: Mapping[str, int]) -> int:
    inner = a.part([v for v in a.variables if v in extents])
    low, high = inner.bounds(extents)
    return high - low + 1


def _arithmetic(leaf: Leaf) -> float:
    """Instructions beside loads and stores: a product added into a sum is one."""
    def count(value: object) -> int:
        return (1 if value.name != "exp" else 20) + sum(map(count, value.values)) if isinstance(value, Op) else 0
    fused = isinstance(leaf, Reduce) and isinstance(leaf.value, Op) and leaf.value.name == "mul"
    return count(leaf.value) + (1 if isinstance(leaf, Reduce) and not fused else 0)


def _flatten(loop: Loop) -> list[tuple[Leaf, dict[str, int], str]]:
    """The statements of an unrolled nest, with the extents of unrolled loops and the vector loop's name."""
    found = []
    for around, leaf in leaves((loop,)):
        if all(lp.kind in ("unroll", "vector") or lp.extent == 1 for lp in around):
            lane = next((lp.var for lp in around if lp.kind == "vector"), "")
            found.append((leaf, {lp.var: lp.extent for lp in around if lp.kind != "vector"}, lane))
    return found


def _run_time_loops(loop: Loop, above: tuple[Loop, ...] = ()) -> list[tuple[Loop, dict[str, int]]]:
    """The outermost run-time loops inside an unrolled one, with the unrolled loops around each."""
    here = (*above, loop)
    found: list[tuple[Loop, dict[str, int]]] = []
    for statement in loop.body:
        if not isinstance(statement, Loop):
            continue
        if statement.kind in ("unroll", "vector") or statement.extent == 1:
            found += _run_time_loops(statement, here)
        else:
            found.append((statement, {lp.var: lp.extent for lp in here}))
    return found
