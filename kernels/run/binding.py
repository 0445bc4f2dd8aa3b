"""What happens to weights once, when they are bound: copies in the order of use, and transforms by constants.

A transform is a chain of sums such as ``a[g, s, m, c] = sum_r A[g, r] w[m, c, r, s]`` and
``u[g, h, m, c] = sum_s B[h, s] a[g, s, m, c]``. It is made block by block of the loops that no matrix has (``m c``):
the weights of a block are gathered in the order of the target, the matrices applied one after another in float64, and
the results rounded, stored and flushed. No tensor between them is made as a whole.

``bindings(program)`` are the bind stages as plain data, which an object cache keeps beside the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from math import inf, prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from convsched.errors import LoweringError
from convsched.ir import Affine, Const, Index, Load, Op, Program, Reduce, Stage, Store, leaves, loads
from convsched.kernels.run.packing import (
    BLOCK_ELEMENTS,
    Array,
    Box,
    Copy,
    aligned_zeros,
    block_sizes,
    blocks,
    copy_of,
    elements_from,
    flush_denormals,
    inside,
    source_steps,
)

Doubles: TypeAlias = npt.NDArray[np.float64]
COMBINED_ELEMENTS = 1 << 10  # the largest product of matrices that is applied as one, in one pass over the values
PRODUCTS = 1 << 18  # of one call: for more, OpenBLAS starts threads, which wait for one another on a busy machine


@dataclass(frozen=True)
class Factor:
    """A matrix of ``values``, rows last: of the rows as the target stores them, and of ``summed`` columns."""

    extents: tuple[int, ...]
    strides: tuple[int, ...]
    summed: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def matrix(self) -> Doubles:
        """Its values, as (rows, columns)."""
        return np.array(self.values).reshape(prod(self.extents), prod(self.summed))

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Factor:
        """The factor of a JSON value."""
        return Factor(*(tuple(value[name]) for name in ("extents", "strides", "summed", "values")))


@dataclass(frozen=True)
class Transform:
    """Matrices applied to weights, the first one first, in float64.

    The loops are the columns of each factor, then those with ``extents`` and ``strides`` in the target.
    ``coefficients[axis][i]`` is that of loop ``i`` in the source's index along ``axis``; what lies outside the source
    is zero, and so is what lies outside ``limits``: (coefficients, size) of the logical axes that the target stores
    in parts.
    """

    target: str
    source: str
    elements: int
    factors: tuple[Factor, ...]
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    coefficients: tuple[tuple[int, ...], ...]
    constants: tuple[int, ...]
    limits: tuple[tuple[tuple[int, ...], int], ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``Transform.from_json`` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Transform:
        """The transform of a JSON value."""
        return Transform(
            value["target"], value["source"], value["elements"], tuple(map(Factor.from_json, value["factors"])),
            tuple(value["extents"]), tuple(value["strides"]), tuple(map(tuple, value["coefficients"])),
            tuple(value["constants"]), tuple((tuple(row), size) for row, size in value["limits"]))

    @property
    def summed(self) -> tuple[int, ...]:
        """The extents of the columns of all factors."""
        return tuple(extent for factor in self.factors for extent in factor.summed)

    def run(self, source: Array) -> Array:
        """The transformed weights, flat; beside them, some MiB are used."""
        packed = aligned_zeros(self.elements)
        matrices = self._matrices
        least = _least_weight(matrices)
        rows = tuple(extent for factor in self.factors for extent in factor.extents)
        steps = source_steps(source, self.coefficients, len(self.summed) + len(self.extents))
        sizes = block_sizes(self.extents, (steps[len(self.summed):], self.strides),
                            max(1, 3 * BLOCK_ELEMENTS // self._largest))
        whole_rows = [slice(None)] * len(rows)
        row_strides = [stride for factor in self.factors for stride in factor.strides]
        to = np.lib.stride_tricks.as_strided(packed, (*rows, *self.extents),
                                             [4 * stride for stride in (*row_strides, *self.strides)])
        pieces = self._pieces(source, steps)
        for block in blocks(self.extents, sizes):
            sides = [side.stop - side.start for side in block]
            gathered = self._gather(pieces, block, sides)
            values = _apply(matrices, gathered)
            part = to[(*whole_rows, *block)]
            with np.errstate(over="ignore"):
                part[...] = values.reshape(part.shape)
            if not np.abs(gathered).min() >= least:
                flush_denormals(part)
        return packed

    @property
    def _matrices(self) -> list[Doubles]:
        """Those of the factors, or their Kronecker product where it is small."""
        matrices = [factor.matrix for factor in self.factors]
        if prod(matrix.size for matrix in matrices) > COMBINED_ELEMENTS:
            return matrices
        return [reduce(_kronecker, matrices)]

    @property
    def _largest(self) -> int:
        """The most elements that a point of a block has before, between and after the factors."""
        counts = [prod(self.summed)]
        for factor in self.factors:
            counts.append(counts[-1] // prod(factor.summed) * prod(factor.extents))
        return max(counts)

    def _pieces(self, source: Array, steps: Sequence[int]) -> list[tuple[Box, Array]]:
        """The boxes of loops that lie in the source, each with its elements."""
        limits = [*zip(self.constants, self.coefficients, source.shape, strict=True),
                  *((0, row, size) for row, size in self.limits)]
        whole = tuple(slice(0, extent) for extent in (*self.summed, *self.extents))
        return [(box, np.lib.stride_tricks.as_strided(
            elements_from(source, self.constants, self.coefficients, box),
            [side.stop - side.start for side in box], [4 * step for step in steps], writeable=False))
            for box in inside(limits, whole)]

    def _gather(self, pieces: Sequence[tuple[Box, Array]], block: Box, sides: Sequence[int]) -> Doubles:
        """The weights of a block: the columns of all factors, then the block's loops."""
        corner = (*(slice(0, extent) for extent in self.summed), *block)
        parts: list[tuple[Box, Array]] = []
        for box, elements in pieces:
            common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, corner, strict=True))
            if common == corner:
                return elements[_within(box, common)].astype(np.float64, order="C")
            if all(side.start < side.stop for side in common):
                parts.append((_within(corner, common), elements[_within(box, common)]))
        gathered = np.zeros((*self.summed, *sides))
        for place, elements in parts:
            gathered[place] = elements
        return gathered


