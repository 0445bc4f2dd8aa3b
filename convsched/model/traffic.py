"""Bytes that a scheduled nest moves between caches, counted from boxes of elements.

The elements of a tensor that a loop touches are taken as a box, the hull of those of all statements inside
(a peeled copy touches the same data or its neighbours); its footprint is the cache lines of the box. A loop
whose footprint fits a cache of S bytes brings it in once. Where only one iteration's fits, the next one
brings in what it does not share with it, so all together bring in the loop's footprint or, where iterations
share nothing, one iteration's each. Where not even that fits, every iteration starts over.

A cache of several ways keeps an address in one of ``size / way`` places. So rows a multiple of ``way / k``
bytes apart fall into k sets of lines, and more than ``k size / way`` of them do not fit, however small.

Source: the footprints of Wolf and Lam, "A Data Locality Optimizing Algorithm" (PLDI 1991), as boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from convsched.ir import Affine, Block, Body, Let, Loop, Program, Statement, Tensor, leaves
from convsched.ir.walk import indices

LINE_BYTES = 64  # bytes of a cache line
WORD_BYTES = 4  # bytes of an element


class Side(NamedTuple):
    """A box along one axis: from ``low`` to ``high``, both inclusive, past what outer loops add."""

    outer: tuple[tuple[str, int], ...]
    low: int
    high: int

    @staticmethod
    def of(a: Affine) -> Side:
        """The side of a single element."""
        return Side(a.terms, a.constant, a.constant)

    def over(self, var: str, extent: int) -> Side:
        """The side that all iterations of a loop touch."""
        for at, (name, coefficient) in enumerate(self.outer):
            if name == var:
                reach = coefficient * (extent - 1)
                rest = self.outer[:at] + self.outer[at + 1:]
                return Side(rest, self.low + min(0, reach), self.high + max(0, reach))
        return self


class Cache(NamedTuple):
    """A cache's bytes, and those of one way (0: its sets do not matter)."""

    size: int
    way: int


class Rows(NamedTuple):
    """Runs of so many cache lines, ``apart`` (count, bytes) along each axis that is not in a run."""

    lines: int
    apart: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        """Of all lines."""
        return math.prod(count for count, _ in self.apart) * self.lines * LINE_BYTES

    def collide(self, cache: Cache) -> bool:
        """Whether more rows fall into the same sets than the cache has ways."""
        if not cache.way:
            return False
        shared = math.prod(-(-count * math.gcd(stride, cache.way) // cache.way) for count, stride in self.apart)
        return shared > cache.size // cache.way


Box = tuple[Side, ...]
Key = tuple[str, tuple[tuple[tuple[str, int], ...], ...]]  # tensor, what outer loops add along each axis
Boxes = dict[Key, Box]


@dataclass(frozen=True)
class Touched:
    """What a statement or body touches in memory: its boxes, the rows of each, and bytes by tensor."""

    boxes: Boxes
    rows: tuple[Rows, ...]
    bytes: dict[str, int]

    def fits(self, cache: Cache) -> bool:
        """Whether a cache keeps all of it."""
        return sum(self.bytes.values()) <= cache.size and not any(rows.collide(cache) for rows in self.rows)


class Traffic:
    """Footprints and traffic of one program's run stages."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.bodies = [stage.body for stage in program.stages if stage.when == "run"]
        self.written = {leaf.tensor for body in self.bodies for _, leaf in leaves(body)}
        self._known: dict[int, Touched] = {}  # by the identity of a part of the program

    def into(self, size: int, way: int = 0) -> int:
        """Bytes into and out of a cache of ``size`` bytes in one of many calls: nothing where all data fit.

        What is written is read first and written back when it leaves, so it counts twice. ``way``: bytes of
        one way of the cache, 0 where addresses are spread too well for rows to collide.
        """
        cache = Cache(size, way)
        if self._touched(_merged([self.of(body).boxes for body in self.bodies])).fits(cache):
            return 0
        return sum(moved * (2 if name in self.written else 1)
                   for body in self.bodies for name, moved in self._body(body, cache).items())

    def of(self, part: Body | Statement) -> Touched:
        """What a statement with its loops, or a body, touches."""
        known = self._known.get(id(part))
        if known is None:
            if isinstance(part, tuple) and len(part) == 1:
                return self.of(part[0])
            if isinstance(part, tuple):
                boxes = _merged([self.of(statement).boxes for statement in part])
            elif isinstance(part, Block):
                boxes = _merged([{key: tuple([side.over(part.var, part.extent) for side in box])
                                  for key, box in self.of(part.body).boxes.items()}])
            else:
                boxes = _merged([{(name, ()): tuple([Side.of(a) for a in index])}
                                 for name, index in indices(part)
                                 if self.program.tensor(name).role != "register"])
            known = self._known[id(part)] = self._touched(boxes)
        return known

    def _touched(self, boxes: Boxes) -> Touched:
        """Bytes by tensor are those of the boxes, but at most the tensor's own."""
        rows, found = [], dict[str, int]()
        for (name, _), box in boxes.items():
            tensor = self.program.tensor(name)
            rows.append(_rows(tensor, box))
            whole = -(-tensor.elements * WORD_BYTES // LINE_BYTES) * LINE_BYTES
            found[name] = min(whole, found.get(name, 0) + rows[-1].bytes)
        return Touched(boxes, tuple(rows), found)

    def _body(self, body: Body, cache: Cache) -> dict[str, int]:
        total: dict[str, int] = {}
        for statement in body:
            part = self._loop(statement, cache) if isinstance(statement, Block) else self.of(statement).bytes
            for name, moved in part.items():
                total[name] = total.get(name, 0) + moved
        return total

    def _loop(self, loop: Loop | Let, cache: Cache) -> dict[str, int]:
        if isinstance(loop, Let):
            return self._body(loop.body, cache)
        whole = self.of(loop)
        if whole.fits(cache):
            return whole.bytes
        once = self._body(loop.body, cache)
        if not self.of(loop.body).fits(cache):
            return {name: moved * loop.extent for name, moved in once.items()}
        return {name: min(moved * loop.extent, whole.bytes[name]) for name, moved in once.items()}


def _merged(parts: Iterable[Boxes]) -> Boxes:
    """The hulls of boxes of one tensor that outer loops move alike."""
    found: Boxes = {}
    for part in parts:
        for (name, _), box in part.items():
            key = name, tuple([side.outer for side in box])
            old = found.get(key)
            found[key] = box if old is None or old == box else tuple(
                Side(a.outer, min(a.low, b.low), max(a.high, b.high)) for a, b in zip(box, old, strict=True))
    return found


def _rows(tensor: Tensor, box: Box) -> Rows:
    """The runs of neighbours in memory that a box consists of."""
    length, apart = 1, []
    whole = True
    for stored in reversed(tensor.storage):
        side, end = box[stored.axis], tensor.shape[stored.axis]
        inside = side.high - side.low + 1 if side.outer else min(side.high, end - 1) - max(side.low, 0) + 1
        count = min(stored.size, -(-max(0, min(inside, end)) // stored.step))
        if whole and stored.stride == length:
            length *= count
            whole = count == stored.size
        elif count != 1:
            apart.append((count, stored.stride * WORD_BYTES))
            whole = False
    return Rows(-(-length * WORD_BYTES // LINE_BYTES), tuple(apart))
