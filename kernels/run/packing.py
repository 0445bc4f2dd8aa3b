"""Binding weights: copies of weights in the order of use, flushed and aligned, made by NumPy views.

A packing stage stores ``packed[v0, v1, ...] = w[A v + a]`` with an affine index. Over the parts ``p`` in which the axes
are stored, ``v = B p``, that is ``w[A B p + a]``: a view of ``w`` with strides ``(A B)^T strides(w)``. Elements outside
``w`` are zero, and so are those past the end of an axis whose last block is not full.

Loops are cut into blocks. A block is read and written in pieces that are as long as they can be on both sides, by way
of a scratch array that stays in the cache: a transposition of whole arrays would touch a cache line for each element.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from convsched.ir import Affine, Index, Load, Program, Stage, leaves

Array = npt.NDArray[np.float32]
ALIGNMENT_BYTES = 64  # bytes: a cache line, and the widest vector
BLOCK_ELEMENTS = 1 << 15  # elements: 128 KiB, so that a block stays in L2 beside what is made of it
_LINE = ALIGNMENT_BYTES // 4
_LEAST_NORMAL = 1 << 23  # the bits of the smallest normal number
_SETS = 256  # elements: rows that are a multiple of 1 KiB apart share a few sets of the cache

Box: TypeAlias = tuple[slice, ...]
"""A start and a stop for each of some loops."""

Limit: TypeAlias = tuple[int, tuple[int, ...], int]
"""A constant, the coefficient of each loop, and a size: their sum is to be at least 0 and below the size."""


@dataclass(frozen=True)
class Copy:
    """One packing stage: ``coefficients[axis][i]`` of loop ``i`` in the source's index along ``axis``.

    ``strides`` are the loops' in the target, in elements; what no loop writes of its ``elements`` is zero, and so is
    what lies outside ``limits``: (coefficients, size) of the logical axes that the target stores in blocks.
    """

    target: str
    source: str
    elements: int
    strides: tuple[int, ...]
    extents: tuple[int, ...]
    coefficients: tuple[tuple[int, ...], ...]
    constants: tuple[int, ...]
    limits: tuple[tuple[tuple[int, ...], int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``Copy.from_json`` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Copy:
        """The copy of a JSON value."""
        return Copy(value["target"], value["source"], value["elements"], tuple(value["strides"]),
                    tuple(value["extents"]),
                    tuple(map(tuple, value["coefficients"])), tuple(value["constants"]),
                    tuple((tuple(row), size) for row, size in value["limits"]))

    def run(self, source: Array) -> Array:
        """The packed array, flat; beside it, some hundred KiB are used."""
        packed = aligned_zeros(self.elements)
        limits = [*zip(self.constants, self.coefficients, source.shape, strict=True),
                  *((0, row, size) for row, size in self.limits)]
        steps = source_steps(source, self.coefficients, len(self.extents))
        for box in inside(limits, tuple(map(slice, [0] * len(self.extents), self.extents))):
            first = sum(stride * side.start for stride, side in zip(self.strides, box, strict=True))
            read = elements_from(source, self.constants, self.coefficients, box)
            _copy_blocks(packed[first:], read, [side.stop - side.start for side in box], self.strides, steps)
        return packed


def plain(name: str, array: Array) -> Copy:
    """The copy that only aligns an array and flushes its denormals."""
    strides = tuple(s // array.itemsize for s in np.empty(array.shape, np.float32).strides)
    identity = tuple(tuple(int(i == j) for j in range(array.ndim)) for i in range(array.ndim))
    return Copy(name, name, array.size, strides, array.shape, identity, (0,) * array.ndim)


def copy_of(program: Program, stage: Stage) -> Copy:
    """A packing stage as data; the steps of a schedule leave it a copy, cut into equal parts."""
    (_, statement), = leaves(stage.body)
    assert isinstance(statement.value, Load)
    target = program.tensor(statement.tensor)
    parts = target.storage
    index = [_of_axes(a, statement.index) for a in statement.value.index]
    in_blocks = [axis for axis, size in enumerate(target.shape)
                 if prod(part.size for part in parts if part.axis == axis) > size]

    def row(factors: Sequence[int]) -> tuple[int, ...]:
        """The coefficient of each part in a sum of the target's axes, each times its factor."""
        return tuple(factors[part.axis] * part.step for part in parts)

    return Copy(
        target=target.name, source=statement.value.tensor, elements=target.elements,
        strides=tuple(part.stride for part in parts), extents=tuple(part.size for part in parts),
        coefficients=tuple(row(factors) for factors, _ in index), constants=tuple(constant for _, constant in index),
        limits=tuple((row([int(i == axis) for i in range(len(target.shape))]), target.shape[axis])
                     for axis in in_blocks))