def _within(box: Box, part: Box) -> Box:
    """A part of a box, counted from the box's start."""
    return tuple(slice(side.start - whole.start, side.stop - whole.start)
                 for whole, side in zip(box, part, strict=True))


def _least_weight(matrices: Sequence[Doubles]) -> float:
    """Where no weight is smaller, no transformed weight is a denormal; infinite for several matrices.

    A float32 times a float64 has 77 bits: it is a multiple of 2^-77 times its size, and so are sums of such products,
    rounded or not. A sum that is not 0 is at least the least of these steps.
    """
    if len(matrices) > 1:
        return inf
    sizes = np.abs(matrices[0])
    return float(2.0**77 * np.finfo(np.float32).tiny / sizes[sizes > 0].min(initial=inf))


def _kronecker(one: Doubles, other: Doubles) -> Doubles:
    return np.asarray(np.kron(one, other), np.float64)


def _apply(matrices: Sequence[Doubles], values: Doubles) -> Doubles:
    """Each matrix along its columns, for which its rows are put."""
    done = 1
    with np.errstate(all="ignore"):  # weights may be infinite
        for matrix in matrices:
            values = values.reshape(done, matrix.shape[1], -1)
            made = np.empty((done, matrix.shape[0], values.shape[2]))
            step = max(1, PRODUCTS // matrix.size)
            for start in range(0, values.shape[2], step):
                piece = (..., slice(start, start + step))
                np.matmul(matrix, values[piece], out=made[piece])
            values, done = made, done * matrix.shape[0]
    return values


Binding = Copy | Transform


def bindings(program: Program) -> tuple[Binding, ...]:
    """What is bound for the run stages, in order. Raises LoweringError for a bind stage of neither kind."""
    made: list[Binding] = []
    sums: dict[str, _Sum] = {}
    stages = [stage for stage in program.stages if stage.when == "bind"]
    for stage in stages:
        _, statement = leaves(stage.body)[0]
        if isinstance(statement, Store) and isinstance(statement.value, Const) and statement.value.number == 0:
            continue
        if isinstance(statement, Store):
            made.append(copy_of(program, stage))
        else:
            sums[statement.tensor] = _sum_of(program, stage)
    read = {load.tensor for stage in program.stages if stage.when == "run"
            for _, leaf in leaves(stage.body) for load in loads(leaf.value)}
    inner = {one.data.tensor for one in sums.values()} - read
    return (*made, *(_transform(program, name, sums) for name in sums if name not in inner))


def from_json(value: Mapping[str, Any]) -> Binding:
    """The binding of a JSON value."""
    return Transform.from_json(value) if "factors" in value else Copy.from_json(value)


def run(found: Sequence[Binding], weights: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors that bindings make, flat, in their storage, aligned, denormals flushed."""
    return {binding.target: binding.run(weights[binding.source]) for binding in found}


def targets(found: Sequence[Binding]) -> set[str]:
    """The names of the tensors that bindings make."""
    return {binding.target for binding in found}


@dataclass(frozen=True)
class _Sum:
    """``tensor[index] += matrix[...] * data[...]`` over loops of ``extents``."""

    index: Index
    matrix: Load
    data: Load
    extents: Mapping[str, int]


def _sum_of(program: Program, stage: Stage) -> _Sum:
    """The sum that a stage is."""
    (around, statement), *others = leaves(stage.body)
    value = statement.value
    factors = value.values if isinstance(value, Op) and value.name == "mul" else ()
    operands = [factor for factor in factors if isinstance(factor, Load)]
    constant = [program.tensor(load.tensor).role == "constant" for load in operands]
    if not isinstance(statement, Reduce) or sorted(constant) != [False, True] or others:
        raise LoweringError(f"stage {stage.name!r} runs when weights are bound; leave it a single sum of products of a "
                            "constant and weights")
    matrix, data = operands if constant[0] else operands[::-1]
    if not _is_plain(statement.index) or not _is_plain(matrix.index):
        raise LoweringError(f"stage {stage.name!r} runs when weights are bound; leave its loops as they are")
    return _Sum(statement.index, matrix, data, {loop.var: loop.extent for loop in around})


def _is_plain(index: Index) -> bool:
    """Whether an index is one loop an axis."""
    return all(len(a.terms) == 1 and a.terms[0][1] == 1 and a.constant == 0 for a in index)


def _letters(index: Index) -> list[str]:
    return [a.terms[0][0] for a in index]


def _transform(program: Program, name: str, sums: Mapping[str, _Sum]) -> Transform:
    """The chain of sums that ends in a tensor: earlier sums are put into later ones."""
    last = sums[name]
    extents, data, matrices = dict(last.extents), last.data, [last.matrix]
    while data.tensor in sums:
        one = sums[data.tensor]
        outer = dict(zip(_letters(one.index), data.index, strict=True))
        values = {var: outer.get(var, Affine.of(f"{var} of {data.tensor}")) for var in one.extents}
        extents |= {f"{var} of {data.tensor}": extent for var, extent in one.extents.items()}
        matrices.append(Load(one.matrix.tensor, tuple(a.substitute(values) for a in one.matrix.index)))
        data = Load(one.data.tensor, tuple(a.substitute(values) for a in one.data.index))
    matrices.reverse()
    target = program.tensor(name)
    axes = {letter: axis for axis, letter in enumerate(_letters(last.index))}
    rows = [[var for var in _letters(load.index) if var in axes] for load in matrices]
    columns = [[var for var in _letters(load.index) if var not in axes] for load in matrices]
    stored = [(part, _letters(last.index)[part.axis]) for part in target.storage]
    free = [(part, letter) for part, letter in stored if not any(letter in group for group in rows)]
    summed = [var for group in columns for var in group]
    parts = {letter: [(len(summed) + i, part.step) for i, (part, of) in enumerate(free) if of == letter]
             for _, letter in free}

    def row(a: Affine) -> tuple[int, ...]:
        """The coefficient of each loop: of the summed ones, and of the parts of the others."""
        found = [a.coefficient(var) for var in summed] + [0] * len(free)
        for letter, places in parts.items():
            for place, step in places:
                found[place] = step * a.coefficient(letter)
        return tuple(found)

    factors = tuple(_factor(program, load, [(part.step, part.size, part.stride, letter)
                                            for part, letter in stored if letter in group], extents, axes)
                    for load, group in zip(matrices, rows, strict=True))
    return Transform(
        name, data.tensor, target.elements, factors, tuple(part.size for part, _ in free),
        tuple(part.stride for part, _ in free), tuple(row(a) for a in data.index),
        tuple(a.constant for a in data.index),
        tuple((row(Affine.of(letter)), extents[letter]) for letter in parts))


def _factor(program: Program, load: Load, parts: Sequence[tuple[int, int, int, str]], extents: Mapping[str, int],
            axes: Mapping[str, int]) -> Factor:
    """A matrix with its rows as they are stored, in parts (step, size, stride, letter); rows past the end are zero."""
    letters = _letters(load.index)
    tensor = program.tensor(load.tensor)
    values = np.array(tensor.values).reshape(tensor.shape)
    kept = [letter for letter in letters if letter in axes]
    summed = [letter for letter in letters if letter not in axes]
    values = values.transpose([letters.index(letter) for letter in (*kept, *summed)])
    places = np.indices(tuple(size for _, size, _, _ in parts))
    index = [sum((step * places[i] for i, (step, _, _, of) in enumerate(parts) if of == letter),
                 np.zeros(places.shape[1:], np.intp)) for letter in kept]
    within = np.logical_and.reduce([place < extents[letter] for place, letter in zip(index, kept, strict=True)])
    found = values[tuple(np.minimum(place, extents[letter] - 1) for place, letter in zip(index, kept, strict=True))]
    found = np.where(within.reshape(within.shape + (1,) * len(summed)), found, 0.0)
    return Factor(tuple(size for _, size, _, _ in parts), tuple(stride for _, _, stride, _ in parts),
                  tuple(extents[letter] for letter in summed), tuple(found.reshape(-1).tolist()))