def _of_axes(a: Affine, axes: Index) -> tuple[list[int], int]:
    """An index as a sum of those of the target's ``axes``, which share no loop: a factor each, and a constant."""
    factors = [a.coefficient(axis.terms[0][0]) // axis.terms[0][1] if axis.terms else 0 for axis in axes]
    rest = a - Affine.total([(var, factor * step) for factor, axis in zip(factors, axes, strict=True)
                             for var, step in axis.terms], 0)
    assert not rest.terms
    assert not any(axis.constant for axis in axes)
    return factors, rest.constant


def source_steps(source: Array, coefficients: Sequence[Sequence[int]], loops: int) -> list[int]:
    """The stride of each loop in the source, in elements."""
    strides = [stride // source.itemsize for stride in source.strides]
    return [sum(row[i] * stride for row, stride in zip(coefficients, strides, strict=True)) for i in range(loops)]


def elements_from(source: Array, constants: Sequence[int], coefficients: Sequence[Sequence[int]], box: Box) -> Array:
    """The source from the element on that a box of loops starts with."""
    first = [constant + sum(step * side.start for step, side in zip(row, box, strict=True))
             for constant, row in zip(constants, coefficients, strict=True)]
    return source[tuple(slice(start, None) for start in first)]


def inside(limits: Sequence[Limit], box: Box) -> Iterator[Box]:
    """The parts of a box of loops where all limits hold: apart from one another, and few."""
    for constant, row, size in limits:
        ends = [(step * side.start, step * (side.stop - 1)) for step, side in zip(row, box, strict=True)]
        low, high = constant + sum(map(min, ends)), constant + sum(map(max, ends))
        if high < 0 or low >= size:
            return
        if low < 0 or high >= size:
            loop = max((i for i, side in enumerate(box) if side.stop - side.start > 1), key=lambda i: abs(row[i]))
            over, step, side = high - size + 1 if high >= size else -low, row[loop], box[loop]
            outside = -(-over // abs(step))  # iterations at one end, at least so many of which are not inside
            cut = side.stop - outside if (step > 0) == (high >= size) else side.start + outside
            cut = min(max(cut, side.start + 1), side.stop - 1)
            for part in (slice(side.start, cut), slice(cut, side.stop)):
                yield from inside(limits, (*box[:loop], part, *box[loop + 1:]))
            return
    yield box


def blocks(extents: Sequence[int], sizes: Sequence[int]) -> Iterator[Box]:
    """Loops in blocks of so many iterations each, or fewer at the end."""
    return itertools.product(*([slice(start, min(start + size, extent)) for start in range(0, extent, size)]
                               for extent, size in zip(extents, sizes, strict=True)))


def block_sizes(extents: Sequence[int], strides: Sequence[Sequence[int]], most: int) -> list[int]:
    """The sides of a block of at most so many points, where each loop has a stride in each of several arrays.

    A block is doubled in turn along the loop of the least stride of each array, so that each is read or written in long
    pieces. A transposition gets a square, a copy a line:

    >>> block_sizes((4096, 4096), [(4096, 1), (1, 4096)], 1 << 14), block_sizes((99, 64), [(64, 1)] * 2, 1 << 10)
    ([128, 128], [15, 64])
    """
    sizes = [1] * len(extents)
    orders = [sorted(range(len(extents)), key=lambda i, steps=steps: abs(steps[i])) for steps in strides]  # type: ignore[misc]
    while True:
        before = list(sizes)
        for order in orders:
            loop = next((i for i in order if sizes[i] < extents[i]), None)
            if loop is not None:
                grown = min(2 * sizes[loop], extents[loop])
                sizes[loop] = grown if prod(sizes) // sizes[loop] * grown <= most else sizes[loop]
        if sizes == before:  # the blocks of a loop become equal
            return [-(-extent // -(-extent // size)) for extent, size in zip(extents, sizes, strict=True)]


def _copy_blocks(target: Array, source: Array, extents: Sequence[int], written: Sequence[int],
                 read: Sequence[int]) -> None:
    """Copy over loops of given strides (in elements) of target and source, denormals flushed."""
    loops = _merged(sorted(zip(extents, written, read, strict=True), key=lambda loop: -loop[1]))
    extents, written, read = ([loop[i] for loop in loops] for i in range(3))
    sizes = block_sizes(extents, (read, written), BLOCK_ELEMENTS)
    to = np.lib.stride_tricks.as_strided(target, extents, [4 * s for s in written])
    of = np.lib.stride_tricks.as_strided(source, extents, [4 * s for s in read], writeable=False)
    scratch, staged = _scratch(sizes, read)
    for block in blocks(extents, sizes):
        part = staged[tuple(slice(side.stop - side.start) for side in block)]
        part[...] = of[block]
        flush_denormals(scratch)
        to[block] = part


def _merged(loops: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Loops (extent, stride, stride) without those that only go on where the next one ends."""
    found: list[tuple[int, int, int]] = []
    for extent, *strides in loops:
        if extent == 1:
            continue
        if found and found[-1][1:] == (extent * strides[0], extent * strides[1]):
            extent *= found.pop()[0]
        found.append((extent, strides[0], strides[1]))
    return found or [(1, 1, 1)]


def _scratch(sizes: Sequence[int], strides: Sequence[int]) -> tuple[Array, Array]:
    """An array for a block, flat and as a view of the block, in the order of ``strides``.

    Rows are not a multiple of 1 KiB apart: their columns would evict each other from the cache.
    """
    steps, length = [0] * len(sizes), 1
    for loop in sorted(range(len(sizes)), key=lambda i: abs(strides[i])):
        steps[loop] = length
        length *= sizes[loop]
        length += _LINE if length % _SETS == 0 else 0
    flat = np.zeros(length, np.float32)
    return flat, np.lib.stride_tricks.as_strided(flat, sizes, [4 * step for step in steps])


def aligned_zeros(elements: int) -> Array:
    """A flat array of zeros whose data starts on a cache line."""
    raw = np.zeros(elements + ALIGNMENT_BYTES // 4, np.float32)
    start = -raw.ctypes.data % ALIGNMENT_BYTES // 4
    return raw[start:start + elements]


def flush_denormals(values: Array) -> None:
    """Set numbers below the smallest normal to zero, in place: they slow arithmetic 10 to 100 times."""
    unsigned, signed = values.view(np.uint32), values.view(np.int32)  # their least: of the positive, of the negative
    if unsigned.min() < _LEAST_NORMAL or signed.min() < _LEAST_NORMAL - (1 << 31):
        np.copyto(values, 0, where=np.abs(values) < np.finfo(np.float32).tiny)
